"""The build of the CUDA part: how nvcc is found, what is compiled and for which architectures, and life without it.

As in test_install.py, a copy of the tree with a stand-in for csrc is built, here without the CPU part.
"""

import importlib.util
import itertools
import os
import re
import shutil
import stat
import sys
import sysconfig
from pathlib import Path

import pytest
from builds import ROOT, build, built_facts, compiled, make_tree, python, run
from setuptools.errors import CompileError

HEADER = "#pragma once\n#define FACTOR 2\n"
KERNEL = """
#include "factor.h"
#if __CUDA_ARCH__ >= 900
#include "cuda/sm_90.h"
#endif
namespace bssn {
__global__ void scale(float* x) { x[threadIdx.x] *= FACTOR; }
int factor() { return FACTOR; }
cudaError_t launch() { scale<<<1, 32>>>(nullptr); return cudaGetLastError(); }
}
"""
OTHER = "namespace bssn { __global__ void clear(float* x) { x[threadIdx.x] = 0; } }\n"
BINDINGS = """
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
namespace bssn { int factor(); cudaError_t launch(); }
PYBIND11_MODULE(_cuda, m) {
  m.def("factor", &bssn::factor);
  m.def("launch", [] { return cudaGetErrorName(bssn::launch()); });
  m.def("runtime", [] { int version = 0; cudaRuntimeGetVersion(&version); return version; });
}
"""
CSRC = {"factor.h": HEADER, "cuda/sm_90.h": "", "cuda/scale.cu": KERNEL, "cuda/other.cu": OTHER}
CSRC["cuda/bindings.cpp"] = BINDINGS


