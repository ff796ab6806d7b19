"""Time spectral normalization: ours, torch's in all its forms, and the copies that nothing can beat.

    python -m benchmarks.run                              # everything, for the CPU
    python -m benchmarks.run tables --workload sngan32    # one part, one set of weights
    python -m benchmarks.run --json new.jsonl --plots pictures
    python -m benchmarks.run --show old.jsonl --plots pictures
    python -m benchmarks.run --compare old.jsonl new.jsonl
    python -m benchmarks.run --compare HEAD~3 HEAD --workload sngan32

Parts: "tables" (forward and backward of whole sets of weights), "scaling" (against layers, bytes, iterations, threads),
"steps" (whole steps of discriminators), "breakdown" (where the time of ours goes, on a CPU). What a provider
computes is compared with float64 before it is timed. The exit code is 1 if a provider or a case failed; missed targets
are results, not failures, and who cannot run here says why.

On a GPU every case runs in a process of its own, the most telling first, so that a kernel that kills its device or
never ends costs one case; on the CPU all run here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.breakdown import breakdown_table, measure_breakdown
from benchmarks.child import Say, apart
from benchmarks.compare import compare
from benchmarks.measure import measure, provider_names, run_child
from benchmarks.models import MODELS
from benchmarks.report import LEGEND, dump, load, progress, summary
from benchmarks.results import write_results
from benchmarks.scaling import CURVES, curve_table, measure_curve
from benchmarks.steps import measure_steps, steps_table
from benchmarks.verify import Blind, check_the_check
from benchmarks.workloads import Case, cases_of
from bssn_kernels import backends
from bssn_kernels.bench import DTYPES, backend_names, positive, threads
from bssn_kernels.bench.machine import machine
from bssn_kernels.bench.providers import NATIVE, fused
from bssn_kernels.bench.report import wrapped
from bssn_kernels.bench.session import Row, told, warm_up
from bssn_kernels.bench.workloads import WORKLOADS, UsageError
from bssn_kernels.variants import variants

FORMAT = "bssn_kernels benchmarks 2"
PARTS = ("tables", "scaling", "steps", "breakdown")
CASE_S, COMPILED_CASE_S, PART_S = 150.0, 400.0, 200.0
LEAST_S = 25.0  # a case is not begun with less
RETRIES = 4

Run = Callable[[Case, argparse.Namespace, Sequence[str], float], dict[str, Any]]


def supervise(
    cases: Sequence[Case],
    args: argparse.Namespace,
    end: float,
    write: Callable[[dict], None],
    run: Run = run_child,
    retries: int = RETRIES,
) -> None:
    """All cases. A case that a provider broke is run again without that provider."""
    for case in cases:
        without, broken = [], []
        for _ in range(1 + retries):
            left = end - time.monotonic()
            if left < LEAST_S:
                record = {"kind": "case", "case": asdict(case), "rows": [], "failed": "no time was left"}
                break
            record = run(case, args, without, min(left, COMPILED_CASE_S if case.compiled else CASE_S))
            guilty = record.get("at", "")
            if not record.get("failed") or guilty in ("", "building", "rounds") or guilty in without:
                break
            # What became of it, in place of a row that the next try does not have.
            broken.append(Row(*guilty.rsplit(" ", 1), refused=record["failed"]).record())
            without.append(guilty)
        record["rows"] = [*record["rows"], *broken]
        write(record)


def run_here(case: Case, args: argparse.Namespace, without: Sequence[str], seconds: float) -> dict[str, Any]:
    return measure(case, args, without, lambda record, seconds: None)


def measure_curves(name: str, args: argparse.Namespace, say: Say) -> dict[str, Any]:
    device = torch.device(args.device)
    return measure_curve(name, device, args.repeats, min(args.seconds, 2.0), progress=progress)


def measure_step(name: str, args: argparse.Namespace, say: Say) -> dict[str, Any]:
    return measure_steps(name, torch.device(args.device), args.batch, args.repeats or args.step_repeats, args.seconds)


def measure_parts(name: str, args: argparse.Namespace, say: Say) -> dict[str, Any]:
    return measure_breakdown(name, torch.device(args.device), repeats=args.repeats)


# By part: the kind of its records, what does the work, and how a record is printed.
WORK: dict[str, tuple[str, Callable[..., dict], Callable[[dict], str]]] = {
    "scaling": ("scaling", measure_curves, curve_table),
    "steps": ("step", measure_step, lambda record: steps_table([record])),
    "breakdown": ("breakdown", measure_parts, breakdown_table),
}


def other_parts(args: argparse.Namespace, end: float, write: Callable[[dict], None]) -> None:
    """Curves, whole steps and breakdowns, by the same rules."""
    names = {"scaling": args.curve or CURVES, "steps": args.model or MODELS}
    if args.device == "cpu" and "cpu" in backends.natural("cpu"):
        names["breakdown"] = args.workload or WORKLOADS
    for part, name in [(part, name) for part, of_part in names.items() if part in args.part for name in of_part]:
        kind, work, shown = WORK[part]
        nothing, left = {"kind": kind, "name": name, "rows": []}, end - time.monotonic()
        progress(f"{kind}: {name}")
        if left < LEAST_S:
            record = nothing | {"failed": "no time was left"}
        elif args.device == "cuda":
            record = apart(work, (name, args), nothing, min(left, PART_S))
        else:
            try:
                record = work(name, args, lambda record, seconds: None)
            except Exception as error:
                record = nothing | {"failed": told(error)}
        if not record.get("failed"):
            print(shown(record), flush=True)
        write(record)


def asked_cases(args: argparse.Namespace) -> list[Case]:
    """What was asked for, or the device's list."""
    if not (args.workload or args.dtype or args.channels_last or args.autocast or args.compiled):
        return list(cases_of(torch.device(args.device)))
    return [
        Case(name, dtype, args.channels_last, args.autocast, args.compiled)
        for name in args.workload or WORKLOADS
        for dtype in args.dtype or ["float32"]
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks.run", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("part", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    add("--device", choices=["cuda", "cpu"], default="cpu")
    add("--workload", nargs="+", choices=WORKLOADS, metavar="NAME", help="default: a list of telling cases")
    add("--variant", nargs="+", choices=variants(), metavar="NAME", default=["sn", "bssn"])
    add("--dtype", nargs="+", choices=DTYPES, metavar="NAME", help="of the weights")
    add("--channels-last", action="store_true", help="weights of convolutions in this memory format")
    add("--autocast", action="store_true", help="forwards under torch.autocast to bfloat16")
    add("--compiled", action="store_true", help="torch.compile takes part, which takes minutes")
    add("--backend", nargs="+", choices=backends.names(), metavar="NAME", help="of ours, default: made for the device")
    add("--provider", nargs="+", metavar="NAME", help="only these, by the name in the table")
    add("--alone", action="store_true", help="also time the backward by itself (on a GPU always)")
    add("--curve", nargs="+", choices=CURVES, metavar="NAME", help=f"of scaling: {', '.join(CURVES)}")
    add("--model", nargs="+", choices=MODELS, metavar="NAME", help=f"of steps: {', '.join(MODELS)}")
    add("--batch", type=positive, metavar="N", help="of steps (default: by model and device)")
    add("--threads", type=positive, metavar="N", help="for torch and for us (default: what torch takes)")
    add("--repeats", type=positive, metavar="N", help="timed rounds (default: 5 to 100, as time allows)")
    add("--step-repeats", type=positive, default=5, metavar="N", help="timed rounds of steps (default: 5)")
    add("--seconds", type=float, default=5.0, metavar="S", help="time for the rounds of a case (default: 5)")
    add("--deadline", type=float, default=3600.0, metavar="S", help="time for everything; what comes later is left out")
    add("--json", type=Path, metavar="FILE", help="everything measured, raw samples included, kept up to date")
    add("--plots", type=Path, metavar="DIR", help="draw pictures into this folder (needs matplotlib)")
    add("--readme", type=Path, metavar="FILE", help="write the table between the marks in this file")
    add("--note", default="", metavar="TEXT", help="to stand with the results, such as what else the machine did")
    add("--show", type=Path, metavar="FILE", help="measure nothing: take what --json wrote")
    add("--compare", nargs=2, metavar=("OLD", "NEW"), help="two files of --json, or two commits, which are measured")
    args = parser.parse_args(argv)
    if unknown := set(args.part) - set(PARTS):
        parser.error(f"expected parts of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    args.part = args.part or list(PARTS)
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot end well, before minutes of measuring.

    Raises:
        UsageError: with what is wrong.
    """
    if args.device == "cuda" and not args.show and not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device here (--device cpu runs the same code)")
    if args.json is not None and not args.json.parent.is_dir():
        raise UsageError(f"--json: no such folder: {args.json.parent}")
    if args.plots is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise UsageError("--plots needs matplotlib: pip install '.[bench]'") from error
    backend_names(args.backend, args.device)
    known = provider_names(asked_cases(args), args) if args.provider else []
    if unknown := [name for name in args.provider or () if name not in known]:
        raise UsageError(f"--provider: expected some of {', '.join(known)}; got {', '.join(unknown)}")


def measure_all(args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The head and the records of everything that was asked for."""
    where = ("json", "plots", "readme", "show", "compare")
    asked = {name: value for name, value in vars(args).items() if name not in where}
    head = {"format": FORMAT, "machine": machine(args.device), "settings": asked}
    records: list[dict[str, Any]] = []
    end = time.monotonic() + args.deadline

    def write(record: dict[str, Any]) -> None:
        records.append(record)
        dump(args.json, head, records)

    device = torch.device(args.device)
    check_the_check(device)
    if "tables" in args.part:
        print("\n".join([*wrapped(LEGEND), ""]))
        if args.device == "cpu":
            warm_up([NATIVE, *map(fused, backend_names(args.backend))], args.variant)
        # What broke this process cannot be tried again in it.
        run: tuple[Run, int] = (run_here, 0) if args.device == "cpu" else (run_child, RETRIES)
        supervise(asked_cases(args), args, end, write, *run)
    other_parts(args, end, write)
    return head, records


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        check(args)
        if args.compare:
            print(compare(*args.compare, args.workload or ["sngan32"]))
            return 0
        with threads(args.threads):
            head, records = load(args.show) if args.show else measure_all(args)
    except (UsageError, ValueError, Blind) as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2
    text, well = summary(records)
    print(text)
    write_results(head, records, args.plots, args.readme)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
