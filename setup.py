"""Builds the compiled parts of bssn_kernels, or leaves them out and says why.

A compiled part is a pybind11 module that knows no torch headers, so it builds in an isolated environment and serves
every torch. Each part is planned as statements of one build.ninja; ninja then rebuilds only what changed. Whatever is
missing (a compiler, a header, a platform) leaves the part out, the install goes on, and
`python -m bssn_kernels doctor` repeats the reason from the generated file `bssn_kernels/_build_info.py`.

Environment: CXX, CXXFLAGS, LDFLAGS and MAX_JOBS as usual, and for the CUDA part CUDA_HOME, TORCH_CUDA_ARCH_LIST,
NVCC_CCBIN, NVCC_PREPEND_FLAGS and NVCC_APPEND_FLAGS. BSSN_CPU=0 leaves the CPU part out, BSSN_CPU=1 makes its failure
fatal; BSSN_CUDA likewise. After a change of csrc in an editable install: `pip install -e .` again.
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

# cudart is linked in statically, and it alone looks for the driver, at its first call: the module loads where there is
# none, and does not care which cudart torch has brought.
NVCC_FLAGS = (
    *("-O3", "-std=c++17", "--expt-relaxed-constexpr"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"),
    "-Xfatbin=-compress-all",  # code for all architectures is some six times larger otherwise
)
NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
# The kernels need C++17 and __grid_constant__ parameters; older toolkits than the first for Hopper were never tried.
OLDEST_NVCC = (12, 0)
# What is compiled for, as far as nvcc knows it, and PTX for the newest. None is older than the kernels are made for.
CUDA_ARCHS = (75, 80, 86, 89, 90, 100, 120)
# The names that TORCH_CUDA_ARCH_LIST may have, with torch's meaning (the first seven: older than CUDA_ARCHS).
NAMED_ARCHS = {
    **dict.fromkeys(("Kepler", "Kepler+Tesla", "Maxwell", "Maxwell+Tegra", "Pascal", "Volta", "Volta+Tegra"), "7.0"),
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}

# nvcc knows gcc's options about dependencies.
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
    archs: tuple[str, ...] = ()  # machine code, as "90"
    ptx: tuple[str, ...] = ()

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
        said = (getattr(error, "stderr", None) or "").strip().splitlines()[-1:]
        why = ": ".join([str(error), *said])
        raise Unavailable(f"the C++ compiler {shlex.join(command)!r} does not run: {why}") from None
    return command, version.partition("\n")[0].strip()


def accepts(compiler: list[str], flags: Sequence[str]) -> bool:
    """Whether the compiler knows these flags (an old one may not know an instruction set)."""
    probe = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(probe, capture_output=True).returncode == 0


def check_platform() -> str:
    platform = sysconfig.get_platform()
    if platform not in ISAS:
        raise Unavailable(f"the compiled part is made for {' and '.join(ISAS)}, and this is {platform}")
    return platform


def plan_cpu(objects: Path, target: Path) -> Plan:
    """csrc/cpu: every source but bindings.cpp is compiled once per instruction set, and bindings.cpp, which chooses
    among them at run time, once at the baseline."""
    platform = check_platform()
    bindings = CSRC / "cpu" / "bindings.cpp"
    if not bindings.exists():
        raise Unavailable("csrc/cpu/bindings.cpp is missing from the source tree")
    compiler, version = find_compiler()
    isas = {isa: flags for isa, flags in ISAS[platform].items() if not flags or accepts(compiler, flags)}
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


def plan_cuda(objects: Path, target: Path) -> Plan:
    """csrc/cuda: every .cu is compiled once, for all architectures, and bindings.cpp by the host's compiler."""
    check_platform()
    bindings, kernels = CSRC / "cuda" / "bindings.cpp", sorted((CSRC / "cuda").glob("*.cu"))
    if not kernels or not bindings.exists():
        raise Unavailable("csrc has no CUDA source" if not kernels else "csrc/cuda/bindings.cpp is missing")
    nvcc, release = find_nvcc()
    includes, cudart = cuda_paths(nvcc)
    archs, ptx = cuda_archs(nvcc, release)
    compiler, version = find_compiler()
    before, after = (shlex.split(os.environ.get(name, "")) for name in NVCC_VARIABLES)
    flags = [*before, *NVCC_FLAGS, *after]
    if not any(flag.startswith(("-ccbin", "--compiler-bindir")) for flag in flags):
        # Of a CXX like "ccache g++ -m64" the word that nvcc takes.
        words = [word for word in compiler if not word.startswith("-")]
        flags += ["-ccbin", os.environ.get("NVCC_CCBIN") or words[-1]]

    plan = Plan(target, compiler=f"nvcc {release} with {version}", flags=shlex.join(flags), archs=archs, ptx=ptx)
    host, device = (shlex.join(words).replace("$", "$$") for words in (compiler, [nvcc]))
    host_flags = [*COMPILE_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), f"-I{CSRC}"]
    headers = [*binding_includes(), *includes]
    linked = [plan.add(objects / "cuda" / "bindings.o", "compile", [bindings], host, [*host_flags, *headers])]
    for kernel in kernels:
        output = objects / "cuda" / f"{kernel.stem}.cu.o"
        linked.append(plan.add(output, "compile", [kernel], device, [*flags, f"-I{CSRC}", *code_flags(archs, ptx)]))
    # Nothing of cudart is to be seen from outside, or torch's own could take its place.
    libraries = [str(cudart), "-Wl,--exclude-libs,ALL", "-ldl", "-lpthread", "-lrt"]
    plan.add(target, "link", linked, host, [*LINK_FLAGS, *libraries, *shlex.split(os.environ.get("LDFLAGS", ""))])
    return plan


