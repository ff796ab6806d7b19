"""Tables for the eye, and JSON lines for the record."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import MB
from bssn_kernels.bench.report import aligned, times
from bssn_kernels.bench.session import CLONE, Measured, Row

LEGEND = (
    "f: one forward of a root that reads every normalized weight; f+b: and the gradient of every weight, from given"
    " ones; b: f+b less f; b alone: autograd.grad again and again over one kept graph. Medians over interleaved rounds;"
    " on a GPU of the device's time (the host has issued everything before the device begins; ~ where it could not),"
    " and wall: from an idle device to the end, host time included; host: until the call returns. Sets under 100 MB"
    " find an L2 cache full of other data there.",
    "copy: one _foreach_copy_ of all weights; clone: into fresh memory; three_stream: torch.add(G, W, out=dW) over as"
    " many numbers. native/: time of torch's parametrization, SN, over the row's. MB: what must move at least (f: a"
    " read and a write of all weights; b: two reads and a write); share: the time that this takes at the bandwidth of"
    " the copy in the same rounds, over the row's; floor: that time. f/clone: over the clone.",
    "floor (row): n empty_like, an empty autograd.Function, one _foreach_copy_ of the vectors. launches: kernels +"
    " copies and fills of memory, by the profiler. extra: MB at the peak beyond the results; what graphs set aside and"
    " what compilation takes is not seen. authors: stores no vectors in a forward.",
)


def number(value: float | None, unit: float = 1.0, digits: int = 2) -> str:
    return "" if value is None else f"{value * unit:.{digits}f}"


def columns(measured: Measured) -> dict[str, Callable[[Row], str]]:
    """Every column by its title; those that are empty for all rows are not printed."""
    copied = measured.row("copy")
    second = copied and copied.median("forward", "device")

    def device(what: str) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            text = number(row.median(what, "device"), 1e3, 3)
            return f"~{text}" if text and (row.times[what].behind or row.samples(what).noisy) else text

        return cell

    def on_gpu(what: str, clock: str, unit: float, digits: int) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            apart = what in row.times and row.times[what].wall != row.times[what].device
            return number(row.median(what, clock), unit, digits) if apart else ""

        return cell

    def spread(row: Row) -> str:
        if "forward" not in row.times:
            return ""
        record = row.samples("forward", "device").record()
        return f"{number(record['p10'], 1e3, 3)}-{number(record['p90'], 1e3, 3)}"

    def launched(what: str) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            counts = row.launches.get(what, {})
            return "+".join(str(counts[kind]) for kind in ("kernels", "memory") if counts.get(kind))

        return cell

    def ratio(name: str) -> Callable[[Row], str]:
        return lambda row: times(row.ratios[name]) if name in row.ratios else ""

    def share(name: str) -> Callable[[Row], str]:
        return lambda row: f"{row.ratios[name]:.0%}" if name in row.ratios else ""

    def moved(passes: int, what: str) -> Callable[[Row], str]:
        bounds, size = {"forward": ("copy", CLONE), "backward": ("three_stream",)}[what], passes * measured.nbytes / MB
        return lambda row: number(size, 1, 1) if f"share_{what}" in row.ratios or row.provider in bounds else ""

    def floor(passes: int, name: str) -> Callable[[Row], str]:
        return lambda row: number(second and second * passes / 2, 1e3, 3) if name in row.ratios else ""

    def backward(row: Row) -> str:
        return number(row.difference("device"), 1e3, 3) if row.variant else ""

    return {
        "f ms": device("forward"),
        "10-90 %": spread,
        "MB": moved(2, "forward"),
        "floor": floor(2, "share_forward"),
        "share": share("share_forward"),
        "native/f": ratio("native_over_forward"),
        "f/clone": ratio("forward_over_clone"),
        "b ms": backward,
        "b alone": device("backward"),
        "MB b": moved(3, "backward"),
        "floor b": floor(3, "share_backward"),
        "share b": share("share_backward"),
        "f+b ms": device("both"),
        "native/f+b": ratio("native_over_both"),
        "wall f": on_gpu("forward", "wall", 1e3, 3),
        "wall f+b": on_gpu("both", "wall", 1e3, 3),
        "host f us": on_gpu("forward", "host", 1e6, 0),
        "host f+b": on_gpu("both", "host", 1e6, 0),
        "launches f": launched("forward"),
        "launches b": launched("backward"),
        "launches f+b": launched("both"),
        "extra f": lambda row: number(row.extra.get("forward"), 1 / MB, 1),
        "extra f+b": lambda row: number(row.extra.get("both"), 1 / MB, 1),
    }


def table(name: str, measured: Measured) -> str:
    """All rows of a case, who was left out, what missed and met the targets, and what is to be said besides."""
    rows = [row for row in measured.rows if not row.left_out]
    shown = {title: [cell(row) for row in rows] for title, cell in columns(measured).items()}
    shown = {title: cells for title, cells in shown.items() if any(cells)}
    lines: list[tuple[str, ...] | str] = [("variant", "provider", *shown)]
    above = ""
    for i, row in enumerate(rows):
        lines += [""] * (above != row.variant)
        head = (row.variant.upper() or "-", row.provider)
        lines.append((*head, row.refused) if row.refused else (*head, *(cells[i] for cells in shown.values())))
        above = row.variant
    rounds = max((len(of.wall.seconds) for row in rows for of in row.times.values()), default=0)
    size = f"{measured.layers} layers, {measured.nbytes / MB:.1f} MB, {rounds} rounds"
    if copied := measured.row("copy"):
        size += f", copy at {2 * measured.nbytes / copied.median('forward', 'device') / 1e9:.1f} GB/s"
    text = [f"{name}: {size}", "", *aligned(lines, slice(2, None)), ""]
    text += [f"left out: {provider}: {why}" for provider, why in left_out(measured.rows).items()]
    text += target_lines(row.record() for row in rows)
    return "\n".join([*text, *(f"{row.label}: {note}" for row in rows for note in row.notes), ""])


def left_out(rows: Iterable[Row]) -> dict[str, str]:
    """Providers that cannot run here, and why."""
    return {row.provider: row.left_out for row in rows if row.left_out}


def target_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        for target in row.get("targets", ()):
            sign = ">=" if target.get("at_least") else "<="
            numbers = f"{target['value']:>10.3g} {sign} {target['limit']:<8.3g}"
            verdict = "met" if target["met"] else "MISSED"
            lines.append(f"  {label_of(row):<22}{target['target']:<42}{numbers}{verdict}")
    return ["targets:", *lines] if lines else []


def label_of(row: Mapping[str, Any]) -> str:
    return f"{row['provider']} {row.get('variant', '')}".strip()


def median_of(row: Mapping[str, Any], what: str, clock: str = "wall") -> float | None:
    """Of a row from a file; where the clocks are one, only "wall" was written."""
    found = row["times"].get(what)
    return found and found.get(clock, found["wall"])["median"]


def title_of(record: Mapping[str, Any]) -> str:
    """What a record is about."""
    case = record.get("case", {})
    words = [case.get("workload", record.get("name", ""))]
    words += [case["dtype"]] if case.get("dtype", "float32") != "float32" else []
    words += [word for word in ("channels_last", "autocast") if case.get(word)]
    return ", ".join(words)


def summary(records: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """One line per row of ours, every failure, and whether there was none."""
    ratios = ("forward_over_copy", "backward_over_three_stream", "native_over_forward", "native_over_both")
    lines = [("case", "provider", "f ms", "f/copy", "b/3s", "native/f", "native/f+b", "targets met", "missed")]
    failures = []
    for record in records:
        name = title_of(record)
        if record.get("failed"):
            failures.append(f"{name}: {record['failed']}")
        for row in record.get("rows", ()):
            if row.get("refused"):
                failures.append(f"{name}: {label_of(row)}: {row['refused']}")
            elif record["kind"] == "case" and row.get("backend", "reference") != "reference" and row["times"]:
                targets = row.get("targets", [])
                missed = [target["target"] for target in targets if not target["met"]]
                met = f"{len(targets) - len(missed)} of {len(targets)}"
                found = [row["ratios"].get(ratio) for ratio in ratios]
                ms = number(median_of(row, "forward", "device"), 1e3, 3)
                cells = [times(ratio) if ratio is not None else "" for ratio in found]
                lines.append((name, label_of(row), ms, *cells, met, "; ".join(missed)))
    text = ["summary", *aligned(lines, slice(2, 8))] if len(lines) > 1 else ["summary"]
    text += ["", "failed:", *(f"  {line}" for line in failures)] if failures else ["", "nothing failed"]
    return "\n".join(text), not failures


def dump(file: Path | None, head: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines, the run's own first; a file that is read while it is written is never half."""
    if file is None:
        return
    part = file.with_name(file.name + ".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in ({"kind": "run", **head}, *records)))
    part.replace(file)


def load(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The head and the records of a file that :func:`dump` wrote.

    Raises:
        ValueError: it is no such file.
    """
    try:
        head, *records = (json.loads(line) for line in file.read_text().splitlines())
        if head["kind"] != "run":
            raise KeyError("kind")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected the JSON lines of benchmarks.run, got something else ({error})") from error
    return head, records


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
