"""The commands: ``python -m bssn_kernels doctor`` and ``python -m bssn_kernels bench``."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import bssn_kernels
from bssn_kernels import backends
from bssn_kernels.backends import cpu


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser(with_bench="bench" in argv[:1]).parse_args(argv)
    return args.run(args)


def _parser(with_bench: bool) -> argparse.ArgumentParser:
    """The arguments of all commands; the measuring code is imported only where it is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m bssn_kernels", description="Fused kernels for spectral normalization."
    )
    parser.add_argument("--version", action="version", version=f"bssn_kernels {bssn_kernels.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    text = "what is installed, which backends run here, and why the others do not"
    doctor = commands.add_parser("doctor", help=text, description=f"Print {text}.")
    doctor.set_defaults(run=_doctor)

    text = "time forward and backward against torch's own spectral_norm"
    bench = commands.add_parser("bench", help=text, description=f"{text.capitalize()}.")
    if with_bench:
        from bssn_kernels import bench as measuring

        measuring.add_arguments(bench)
        bench.set_defaults(run=measuring.run)
    return parser


def _doctor(args: argparse.Namespace) -> int:
    """Versions, build and CPU, then each backend or the reasons why it cannot run. A missing one is no failure."""
    facts = [*_versions(), *_build(), *_cpu()]
    width = max(len(name) for name, _ in facts)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts))
    print("\nbackends")
    report = backends.report()
    width = max(len(name) for name, _ in report)
    for name, reasons in report:
        print(f"  {name:<{width}}  {'cannot run:' if reasons else 'ready'}")
        for reason in reasons:
            print(f"  {'':<{width}}    - {reason}")
    return 0


def _versions() -> Iterable[tuple[str, str]]:
    yield "bssn_kernels", f"{bssn_kernels.__version__}  ({Path(bssn_kernels.__file__).parent})"
    yield "torch", torch.__version__
    yield "gpu", _gpu()
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    try:
        yield "triton", importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        yield "triton", "not installed"


def _gpu() -> str:
    """Devices that torch sees; asking is for this command alone, importing the package asks nothing."""
    if not torch.cuda.is_available():
        return "none that torch can use"
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return ", ".join(f"{p.name} (sm_{p.major}{p.minor}, {p.multi_processor_count} SMs)" for p in found)


def _build() -> Iterable[tuple[str, str]]:
    """Each compiled part as setup.py noted it: compiler, flags and processors, or why it was left out."""
    try:
        from bssn_kernels import _build_info
    except ImportError:
        yield "build", "none: setup.py has not run here"
        return
    facts = vars(_build_info)
    for part in (name.removesuffix("_REASON") for name in facts if name.endswith("_REASON")):
        title = f"build {part.lower()}"
        if reason := facts[f"{part}_REASON"]:
            yield title, f"left out: {reason}"
            continue
        yield title, f"{facts[f'{part}_COMPILER']}, {facts[f'{part}_FLAGS']}"
        targets = [*facts.get(f"{part}_ISAS", ()), *(f"sm_{arch}" for arch in facts.get(f"{part}_ARCHS", ()))]
        targets += [f"newer ones by the PTX of compute_{arch}" for arch in facts.get(f"{part}_PTX", ())]
        yield "", f"for {', '.join(targets)}"
    if newer := changed_since_build():
        yield "", f"OUT OF DATE: {newer} was changed after the build; run pip install -e . again"


def changed_since_build() -> str:
    """In an editable install, a source that is newer than the module compiled from it."""
    package = Path(bssn_kernels.__file__).parent
    csrc = package.parent / "csrc"
    for part in ("cpu", "cuda"):
        modules = [module.stat().st_mtime for module in package.glob(f"_{part}.*.so")]
        for source in (*csrc.glob("*.h"), *csrc.glob(f"{part}/*.*")):
            if modules and source.stat().st_mtime > max(modules):
                return str(source.relative_to(package.parent))
    return ""


def _cpu() -> Iterable[tuple[str, str]]:
    """Threads, the OpenMP runtime that serves them, and the instruction sets."""
    yield "threads", f"{torch.get_num_threads()}, by {_openmp()}"
    if not cpu.isas():
        return
    try:
        in_use = cpu.isa()
    except RuntimeError as error:
        in_use = f"none: {error}"
    yield "instructions", f"{in_use}  (built, and known to this processor: {', '.join(cpu.isas())})"


def _openmp() -> str:
    """The OpenMP libraries that the process has loaded; there should be exactly one."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "an unknown OpenMP runtime"
    names = set(re.findall(r"/((?:libgomp|libiomp|libomp)[^/\n]*)$", maps, re.MULTILINE))
    return " and ".join(sorted(names)) or "no OpenMP runtime"


if __name__ == "__main__":
    sys.exit(main())
