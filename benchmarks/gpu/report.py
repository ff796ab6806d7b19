"""Tables for the eye, and the JSON for the record."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import MB
from benchmarks.gpu.cases import Case, Row
from benchmarks.gpu.clocks import of_samples
from bssn_kernels.bench.report import aligned, machine

HEADER = (
    *("variant", "provider", "f ms", "10-90 %", "f/copy", "b ms", "b/3s", "b alone", "f+b ms", "wall f", "wall f+b"),
    *("native/f", "native/f+b", "host f us", "host f+b", "launches f", "b", "f+b", "extra f", "extra f+b"),
)
LEGEND = (
    "f: one forward of a root that reads every normalized weight; f+b: and the gradient of every weight, from given"
    " ones. Medians over interleaved rounds, of the device's time (the host has issued everything before the device"
    " begins; ~ where it could not). wall: from an idle device to the end, host time included. b: f+b less f; b alone:"
    " autograd.grad again and again over one kept graph. Sets under 100 MB find an L2 cache full of other data.",
    "copy: one _foreach_copy_ of all weights; three_stream: torch.add(G, W, out=dW) over as many numbers. native/: wall"
    " time of torch's parametrization, SN, over the row's. host: until the call returns. floor: n empty_like, an empty"
    " autograd.Function, one _foreach_copy_ of the vectors. launches: kernels + copies and fills of memory, by the"
    " profiler. extra: MB at the peak beyond the results; what graphs set aside is not seen.",
)


def table(case: Case, record: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """All rows of a case, what missed and met the targets, and what is to be said besides."""
    lines: list[tuple[str, ...] | str] = [HEADER]
    above = ""
    for row in rows:
        lines += [""] * (above != row.variant) + [cells(row)]
        above = row.variant
    size = f"{record['layers']} layers, {record['bytes'] / MB:.1f} MB, {record['rounds']} rounds"
    said = [f"{row.label}: {note}" for row in rows for note in row.notes]
    below = [*target_lines(rows), *said, ""]
    return "\n".join([f"{case.name}: {size}", "", *aligned(lines, slice(2, None)), "", *below])


def cells(row: Row) -> tuple[str, ...]:
    head = (row.variant.upper() or "-", row.provider)
    if row.refused:
        return (*head, row.refused)
    forward = row.times.get("forward")
    spread = of_samples(forward.device) if forward and forward.device else None

    def number(seconds: float | None, unit: float = 1e3, digits: int = 3) -> str:
        return "" if seconds is None else f"{seconds * unit:.{digits}f}"

    def device(what: str) -> str:
        text = number(row.median(what, "device"))
        return f"~{text}" if text and row.times[what].behind else text

    def launched(what: str) -> str:
        counts = row.launches.get(what, {})
        return "+".join(str(counts[kind]) for kind in ("kernels", "memory") if counts.get(kind))

    alone = device("backward")
    return (
        *head,
        device("forward"),
        f"{number(spread['p10'])}-{number(spread['p90'])}" if spread else "",
        times(row.ratios.get("forward_over_copy")),
        number(row.difference("device")) if row.variant else alone,
        times(row.ratios.get("backward_over_three_stream")),
        alone if row.variant else "",
        device("both"),
        *(number(row.median(what, "wall")) for what in ("forward", "both")),
        *(times(row.ratios.get(f"native_over_{what}")) for what in ("forward", "both")),
        *(number(row.median(what, "host"), 1e6, 0) for what in ("forward", "both")),
        *(launched(what) for what in ("forward", "backward", "both")),
        *(number(row.extra.get(what), 1 / MB, 1) for what in ("forward", "both")),
    )


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def target_lines(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        for target in row.targets:
            sign = ">=" if target.get("at_least") else "<="
            numbers = f"{target['value']:>10.3g} {sign} {target['limit']:<8.3g}"
            lines.append(f"  {row.label:<22}{target['target']:<42}{numbers}{'met' if target['met'] else 'MISSED'}")
    return ["targets:", *lines] if lines else []


def summary(records: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """One line per row of ours, every failure, and whether there was none."""
    ratios = ("forward_over_copy", "backward_over_three_stream", "native_over_both")
    lines = [("case", "provider", "f ms", "f/copy", "b/3s", "native/f+b", "targets met", "missed")]
    failures = []
    for record in records:
        name = Case(**record["case"]).name
        if record.get("failed"):
            failures.append(f"{name}: {record['failed']}")
        for row in record["rows"]:
            label, targets = f"{row['provider']} {row['variant']}", row["targets"]
            if row["refused"]:
                failures.append(f"{name}: {label}: {row['refused']}")
            elif row["backend"] not in ("", "reference") and "forward" in row["times"]:
                ms = f"{row['times']['forward']['device']['median'] * 1e3:.3f}"
                missed = [target["target"] for target in targets if not target["met"]]
                met = f"{len(targets) - len(missed)} of {len(targets)}"
                lines.append((name, label, ms, *(times(row["ratios"].get(r)) for r in ratios), met, "; ".join(missed)))
    text = ["summary", *aligned(lines, slice(2, 7))]
    text += ["", "failed:", *(f"  {line}" for line in failures)] if failures else ["", "nothing failed"]
    return "\n".join(text), not failures


def gpu_machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    found = machine() | {"triton": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "processors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "capability": [properties.major, properties.minor],
            "driver": driver(),
            "cuda": torch.version.cuda,
        }
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    return found


def driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip().partition("\n")[0] or None


def dump(file: Path | None, head: Mapping[str, Any], name: str, records: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object, each record on a line of its own; a file that is read while it is written is never half."""
    if file is None:
        return
    lines = ",\n".join(json.dumps(record) for record in records)
    part = file.with_name(file.name + ".part")
    part.write_text(f"{json.dumps(head)[:-1]}, {json.dumps(name)}: [\n{lines}\n]}}\n")
    part.replace(file)


def told(error: BaseException) -> str:
    """An exception in one line that fits a table."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
