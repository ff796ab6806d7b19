"""Builds the compiled parts of bssn_kernels, or leaves them out and says why.

A compiled part is a pybind11 module that knows no torch headers, so it builds in an isolated environment and serves
every torch. Each part is planned as statements of one build.ninja; ninja then rebuilds only what changed. Whatever is
missing (a compiler, a header, a platform) leaves the part out, the install goes on, and
`python -m bssn_kernels doctor` repeats the reason from the generated file `bssn_kernels/_build_info.py`.

Environment: CXX, CXXFLAGS, LDFLAGS and MAX_JOBS as usual; BSSN_CPU=0 leaves the CPU part out, BSSN_CPU=1 makes its
failure fatal. After a change of csrc in an editable install: `pip install -e .` again.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

COMPILE_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"),
)
# No -fopenmp and no libgomp: csrc calls the one entry of the OpenMP runtime that it needs, and the symbol comes at load
# from the runtime that torch made global. A second one in the process would double the threads. So never -Wl,-z,defs.
LINK_FLAGS = ("-shared", "-Wl,--as-needed")

# Instruction sets by platform, the baseline first. The order is also the order of linking, and it matters: inline
# functions of the standard library exist in every object, the linker keeps the first copy, and that one must run on
# every machine.
X86_ISAS = {
    "plain": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
}
ISAS = {"linux-x86_64": X86_ISAS, "linux-aarch64": {"plain": ()}}

NINJA_RULES = """\
ninja_required_version = 1.3

rule compile
  command = $compiler -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out

rule link
  command = $compiler $in -o $out $flags
  description = link $out
"""


class Unavailable(Exception):
    """Why a compiled part cannot be built here, in words for the user."""


@dataclass
class Plan:
    """How to build one module: statements for build.ninja and the file they make, or the reason why it cannot be."""

    target: Path
    statements: list[str] = field(default_factory=list)
    reason: str = ""
    compiler: str = ""
    flags: str = ""
    isas: tuple[str, ...] = ()

    def add(self, output: Path, rule: str, inputs: Iterable[Path], compiler: str, flags: Sequence[str]) -> Path:
        self.statements.append(
            f"build {ninja_path(output)}: {rule} {' '.join(map(ninja_path, inputs))}\n"
            f"  compiler = {compiler}\n"
            f"  flags = {shlex.join(flags).replace('$', '$$')}\n"
        )
        return output


def ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def switch(name: str) -> str:
    """The value of an on/off variable of the environment: "0", "1", or "" when it is not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise CompileError(f"{name} must be 0 (leave out) or 1 (required), got {value!r}")
    return value


def find_compiler() -> tuple[list[str], str]:
    """The C++ compiler as a command, and the first line of its version."""
    given = os.environ.get("CXX")
    command = shlex.split(given) if given else [next(filter(shutil.which, ("g++", "c++", "clang++")), "")]
    if not command[0]:
        raise Unavailable("no C++ compiler was found on PATH (looked for g++, c++, clang++; CXX can name another)")
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"the C++ compiler {shlex.join(command)!r} does not run: {error}") from None
    return command, version.partition("\n")[0].strip()


def accepts(compiler: list[str], flags: Sequence[str]) -> bool:
    """Whether the compiler knows these flags (an old one may not know an instruction set)."""
    probe = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(probe, capture_output=True).returncode == 0


def plan_cpu(objects: Path, target: Path) -> Plan:
    """csrc/cpu: every source but bindings.cpp is compiled once per instruction set, and bindings.cpp, which chooses
    among them at run time, once at the baseline."""
    platform = sysconfig.get_platform()
    if platform not in ISAS:
        raise Unavailable(f"the compiled part is made for {' and '.join(ISAS)}, and this is {platform}")
    bindings = CSRC / "cpu" / "bindings.cpp"
    if not bindings.exists():
        raise Unavailable("csrc/cpu/bindings.cpp is missing from the source tree")
    compiler, version = find_compiler()
    isas = {isa: flags for isa, flags in ISAS[platform].items() if accepts(compiler, flags)}
    flags = [*COMPILE_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]

    plan = Plan(target, compiler=version, flags=shlex.join(flags), isas=tuple(isas))
    command = shlex.join(compiler).replace("$", "$$")

    def compile_to(name: str, source: Path, extra: Sequence[str]) -> Path:
        return plan.add(objects / "cpu" / name, "compile", [source], command, [*flags, f"-I{CSRC}", *extra])

    chosen = [f"-DBSSN_HAVE_{isa.upper()}=1" for isa in isas]
    linked = [compile_to("bindings.o", bindings, [*chosen, *binding_includes()])]
    kernels = sorted(set(bindings.parent.glob("*.cpp")) - {bindings})
    for isa, isa_flags in isas.items():
        for source in kernels:
            linked.append(compile_to(f"{source.stem}.{isa}.o", source, [f"-DBSSN_ISA={isa}", *isa_flags]))
    plan.add(target, "link", linked, command, [*LINK_FLAGS, *shlex.split(os.environ.get("LDFLAGS", ""))])
    return plan