def load_setup():
    """setup.py as a module; it builds nothing when it is imported."""
    spec = importlib.util.spec_from_file_location("setup_of_bssn_kernels", ROOT / "setup.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_setup()


def missing():
    """Why nothing can be compiled for CUDA here."""
    try:
        setup.check_platform()
        setup.cuda_paths(setup.find_nvcc()[0])
        setup.find_compiler()
    except setup.Unavailable as why:
        return str(why)
    return ""


MISSING = missing()
needs_nvcc = pytest.mark.skipif(bool(MISSING), reason=MISSING or "nvcc is here")


def build_cuda(tree, **env):
    return build(tree, **{"BSSN_CPU": "0", "TORCH_CUDA_ARCH_LIST": "7.5 9.0+PTX", **env})


@pytest.fixture
def tree(tmp_path):
    """A tree for builds whose module nobody imports: pybind11 takes most of the time."""
    return make_tree(tmp_path / "tree", {**CSRC, "cuda/bindings.cpp": ""})


@pytest.fixture(scope="module")
def built_tree(tmp_path_factory):
    """A tree with the module built for two architectures, by two jobs; no test may change it."""
    tree = make_tree(tmp_path_factory.mktemp("cuda") / "tree", CSRC)
    result = build_cuda(tree, BSSN_CUDA="1", MAX_JOBS="2", NVCC_APPEND_FLAGS="-Werror all-warnings")
    assert compiled(result) == {"bindings", "scale.cu", "other.cu"}
    return tree


def module_of(tree):
    (module,) = (tree / "bssn_kernels").glob("_cuda*.so")
    return module


@needs_nvcc
def test_the_module_imports_without_a_driver_and_brings_its_own_cudart(built_tree):
    """That no library of CUDA is mapped, shows that none was needed, with or without a driver on this machine."""
    code = (
        "from bssn_kernels import _cuda\n"
        "print(_cuda.factor(), _cuda.runtime() // 1000, 'libcuda' in open('/proc/self/maps').read())\n"
        "print(_cuda.launch())"
    )
    facts = built_facts(built_tree)
    major = re.match(r"nvcc (\d+)\.\d+ with ", facts["CUDA_COMPILER"])[1]
    said, error = python(code, built_tree.parent, PYTHONPATH=str(built_tree), CUDA_VISIBLE_DEVICES="").splitlines()
    assert said == f"2 {major} False"
    assert error in ("cudaErrorNoDevice", "cudaErrorInsufficientDriver")
    exported = run(["nm", "-D", "--defined-only", module_of(built_tree)], built_tree).stdout
    assert "PyInit__cuda" in exported and "cuda" not in exported.replace("PyInit__cuda", "")


def find_cuobjdump():
    """Of the toolkit, or Triton's own."""
    beside = Path(setup.find_nvcc()[0]).with_name("cuobjdump")
    triton = importlib.util.find_spec("triton")
    own = [Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"] if triton else []
    found = next(filter(os.path.exists, [beside, *own]), None) or shutil.which("cuobjdump")
    return found or pytest.skip("there is no cuobjdump, neither beside nvcc nor on PATH nor Triton's")


@needs_nvcc
def test_code_is_there_for_each_architecture_that_is_recorded(built_tree):
    facts = built_facts(built_tree)
    assert (facts["CUDA_REASON"], facts["CUDA_ARCHS"], facts["CUDA_PTX"]) == ("", ("75", "90"), ("90",))
    tool = find_cuobjdump()
    listed = {kind: run([tool, f"--list-{kind}", module_of(built_tree)], built_tree).stdout for kind in ("elf", "ptx")}
    found = {kind: sorted(re.findall(r"\bsm_(\d+)\.", text)) for kind, text in listed.items()}
    assert found == {"elf": ["75", "75", "90", "90"], "ptx": ["90", "90"]}, listed  # of two sources each


@needs_nvcc
def test_a_build_makes_only_what_changed(tree):
    """A header that one architecture alone sees counts, another number of jobs does not, and nvcc's variables do."""

    def made(**env):
        return compiled(build_cuda(tree, TORCH_CUDA_ARCH_LIST="9.0", **env))

    assert made(MAX_JOBS="2") == {"bindings", "scale.cu", "other.cu"}
    assert made(MAX_JOBS="6") == set()
    (tree / "csrc/cuda/sm_90.h").write_text("// changed\n")
    assert made() == {"scale.cu"}
    assert made(NVCC_APPEND_FLAGS="-DX") == {"scale.cu", "other.cu"}


@needs_nvcc
def test_a_failing_compile_is_loud_and_leaves_no_old_module(tree):
    old = tree / "bssn_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    old.write_text("from an earlier build")
    (tree / "csrc/cuda/scale.cu").write_text("#error made to fail\n")
    result = build_cuda(tree, TORCH_CUDA_ARCH_LIST="9.0")
    assert result.returncode == 0, result.stdout
    reason = built_facts(tree)["CUDA_REASON"]
    assert f"warning: bssn_kernels is installed WITHOUT bssn_kernels._cuda: {reason}" in result.stdout
    assert re.match(r"it did not compile: csrc/cuda/scale.cu:1:2: error: .*made to fail", reason)
    assert not old.exists()


@needs_nvcc
@pytest.mark.parametrize("wanted, named", [("8.0;ninety", "'ninety'"), ("99.0", "does not know 99.0")])
def test_a_bad_list_of_architectures_fails_the_build(tree, wanted, named):
    result = build_cuda(tree, TORCH_CUDA_ARCH_LIST=wanted)
    assert result.returncode != 0
    assert re.search(rf"TORCH_CUDA_ARCH_LIST: .*{named}", result.stdout), result.stdout


@pytest.mark.parametrize(
    "env, remove, why",
    [
        ({"CUDA_HOME": "/nowhere"}, [], "/nowhere/bin/nvcc does not run"),
        ({"BSSN_CUDA": "0"}, [], "BSSN_CUDA=0 left it out of the build"),
        ({}, ["scale.cu", "other.cu"], "csrc has no CUDA source"),
        ({}, ["bindings.cpp"], "csrc/cuda/bindings.cpp is missing"),
    ],
)
def test_an_install_without_the_cuda_part_goes_on_and_says_why(tree, env, remove, why):
    """In one calm line: most machines have no nvcc."""
    for name in remove:
        (tree / "csrc/cuda" / name).unlink()
    result = build_cuda(tree, **env)
    assert result.returncode == 0, result.stdout
    reason = built_facts(tree)["CUDA_REASON"]
    assert why in reason
    (line,) = re.findall(r"^.*bssn_kernels\._cuda.*$", result.stdout, re.MULTILINE)
    assert line == f"note: bssn_kernels is installed without bssn_kernels._cuda: {reason}"
    assert not list((tree / "bssn_kernels").glob("_cuda*"))


@pytest.mark.parametrize(
    "value, message",
    [
        ("1", "required by BSSN_CUDA=1, but /nowhere/bin/nvcc does not run"),
        ("yes", "BSSN_CUDA must be 0 (leave out) or 1 (required)"),
    ],
)
def test_a_build_that_must_have_cuda_fails_without_it(tree, value, message):
    result = build_cuda(tree, BSSN_CUDA=value, CUDA_HOME="/nowhere")
    assert result.returncode != 0
    assert message in result.stdout


def fake_nvcc(folder, release="13.0", dry_run=""):
    """A program that answers as nvcc does."""
    folder.mkdir(parents=True)
    program = folder / "nvcc"
    dry = f"*--dryrun*) cat <<'END' >&2\n{dry_run}\nEND\n;;"
    program.write_text(f"#!/bin/sh\ncase \"$*\" in {dry} *) echo tools, release {release}, V1;; esac\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Three empty places to look for nvcc: CUDA_HOME (not set), one folder of PATH, one of packages."""
    names = {name: tmp_path / name for name in ("home", "path", "site")}
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{names['path']}:/bin:/usr/bin")
    monkeypatch.setattr(shutil, "which", lambda name, which=shutil.which: which(name, path=str(names["path"])))
    monkeypatch.setattr(sys, "path", ["", "/nowhere"])
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(names["site"]))
    return names


def test_nvcc_is_looked_for_in_three_places(places, monkeypatch):
    with pytest.raises(setup.Unavailable, match="^no nvcc was found .looked at CUDA_HOME, PATH and the PyPI package"):
        setup.find_nvcc()
    on_pypi = fake_nvcc(places["site"] / "nvidia" / "cu13" / "bin")
    assert setup.find_nvcc() == (str(on_pypi), "13.0")
    on_path = fake_nvcc(places["path"], "12.4")
    assert setup.find_nvcc() == (str(on_path), "12.4")
    monkeypatch.setenv("CUDA_HOME", str(places["home"]))
    with pytest.raises(setup.Unavailable, match="home/bin/nvcc does not run"):  # never another one than was named
        setup.find_nvcc()
    at_home = fake_nvcc(places["home"] / "bin")
    assert setup.find_nvcc()[0] == str(at_home)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("CUDA_PATH", str(places["home"]))
    assert setup.find_nvcc()[0] == str(at_home)


def test_an_nvcc_that_is_too_old_or_broken_is_passed_over(places):
    old = fake_nvcc(places["path"], "11.8")
    with pytest.raises(setup.Unavailable, match=r"path/nvcc is release 11\.8, and the kernels need CUDA 12\.0$"):
        setup.find_nvcc()
    good = fake_nvcc(places["site"] / "nvidia" / "cu13" / "bin")
    assert setup.find_nvcc()[0] == str(good)
    good.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(setup.Unavailable, match=r"11\.8.*; .*cu13/bin/nvcc does not run: .*exit status 3"):
        setup.find_nvcc()
    old.write_text("#!/bin/sh\necho something else\n")
    with pytest.raises(setup.Unavailable, match="path/nvcc is of an unknown release"):
        setup.find_nvcc()


@pytest.mark.parametrize("library", ["named/lib", "lib", "lib64"])
def test_headers_and_cudart_are_where_nvcc_says_or_beside_it(tmp_path, library):
    """What is missing is named with the package that has it."""
    said = f'#$ TOP={tmp_path}/bin/..\n#$ INCLUDES="-I{tmp_path}/bin/../include"  \n'
    said += f'#$ SYSTEM_INCLUDES="-isystem" "{tmp_path}/no/cccl" \n#$ LIBRARIES=  "-L{tmp_path}/named/lib"'
    nvcc = str(fake_nvcc(tmp_path / "bin", dry_run=said))
    needed = {
        "include/cuda_runtime_api.h": "nvidia-cuda-runtime",
        "include/nv/target": "nvidia-cuda-cccl",
        f"{library}/libcudart_static.a": "nvidia-cuda-runtime",
    }
    if any(os.path.exists(f"/usr/{name}") for name in needed):
        del needed["include/cuda_runtime_api.h"], needed["include/nv/target"]  # a distribution's toolkit has them there
        (tmp_path / "include").mkdir()
    for name, package in needed.items():
        missing = name.removeprefix("include/").removeprefix(f"{library}/")
        with pytest.raises(setup.Unavailable, match=rf"has no {missing} beside it \(PyPI has that in {package}\)"):
            setup.cuda_paths(nvcc)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert setup.cuda_paths(nvcc) == ([f"-isystem{tmp_path}/include"], tmp_path / library / "libcudart_static.a")


@pytest.mark.parametrize(
    "text, codes, ptx",
    [
        ("8.0;9.0+PTX", [80, 90], [90]),
        ("8.0 8.6", [80, 86], []),
        ("9.0+PTX 8.0+PTX; 12.0", [80, 90, 120], [80, 90]),
        ("Ampere;Hopper", [80, 86, 90], [86, 90]),
        ("Turing Ampere+Tegra Ada", [75, 87, 89], [75, 89]),
        ("9.0a 10.0f+PTX", [90, 100], [100]),
        ("6.1;7.0 7.5+PTX", [75], [75]),  # what is older than the kernels are made for is left out
        ("Volta;Pascal", [], []),
    ],
)
def test_architectures_are_read_as_torch_reads_them(text, codes, ptx):
    assert setup.parse_archs(text) == (codes, ptx)


@pytest.mark.parametrize("item", ["native", "8", "80", "sm_80", "8.0,9.0", "9.0+ptx", "hopper", "+PTX", "9.0b"])
def test_a_bad_architecture_is_named(item):
    with pytest.raises(CompileError, match=f"got '{re.escape(item)}' in"):
        setup.parse_archs(f"8.0;{item}")


def test_one_ptx_serves_the_chips_of_a_generation():
    flags = setup.code_flags(("75", "80", "86", "89", "90", "100", "120"), ("120",))
    pairs = [tuple(re.findall(r"=(?:arch=)?\w+_(\d+),code=(\w+)", flag)[0]) for flag in flags]
    machine = [("75", "sm_75"), ("80", "sm_80"), ("80", "sm_86"), ("80", "sm_89"), ("90", "sm_90"), ("100", "sm_100")]
    assert pairs == [*machine, ("120", "sm_120"), ("120", "compute_120")]
    assert setup.code_flags(("86", "90"), ("86",))[::2] == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_86,code=compute_86",
    ]


def test_architectures_are_those_that_the_toolkit_knows(tmp_path, monkeypatch):
    nvcc = fake_nvcc(tmp_path / "bin")
    nvcc.write_text("#!/bin/sh\nprintf 'sm_70\\nsm_75\\nsm_80\\nsm_87\\nsm_90\\nsm_90a\\n'\n")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert setup.cuda_archs(str(nvcc), "12.0") == (("75", "80", "90"), ("90",))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.7;9.0")
    assert setup.cuda_archs(str(nvcc), "12.0") == (("87", "90"), ())
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;12.0")
    with pytest.raises(CompileError, match=r"nvcc 12\.0 does not know 12\.0, only 7\.0, 7\.5, 8\.0, 8\.7, 9\.0$"):
        setup.cuda_archs(str(nvcc), "12.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0+PTX")
    with pytest.raises(setup.Unavailable, match=r"TORCH_CUDA_ARCH_LIST='7\.0\+PTX' names no architecture from 7\.5 on"):
        setup.cuda_archs(str(nvcc), "12.0")


def test_jobs_are_shared_by_ninja_and_nvcc(monkeypatch):
    """Never more compilers at once than jobs, as far as kernels go, and none idle that has a share."""
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-DX")
    statement = "build /objects/cuda/{}.cu.o: compile /csrc/{}.cu\n"
    for jobs, kernels in itertools.product(range(1, 9), range(1, 5)):
        plan = setup.Plan(Path("_cuda.so"), [statement.format(i, i) for i in range(kernels)], flags="-DX -O3")
        threads = int(setup.nvcc_environment(plan, jobs)["NVCC_APPEND_FLAGS"].removeprefix("--threads="))
        assert threads == 1 or threads * kernels <= jobs < (threads + 1) * kernels
    assert "NVCC_APPEND_FLAGS" not in setup.nvcc_environment(setup.Plan(Path("_cpu.so"), []), 8)
    plan.flags += " --threads 3"
    assert "NVCC_APPEND_FLAGS" not in setup.nvcc_environment(plan, 8)


def test_jobs_must_be_a_number(tmp_path, monkeypatch):
    for given in ("many", "0", "-1"):
        monkeypatch.setenv("MAX_JOBS", given)
        with pytest.raises(CompileError, match=f"MAX_JOBS must be a number from 1 on, got '{given}'"):
            setup.run_ninja(tmp_path, setup.Plan(tmp_path / "_cuda.so"))
