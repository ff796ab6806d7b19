"""What a run leaves for readers: pictures, and the tables of the README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import label_of, median_of, number
from bssn_kernels.bench.report import over, times
from bssn_kernels.bench.workloads import UsageError

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
Record = dict[str, Any]


def write_results(head: Record, records: Sequence[Record], plots: Path | None, readme: Path | None) -> None:
    """Draw and write what was asked for.

    Raises:
        UsageError: no marks in the file.
    """
    if plots is not None:
        from benchmarks.plots import draw

        for file in draw(head, records, plots):
            print(f"drew {file}")
    if readme is not None:
        text = readme.read_text()
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise UsageError(f"--readme: expected the marks {BEGIN!r} and {END!r} in {readme}")
        tables = "\n".join(markdown(head, records))
        readme.write_text(f"{before}{begin}\n{tables}\n{end}{after}")


def machine_line(head: Record) -> str:
    m, note = head["machine"], head.get("settings", {}).get("note")
    device = m.get("gpu") or f"{m['cpu']} ({m['cpu_capability']}), cores: {m['cores']}, threads: {m['threads']}"
    words = [device, f"torch {m['torch']}", f"commit {(m['commit'] or 'unknown')[:10]}"]
    return ", ".join([*words, note] if note else words)


def markdown(head: Record, records: Sequence[Record]) -> Iterable[str]:
    """Ours on every set of float32 weights, with targets; growth per layer; whole steps."""
    yield f"Measured on: {machine_line(head)}."
    yield ""
    yield from forward_table(plain_cases(records))
    curve = next((r for r in records if r["kind"] == "scaling" and r.get("growth")), None)
    if curve:
        yield ""
        yield from growth_table(curve)
    parts = [r for r in records if r["kind"] == "breakdown" and not r.get("failed")]
    if parts:
        yield ""
        yield from parts_table(parts)
    steps = [r for r in records if r["kind"] == "step" and not r.get("failed")]
    if steps:
        yield ""
        yield from step_table(steps)


def plain_cases(records: Sequence[Record]) -> list[Record]:
    """float32 weights as they are made, largest first."""
    found = [
        r
        for r in records
        if r["kind"] == "case"
        and not r.get("failed")
        and r["case"]["dtype"] == "float32"
        and not (r["case"]["channels_last"] or r["case"]["autocast"])
    ]
    return sorted({r["case"]["workload"]: r for r in reversed(found)}.values(), key=lambda r: -r["bytes"])


def ours(record: Record) -> list[Record]:
    return [r for r in record["rows"] if r.get("backend", "reference") != "reference" and r["times"]]


def forward_table(records: Sequence[Record]) -> Iterable[str]:
    yield (
        "| weights | | forward ms | native / ours | forward + backward ms | native / ours | best torch / ours"
        " | forward / clone | share of the copy: f, b | extra MB |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for record in records:
        name = f"`{record['case']['workload']}`, {record['layers']} layers, {record['bytes'] / 2**20:.0f} MiB"
        for row in ours(record):
            met = {t["target"]: t for t in row.get("targets", ())}
            ratio = row["ratios"]
            shares = [f"{ratio[f'share_{what}']:.0%}" for what in ("forward", "backward")]
            extra = row.get("extra", {}).get("both")
            cells = (
                f"{label_of(row)}",
                number(median_of(row, "forward", "device"), 1e3),
                with_target(times(ratio["native_over_forward"]), met.get("native / forward")),
                number(median_of(row, "both", "device"), 1e3),
                with_target(times(ratio["native_over_both"]), met.get("native / (forward + backward)")),
                best_torch(record, row),
                with_target(number(ratio["forward_over_clone"]), met.get("forward / clone")),
                ", ".join(shares),
                with_target(number(extra, 1e-6, 1), met.get("extra memory, forward + backward, MB")),
            )
            yield f"| {name} | {' | '.join(cells)} |"
            name = ""


def with_target(text: str, target: Record | None) -> str:
    """A number, the limit that the design sets it, and whether it is met."""
    if target is None:
        return text
    sign = "≥" if target.get("at_least") else "≤"
    return f"{text} ({sign} {target['limit']:.3g}: {'met' if target['met'] else '**missed**'})"


def best_torch(record: Record, row: Record) -> str:
    """The fastest of all that is not ours, forward and backward, of whatever variant it knows."""
    others = {
        label_of(r): t
        for r in record["rows"]
        if not r.get("backend") and r.get("variant") in ("sn", row["variant"]) and (t := median_of(r, "both"))
    }
    if not others:
        return ""
    name = min(others, key=others.__getitem__)
    return f"{times(over(others[name], median_of(row, 'both')))} ({name})"


def growth_table(record: Record) -> Iterable[str]:
    most = record["points"][-1]["x"]
    yield f"| host time of layers of 4 x 4 | us for each layer more | {most} layers, over the floor's forward |"
    yield "|---|---|---|"
    for one in record["growth"]:
        if one["what"] in ("forward", "both") and one["provider"] not in ("copy", "clone") and one["per_layer"]:
            target = {"limit": one["limit"], "met": one["met"]} if "limit" in one else None
            ratio = with_target(times(one["over_floor"]), target)
            what = {"forward": "forward", "both": "forward + backward"}[one["what"]]
            yield f"| {one['provider']}, {what} | {one['per_layer'] * 1e6:.1f} | {ratio} |"


def parts_table(records: Sequence[Record]) -> Iterable[str]:
    """Where the time of a forward with its backward goes."""
    rows = [(record, row) for record in records for row in record["rows"] if row["what"] == "both"]
    names = list(dict.fromkeys(part for _, row in rows for part in row["parts"]))
    yield f"| us of a forward + backward | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    for record, row in rows:
        cells = [number(row["parts"].get(name), 1e6, 0) for name in names]
        head = f"`{record['workload']}`, {record['layers']} layers, {record['backend']} {record['variant']}"
        yield f"| {head} | {' | '.join(cells)} |"


def step_table(records: Sequence[Record]) -> Iterable[str]:
    yield "| a step of | ms natively | normalization takes | with ours, SN | normalization takes | native / ours |"
    yield "|---|---|---|---|---|---|"
    for record in records:
        rows = {row["provider"]: row["times"] for row in record["rows"]}
        fused = [name for name in rows if name.endswith(" sn") and name != "parametrization sn" and rows[name]]
        best = next(iter(fused), None)
        if not best or not rows.get("parametrization sn"):
            continue
        ms = {name: rows[name]["step"]["wall"]["median"] * 1e3 for name in ("parametrization sn", best)}
        share, size = record["share"], record["size"]
        yield (
            f"| `{record['model']}`, {record['batch']} images of {size} x {size}"
            f" | {ms['parametrization sn']:.0f} | {share['parametrization sn']:.1%}"
            f" | {ms[best]:.0f} ({best}) | {share[best]:.1%} | {record['native_over'][best]:.2f}x |"
        )
