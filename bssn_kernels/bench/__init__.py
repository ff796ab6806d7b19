"""``python -m bssn_kernels bench``: how much faster, at what cost, on real workloads or on your own model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from bssn_kernels import backends
from bssn_kernels.bench.host import host_record, host_table, measure_host
from bssn_kernels.bench.measure import clock_of
from bssn_kernels.bench.memory import MemoryMeter, meter_of
from bssn_kernels.bench.providers import NATIVE, Subject, fused
from bssn_kernels.bench.report import record, table
from bssn_kernels.bench.session import Measured, measure_subject, warm_up
from bssn_kernels.bench.workloads import WORKLOADS, UsageError, load_model
from bssn_kernels.variants import variants

DEFAULT_WORKLOADS = ("sngan32", "paper_cnn", "biggan128")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    text = "a callable that returns your model, plain or under torch's spectral_norm"
    add("factory", nargs="?", metavar="module:factory", help=text)
    text = f"sets of weights of real networks: {', '.join(WORKLOADS)} (default: {' '.join(DEFAULT_WORKLOADS)})"
    add("--workload", nargs="+", choices=WORKLOADS, metavar="NAME", default=[], help=text)
    text = f"of {', '.join(variants())} (default: sn bssn)"
    add("--variant", nargs="+", choices=variants(), metavar="NAME", default=["sn", "bssn"], help=text)
    text = f"of {', '.join(backends.names())} (default: all for the device that can run here)"
    add("--backend", nargs="+", metavar="NAME", help=text)
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where weights are (default: cpu)")
    add("--dtype", choices=DTYPES, help="of the weights (default: float32, or as the model has them)")
    add("--threads", type=positive, metavar="N", help="for torch and for us (default: what torch takes)")
    add("--repeats", type=positive, metavar="N", help="timed rounds (default: 5 to 100, as time allows)")
    add("--seconds", type=float, default=8.0, metavar="S", help="time for the rounds of one workload (default: 8)")
    add("--host", action="store_true", help="instead: host time of a call with layers too small to count")
    add("--json", type=Path, metavar="FILE", help="also write everything measured, raw samples included")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def run(args: argparse.Namespace) -> int:
    """Measure and print one table.

    Returns:
        0; 1 if a provider was refused, since it failed or computed wrong numbers; 2 for unusable arguments.
    """
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: torch sees no CUDA device here")
        if args.host and args.device != "cpu":
            raise UsageError("--host is measured on the CPU alone; python -m benchmarks.run scaling has a GPU's")
        names = backend_names(args.backend, args.device)
        if args.json is not None and not args.json.parent.is_dir():
            raise UsageError(f"--json: no such folder: {args.json.parent}")
        with threads(args.threads):
            return run_host(args, names) if args.host else run_workloads(args, names)
    except UsageError as error:
        progress("")
        print(f"bench: {error}", file=sys.stderr)
        return 2


def backend_names(asked: Sequence[str] | None, device: str = "cpu") -> Sequence[str]:
    """Those asked for, or all that are made for the device and can run on this machine."""
    for name in asked or ():
        try:
            backends.check_name(name)
        except (ValueError, RuntimeError) as error:
            raise UsageError(str(error)) from error
    return asked or backends.natural(device)


def run_workloads(args: argparse.Namespace, names: Sequence[str]) -> int:
    providers, device = [NATIVE, *map(fused, names)], torch.device(args.device)
    meter = meter_of(device)
    measured: list[Measured] = []
    progress("warming up")
    warm_up(providers, args.variant, device)
    for subject in subjects(args):
        of_one = measure_subject(
            subject,
            providers,
            args.variant,
            meter=meter,
            clock=clock_of(device),
            repeats=args.repeats,
            budget_s=args.seconds,
            progress=lambda text, subject=subject: progress(f"{subject.name}: {text}"),
        )
        measured.append(of_one)
    progress("")
    print(table(measured, meter))
    write(args.json, record(measured, settings(args, names), meter, args.device))
    return int(any(row.refused for of_one in measured for row in of_one.rows))


def subjects(args: argparse.Namespace) -> Iterator[Subject]:
    """The models to measure, each built when its turn comes."""
    dtype = DTYPES[args.dtype] if args.dtype else None
    if args.factory:
        progress(f"{args.factory}: building")
        model = load_model(args.factory)
        try:
            yield Subject(args.factory, model if dtype is None else model.to(dtype), device=args.device)
        except ValueError as error:
            raise UsageError(str(error)) from error
    for name in args.workload or (() if args.factory else DEFAULT_WORKLOADS):
        progress(f"{name}: building")
        workload = WORKLOADS[name]
        yield Subject(name, workload.build(dtype or torch.float32), workload.learnable_gain, args.device)


def run_host(args: argparse.Namespace, names: Sequence[str]) -> int:
    rows = measure_host(names, repeats=args.repeats, progress=progress)
    progress("")
    print(host_table(rows))
    write(args.json, {**record([], settings(args, names), MemoryMeter()), "host": host_record(rows)})
    return 0


def settings(args: argparse.Namespace, names: Sequence[str]) -> dict:
    """What was asked for."""
    asked = ("factory", "workload", "variant", "device", "dtype", "repeats", "seconds", "host")
    return {**{name: getattr(args, name) for name in asked}, "backend": list(names)}


def write(file: Path | None, content: dict) -> None:
    if file is not None:
        file.write_text(json.dumps(content, indent=1) + "\n")


@contextmanager
def threads(n: int | None) -> Iterator[None]:
    """torch's thread count for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def progress(text: str) -> None:
    """One line on stderr that is written over; nothing where stderr is no terminal but what a log can bear."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:110]}", end="", file=sys.stderr, flush=True)
    elif text and ": round " not in text:
        print(text, file=sys.stderr, flush=True)