def binding_includes() -> list[str]:
    """Headers of Python and pybind11, as system headers: their warnings are not ours."""
    try:
        import pybind11
    except ImportError:
        raise Unavailable("pybind11 is not installed in the build environment") from None
    paths = (pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude"))
    return [f"-isystem{path}" for path in dict.fromkeys(paths)]


def run_ninja(folder: Path, target: Path) -> None:
    """Build one target, echoing what ninja says; the reason of a failure is the compiler's first complaint."""
    command = [find_ninja(), "-C", str(folder), str(target)]
    if os.environ.get("MAX_JOBS"):
        command += ["-j", os.environ["MAX_JOBS"]]
    output = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            output.append(line.strip().replace(f"{ROOT}{os.sep}", ""))
    if process.returncode:
        complaints = [line for line in output if re.search(r"\berror\b|undefined reference", line)] or output[-1:]
        raise Unavailable(f"it did not compile: {' '.join(complaints[:1])[:300]}")


def find_ninja() -> str:
    found = shutil.which("ninja")
    if found:
        return found
    try:
        import ninja
    except ImportError:
        raise Unavailable("ninja is not installed in the build environment") from None
    return os.path.join(ninja.BIN_DIR, "ninja")


# Each module's part: its name, as in its switch (BSSN_CPU) and its facts (CPU_REASON), and who plans it.
PARTS: dict[str, tuple[str, Callable[[Path, Path], Plan]]] = {"bssn_kernels._cpu": ("CPU", plan_cpu)}


class BuildParts(build_ext):
    """setuptools' build_ext with ninja as the builder, and with a reason where a part cannot be built."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            # setuptools hands an editable install a new temporary folder, so every install would compile everything.
            tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / f"temp.{tag}")

    def build_extensions(self) -> None:
        objects = Path(self.build_temp).resolve()
        plans = {ext.name: self.plan(ext, objects) for ext in self.extensions}
        objects.mkdir(parents=True, exist_ok=True)
        statements = [statement for plan in plans.values() for statement in plan.statements]
        (objects / "build.ninja").write_text("\n".join([NINJA_RULES, *statements]))
        for name, plan in plans.items():
            self.build(name, plan, objects)
        # What was left out is no output of this command: whoever asks for the list copies or records each file.
        self.extensions = [ext for ext in self.extensions if not plans[ext.name].reason]
        package = Path(self.build_lib, "bssn_kernels")
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.py").write_text(build_info(self.distribution.get_version(), plans))

    def plan(self, ext: Extension, objects: Path) -> Plan:
        part, planner = PARTS[ext.name]
        target = objects / self.get_ext_filename(ext.name)
        try:
            if switch(f"BSSN_{part}") == "0":
                raise Unavailable(f"BSSN_{part}=0 left it out of the build")
            return planner(objects, target)
        except Unavailable as why:
            return Plan(target, reason=str(why))

    def build(self, name: str, plan: Plan, objects: Path) -> None:
        """Bring the module to the build folder; or, when that fails, see that none from an earlier build is there."""
        built = Path(self.get_ext_fullpath(name))
        try:
            if plan.reason:
                raise Unavailable(plan.reason)
            run_ninja(objects, plan.target)
        except Unavailable as why:
            part = PARTS[name][0]
            if switch(f"BSSN_{part}") == "1":
                raise CompileError(f"{name} is required by BSSN_{part}=1, but {why}") from None
            plan.reason = str(why)
            built.unlink(missing_ok=True)
            print(f"warning: bssn_kernels is installed WITHOUT {name}: {why}", file=sys.stderr, flush=True)
        else:
            built.parent.mkdir(parents=True, exist_ok=True)
            built.unlink(missing_ok=True)  # never write into a file that a running process may have mapped
            shutil.copy2(plan.target, built)

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the modules and the build's facts go beside the sources. A module that is there from
        an earlier build but was left out of this one goes away: it would hide the reason, and be out of date."""
        package = Path(self.get_finalized_command("build_py").get_package_dir("bssn_kernels"))
        for name in PARTS:
            (package / Path(self.get_ext_filename(name)).name).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        shutil.copy2(Path(self.build_lib, "bssn_kernels", "_build_info.py"), package)


def build_info(version: str, plans: dict[str, Plan]) -> str:
    lines = ['"""Written by setup.py: how the compiled parts of this copy were built, and why one is missing."""', ""]
    lines.append(f"VERSION = {version!r}")
    for name, plan in plans.items():
        for fact in ("reason", "compiler", "flags", "isas"):
            lines.append(f"{PARTS[name][0]}_{fact.upper()} = {getattr(plan, fact)!r}")
    return "\n".join(lines) + "\n"


setup(
    ext_modules=[Extension(name, sources=[], optional=True) for name in PARTS],
    cmdclass={"build_ext": BuildParts},
)