def find_nvcc() -> tuple[str, str]:
    """The CUDA compiler and its release. CUDA_HOME (or CUDA_PATH), where it is set, alone says where nvcc is; else PATH
    or NVIDIA's packages on PyPI have it. An isolated build does not have the environment that pip runs in on its path,
    and so that one is looked at by its name."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        candidates = [os.path.join(home, "bin", "nvcc")]
    else:
        folders = dict.fromkeys([*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        packages = [str(nvcc) for folder in folders if folder for nvcc in Path(folder).glob("nvidia/*/bin/nvcc")]
        candidates = [*filter(None, [shutil.which("nvcc")]), *packages]
    reasons = []
    for nvcc in candidates:
        try:
            version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
            release = re.search(r"release (\d+)\.(\d+)", version)
        except (OSError, subprocess.CalledProcessError) as error:
            reasons.append(f"{nvcc} does not run: {error}")
            continue
        if release and (int(release[1]), int(release[2])) >= OLDEST_NVCC:
            return nvcc, f"{release[1]}.{release[2]}"
        found, oldest = release[0] if release else "of an unknown release", ".".join(map(str, OLDEST_NVCC))
        reasons.append(f"{nvcc} is {found}, and the kernels need CUDA {oldest}")
    nowhere = "no nvcc was found (looked at CUDA_HOME, PATH and the PyPI package nvidia-cuda-nvcc)"
    raise Unavailable("; ".join(reasons) or nowhere)


def cuda_paths(nvcc: str) -> tuple[list[str], Path]:
    """Headers of this nvcc's toolkit, as system headers, and its static cudart. Only nvcc knows its layout (NVIDIA's, a
    distribution's, conda's), and a dry run tells; but PyPI's nvcc 13.0 names lib64 where its packages have lib."""
    dry_run = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    said = subprocess.run(dry_run, capture_output=True, text=True).stderr
    facts = {name: shlex.split(value) for name, value in re.findall(r"^#\$ (\w+)=(.*)$", said, re.MULTILINE)}
    words = [*facts.get("INCLUDES", []), *facts.get("SYSTEM_INCLUDES", [])]
    folders = [os.path.realpath(word.removeprefix("-I")) for word in words if word != "-isystem"]
    includes = [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]
    top = facts.get("TOP", [os.path.join(os.path.dirname(nvcc), "..")])[0]
    libraries = [word[2:] for word in facts.get("LIBRARIES", []) if word.startswith("-L")]
    libraries += [os.path.join(top, "lib"), os.path.join(top, "lib64")]

    def find(name: str, folders: Iterable[str], package: str) -> Path:
        for folder in folders:
            if os.path.exists(os.path.join(folder, name)):
                return Path(folder, name)
        raise Unavailable(f"{nvcc} has no {name} beside it (PyPI has that in {package})")

    find("cuda_runtime_api.h", [*includes, "/usr/include"], "nvidia-cuda-runtime")
    find("nv/target", [*includes, "/usr/include"], "nvidia-cuda-cccl")  # cuda_fp16.h includes it
    cudart = find("libcudart_static.a", libraries, "nvidia-cuda-runtime")
    return [f"-isystem{folder}" for folder in includes if folder != "/usr/include"], cudart.resolve()


