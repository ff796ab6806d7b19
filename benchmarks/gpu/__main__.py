"""Time spectral normalization on a GPU: ours, torch's in all its forms, and the copies that nothing can beat.

    python -m benchmarks.gpu --json gpu.json

Every case (workload, dtype, memory format) runs in a process of its own, the most telling first, so that a kernel that
kills its device or never ends costs one case. What a provider computes is compared with float64 before it is timed. The
exit code is 1 if a provider or a case failed; missed targets are results, not failures.

``--device cpu`` runs the same code in this process with the clock of the CPU, without graphs, compilation and counts,
for tests.
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

from benchmarks.gpu.cases import CASES, Case, Row
from benchmarks.gpu.clocks import MAX_ROUNDS, MIN_ROUNDS
from benchmarks.gpu.measurement import measure, run_child
from benchmarks.gpu.report import LEGEND, dump, gpu_machine, summary
from bssn_kernels import backends
from bssn_kernels.bench import DTYPES, backend_names, positive
from bssn_kernels.bench.report import wrapped
from bssn_kernels.bench.workloads import WORKLOADS, UsageError
from bssn_kernels.variants import variants

FORMAT = "bssn_kernels gpu 1"
CASE_S, COMPILED_CASE_S = 150.0, 400.0
LEAST_S = 25.0  # a case is not begun with less
RETRIES = 4


def supervise(
    cases: Sequence[Case],
    args: argparse.Namespace,
    write: Callable[[list], None],
    run: Callable = run_child,
    retries: int = RETRIES,
) -> list[dict[str, Any]]:
    """All cases, each in a child. A case that a provider broke is run again without that provider."""
    end = time.monotonic() + args.deadline
    records: list[dict[str, Any]] = []
    for case in cases:
        without, broken = [], []
        for _ in range(1 + retries):
            left = end - time.monotonic()
            if left < LEAST_S:
                record = {"case": asdict(case), "rows": [], "failed": "no time was left"}
                break
            record = run(case, args, without, min(left, COMPILED_CASE_S if case.compiled else CASE_S))
            guilty = record.get("at", "")
            if not record.get("failed") or guilty in ("", "building", "rounds") or guilty in without:
                break
            # What became of it, in place of a row that the next try does not have.
            broken.append(Row(*guilty.rsplit(" ", 1), refused=record["failed"]).record())
            without.append(guilty)
        record["rows"] = [*record["rows"], *broken]
        records.append(record)
        write(records)
    return records


def run_here(case: Case, args: argparse.Namespace, without: Sequence[str], seconds: float) -> dict[str, Any]:
    return measure(case, args, without, lambda record, seconds: None)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """What was asked for, or all of CASES."""
    if not (args.workload or args.dtype or args.channels_last or args.compiled):
        return list(CASES)
    return [
        Case(name, dtype, args.channels_last, args.compiled)
        for name in args.workload or WORKLOADS
        for dtype in args.dtype or ["float32"]
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks.gpu", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--workload", nargs="+", choices=WORKLOADS, metavar="NAME", help="default: a list of telling cases")
    add("--variant", nargs="+", choices=variants(), metavar="NAME", default=["sn", "bssn"])
    add("--dtype", nargs="+", choices=DTYPES, metavar="NAME", help="of the weights")
    add("--channels-last", action="store_true", help="weights of convolutions in this memory format")
    add("--compiled", action="store_true", help="torch.compile takes part, which takes minutes")
    add("--backend", nargs="+", choices=backends.names(), metavar="NAME", help="of ours, default: made for the device")
    add("--provider", nargs="+", metavar="NAME", help="only these, by the name in the table")
    add("--repeats", type=positive, metavar="N", help=f"timed rounds (default: {MIN_ROUNDS} to {MAX_ROUNDS})")
    add("--seconds", type=float, default=6.0, metavar="S", help="time for the rounds of a case")
    add("--deadline", type=float, default=3600.0, metavar="S", help="time for all cases; later ones are left out")
    add("--json", type=Path, metavar="FILE", help="everything measured, raw samples included, kept up to date")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("torch sees no CUDA device here (--device cpu runs the same code, for tests)")
        if args.json is not None and not args.json.parent.is_dir():
            raise UsageError(f"--json: no such folder: {args.json.parent}")
        backend_names(args.backend)
    except UsageError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    asked = {name: value for name, value in vars(args).items() if name != "json"}
    head = {"format": FORMAT, "machine": gpu_machine(torch.device(args.device)), "settings": asked}
    # What broke this process cannot be tried again in it.
    run = (run_here, 0) if args.device == "cpu" else (run_child, RETRIES)
    records = supervise(cases_of(args), args, lambda records: dump(args.json, head, "cases", records), *run)
    text, well = summary(records)
    print("\n".join([*wrapped(LEGEND), "", text]))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
