"""What to measure first on a new GPU: bandwidths, whole calls, launch settings, the schedule, progress, host time.

    python -m benchmarks.experiments --json experiments.json
    python -m benchmarks.experiments settings schedule

Each experiment runs in a process of its own; one that fails or hangs is reported and the rest goes on. The exit code is
1 if one failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.child import Say, apart
from benchmarks.experiments.correctness import small, stability
from benchmarks.experiments.groups import Rows, Setting
from benchmarks.experiments.speed import bandwidth, host, rows, schedule, settings, whole
from benchmarks.report import dump, progress
from bssn_kernels import backends
from bssn_kernels.bench.machine import machine
from bssn_kernels.bench.report import aligned
from bssn_kernels.bench.session import told

FORMAT = "bssn_kernels gpu experiments 1"
LEAST_S = 15.0  # an experiment is not begun with less
START_S = 30.0

# The most telling first, each with the seconds that it may take.
EXPERIMENTS: dict[str, tuple[Callable[[Setting], Rows], float]] = {
    "small": (small, 60),
    "bandwidth": (bandwidth, 60),
    "whole": (whole, 120),
    "rows": (rows, 120),
    "stability": (stability, 150),
    "settings": (settings, 200),
    "schedule": (schedule, 120),
    "host": (host, 120),
}
# What is varied there is Triton's own; a bandwidth is nobody's.
ONLY_TRITON, ONCE = ("rows", "settings", "schedule"), ("bandwidth",)


def settings_of(name: str, settings: Sequence[Setting]) -> Sequence[Setting]:
    """Those that an experiment runs under: every backend's, or one alone."""
    if name in ONLY_TRITON and len(settings) > 1:
        return [setting for setting in settings if setting.backend == "triton"]
    return settings[:1] if name in ONCE else settings


def measure(name: str, setting: Setting, say: Say) -> dict[str, Any]:
    """One experiment in this process; what is known is said after every row."""
    run, limit = EXPERIMENTS[name]
    start = time.perf_counter()
    record: dict[str, Any] = nothing_of(name, setting) | {"what": run.__doc__.splitlines()[0]}
    progress(f"{name}, {setting.backend}")
    try:
        for row in run(setting):
            record["rows"].append(row)
            say(record | {"failed": "did not end"}, limit)
            progress("  ".join(shown(value) for value in row.values() if not isinstance(value, dict)))
    except Exception as error:
        record["failed"] = told(error)
    return record | {"seconds": time.perf_counter() - start}


def nothing_of(name: str, setting: Setting) -> dict[str, Any]:
    """The record of an experiment that never said anything."""
    return {"kind": "experiment", "experiment": name, "backend": setting.backend, "rows": []}


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(record: Mapping[str, Any]) -> str:
    """An experiment's rows, and why some have failed."""
    lines = [f"{record['experiment']}, {record['backend']}: {record.get('what', '')}"]
    rows = [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in record["rows"]]
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "failed"]
    cells: list[tuple[str, ...] | str] = [tuple(names)]
    for row in rows:
        if "failed" in row:
            cells.append("  ".join(map(shown, row.values())))
        else:
            cells.append(tuple(shown(row.get(name, "")) for name in names))
    lines += aligned(cells, slice(0, None)) if rows else []
    lines += [f"FAILED: {record['failed']}"] if record.get("failed") else []
    return "\n".join([*lines, ""])


def summary(records: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """One line per experiment, and whether all went well."""
    lines, well = ["summary"], True
    for record in records:
        bad = [row["failed"] for row in record["rows"] if "failed" in row]
        said = [record["failed"]] if record.get("failed") else []
        said += [f"{len(bad)} failed, the first: {bad[0]}"] if bad else []
        well = well and not said
        what = f"{record['experiment']}, {record['backend']}"
        lines.append(f"  {what:<24}{len(record['rows']):>4} rows  {'; '.join(said) or 'ok'}")
    return "\n".join(lines), well


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks.experiments", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("experiment", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)} (default: all, in this order)")
    add("--list", action="store_true", help="name the experiments")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: what needs no GPU, for tests")
    add("--backend", nargs="+", choices=backends.names(), help="default: the fused ones of the device")
    add("--deadline", type=float, default=3600.0, metavar="S", help="time for all; later ones are left out")
    add("--json", type=Path, metavar="FILE", help="everything measured, raw samples included, kept up to date")
    add("--in-process", action="store_true", help="no process per experiment, as a tool that watches one wants it")
    args = parser.parse_args(argv)
    if unknown := set(args.experiment) - set(EXPERIMENTS):
        parser.error(f"expected experiments of {', '.join(EXPERIMENTS)}, got {', '.join(sorted(unknown))}")
    return args


def main(argv: Sequence[str] | None = None, setting: Setting | None = None) -> int:
    args = parse(argv)
    if args.list:
        for name, (run, _) in EXPERIMENTS.items():
            print(f"{name:<12}{run.__doc__.splitlines()[0]}")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.experiments: torch sees no CUDA device here", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    fused = args.backend or [name for name in backends.natural(args.device) if name != "reference"]
    if not (setting or fused):
        print(f"benchmarks.experiments: no fused backend can run here: {backends.report()}", file=sys.stderr)
        return 2
    given = [setting] if setting else [Setting(device, name) for name in fused]
    head = {"format": FORMAT, "machine": machine(device), "settings": {"backend": [one.backend for one in given]}}
    records: list[dict] = []
    end = time.monotonic() + args.deadline
    jobs = [(name, one) for name in args.experiment or EXPERIMENTS for one in settings_of(name, given)]
    for name, one in jobs:
        left, nothing = end - time.monotonic(), nothing_of(name, one)
        if args.in_process or args.device == "cpu":
            record = measure(name, one, lambda record, seconds: None)
        elif left < LEAST_S:
            record = nothing | {"failed": "no time was left"}
        else:
            record = apart(measure, (name, one), nothing, min(left, START_S + EXPERIMENTS[name][1]))
        records.append(record)
        dump(args.json, head, records)
        print(table(record), flush=True)
    text, well = summary(records)
    print(text)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