def cuda_archs(nvcc: str, release: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Architectures to make machine code for, and those to make PTX for, as TORCH_CUDA_ARCH_LIST says or else all."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    known = sorted({int(arch) for arch in re.findall(r"\bsm_(\d+)\b", listed)})
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if wanted.strip("; "):
        codes, ptx = parse_archs(wanted)
    else:
        codes = [arch for arch in CUDA_ARCHS if arch in known]
        ptx = codes[-1:]
    for arch in codes:
        if arch not in known:
            knows = ", ".join(f"{known_arch / 10:.1f}" for known_arch in known)
            raise CompileError(f"TORCH_CUDA_ARCH_LIST: nvcc {release} does not know {arch / 10:.1f}, only {knows}")
    if not codes:
        raise Unavailable(f"TORCH_CUDA_ARCH_LIST={wanted!r} names no architecture from {CUDA_ARCHS[0] / 10} on")
    return tuple(map(str, codes)), tuple(map(str, ptx))


def code_flags(archs: Sequence[str], ptx: Sequence[str]) -> list[str]:
    """nvcc's words for machine code and PTX. The machine code of a generation is made from one PTX, that of its oldest
    chip (sm_89 by way of compute_80), so that nvcc's first half, which takes 40 % of the time, runs once for all."""
    oldest = {arch[:-1]: arch for arch in reversed(archs)}
    code = [f"-gencode=arch=compute_{oldest[arch[:-1]]},code=sm_{arch}" for arch in archs]
    return [*code, *(f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ptx)]


def parse_archs(wanted: str) -> tuple[list[int], list[int]]:
    """The two lists that torch would read from this text. Architectures older than ours are left out: the list of an
    image is made for all that is built there. Of "9.0a" the 9.0 is meant: the kernels have nothing that is for 9.0a."""
    codes, ptx = set(), set()
    for item in filter(None, re.split(r"[;\s]+", wanted)):
        for arch in NAMED_ARCHS.get(item, item).split(";"):
            match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
            if not match:
                raise CompileError(
                    "TORCH_CUDA_ARCH_LIST: expected architectures like 8.0, 9.0+PTX or Hopper, separated by ; or "
                    f"spaces, got {item!r} in {wanted!r}"
                )
            number = int(match[1] + match[2])
            if number >= CUDA_ARCHS[0]:
                codes.add(number)
                ptx.update([number] if match[3] else [])
    return sorted(codes), sorted(ptx)


def binding_includes() -> list[str]:
    """Headers of Python and pybind11, as system headers: their warnings are not ours."""
    try:
        import pybind11
    except ImportError:
        raise Unavailable("pybind11 is not installed in the build environment") from None
    paths = (pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude"))
    return [f"-isystem{path}" for path in dict.fromkeys(paths)]


def run_ninja(folder: Path, plan: Plan) -> None:
    """Build one module, echoing what ninja says; the reason of a failure is the compiler's first complaint."""
    command, given = [find_ninja(), "-C", str(folder), str(plan.target)], os.environ.get("MAX_JOBS", "")
    if given:
        if not re.fullmatch(r"[1-9]\d*", given):
            raise CompileError(f"MAX_JOBS must be a number from 1 on, got {given!r}")
        command += ["-j", given]
    output = []
    environment = nvcc_environment(plan, int(given) if given else len(os.sched_getaffinity(0)))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            output.append(line.strip().replace(f"{ROOT}{os.sep}", ""))
    if process.returncode:
        wrong = r"\berror\b|\bfatal\b|undefined reference"
        complaints = [line for line in output if re.search(wrong, line)] or output[-1:]
        raise Unavailable(f"it did not compile: {' '.join(complaints[:1])[:300]}")


def nvcc_environment(plan: Plan, jobs: int) -> dict[str, str]:
    """The environment in which ninja runs. The flags of nvcc's own variables stand in the commands, where ninja sees
    them change. Jobs beyond the number of kernels go to each nvcc, and by the environment: another number compiles
    nothing again."""
    environment = {name: value for name, value in os.environ.items() if name not in NVCC_VARIABLES}
    kernels = sum(".cu.o: compile" in statement for statement in plan.statements)
    if kernels and not re.search(r"(^|\s)(--threads|-t)\b", plan.flags):
        environment["NVCC_APPEND_FLAGS"] = f"--threads={max(1, jobs // kernels)}"
    return environment


def find_ninja() -> str:
    found = shutil.which("ninja")
    if found:
        return found
    try:
        import ninja
    except ImportError:
        raise Unavailable("ninja is not installed in the build environment") from None
    return os.path.join(ninja.BIN_DIR, "ninja")


@dataclass(frozen=True)
class Part:
    """What a module is called in its switch (BSSN_CPU) and its facts (CPU_REASON), who plans it, and its own facts."""

    name: str
    plan: Callable[[Path, Path], Plan]
    facts: tuple[str, ...]
    usual: bool  # whether one expects it on every machine, so that leaving it out deserves a warning


PARTS = {
    "bssn_kernels._cpu": Part("CPU", plan_cpu, ("isas",), usual=True),
    "bssn_kernels._cuda": Part("CUDA", plan_cuda, ("archs", "ptx"), usual=False),
}


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
        part = PARTS[ext.name]
        target = objects / self.get_ext_filename(ext.name)
        try:
            if switch(f"BSSN_{part.name}") == "0":
                raise Unavailable(f"BSSN_{part.name}=0 left it out of the build")
            return part.plan(objects, target)
        except Unavailable as why:
            return Plan(target, reason=str(why))

    def build(self, name: str, plan: Plan, objects: Path) -> None:
        """Bring the module to the build folder; or, when that fails, see that none from an earlier build is there."""
        part, built = PARTS[name], Path(self.get_ext_fullpath(name))
        warn = part.usual or not plan.reason  # that nvcc is not there is no news; that it fails is
        try:
            if plan.reason:
                raise Unavailable(plan.reason)
            run_ninja(objects, plan)
        except Unavailable as why:
            if switch(f"BSSN_{part.name}") == "1":
                raise CompileError(f"{name} is required by BSSN_{part.name}=1, but {why}") from None
            plan.reason = str(why)
            built.unlink(missing_ok=True)
            said = "warning: bssn_kernels is installed WITHOUT" if warn else "note: bssn_kernels is installed without"
            print(f"{said} {name}: {why}", file=sys.stderr, flush=True)
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
        for fact in ("reason", "compiler", "flags", *PARTS[name].facts):
            lines.append(f"{PARTS[name].name}_{fact.upper()} = {getattr(plan, fact)!r}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(name, sources=[], optional=True) for name in PARTS],
        cmdclass={"build_ext": BuildParts},
    )
