"""From source tree to import: the build with and without a compiler, what an import costs, what it leaves alone.

The builds run in a copy of the tree, without isolation and without network. Most have a stand-in for csrc: they are
about setup.py, whatever the kernels look like.
"""

import importlib.metadata
import os
import re
import shutil
import statistics
import sys
import zipfile
from pathlib import Path

import pytest
from builds import ROOT, build, built_facts, compiled, make_tree, python, run

import bssn_kernels
from bssn_kernels.__main__ import changed_since_build

COMPILED = sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64") and shutil.which("g++")
needs_compiler = pytest.mark.skipif(not COMPILED, reason="no g++, or a platform that the compiled part is not made for")

BINDINGS = """
#include <pybind11/pybind11.h>
#include "names.h"
namespace bssn {
const char* name_plain(); int threads_plain();
#ifdef BSSN_HAVE_AVX512
const char* name_avx512();
#endif
}
PYBIND11_MODULE(_cpu, m) {
  m.def("threads", &bssn::threads_plain);
  m.def("plain", &bssn::name_plain);
#ifdef BSSN_HAVE_AVX512
  m.def("avx512", &bssn::name_avx512);
#endif
}
"""
KERNEL = """
#include "names.h"
#include "kernel.h"
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
namespace bssn {
const char* JOIN(name_, BSSN_ISA)() { return TEXT(BSSN_ISA); }
int JOIN(threads_, BSSN_ISA)() {
  int threads = 0;
  GOMP_parallel([](void* n) { __atomic_fetch_add(static_cast<int*>(n), 1, __ATOMIC_RELAXED); }, &threads, 0, 0);
  return threads;
}
}
"""
NAMES = """
#pragma once
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
"""


@pytest.fixture
def tree(tmp_path):
    """A source tree with a stand-in for csrc/cpu, and none for csrc/cuda."""
    cpu = {"kernel.h": "", "normalize.cpp": KERNEL, "bindings.cpp": BINDINGS}
    return make_tree(tmp_path / "tree", {"names.h": NAMES, **{f"cpu/{name}": text for name, text in cpu.items()}})


@pytest.fixture
def real_tree(tree):
    """The same with the package itself, as it is in a clean clone."""
    shutil.rmtree(tree / "bssn_kernels")
    made = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py")
    shutil.copytree(ROOT / "bssn_kernels", tree / "bssn_kernels", ignore=made)
    return tree


def modules(tree):
    return list((tree / "bssn_kernels").glob("_cpu*"))


def reason(tree):
    return built_facts(tree)["CPU_REASON"]


@needs_compiler
def test_build_compiles_every_instruction_set_and_uses_the_openmp_of_torch(tree):
    result = build(tree)
    assert result.returncode == 0 and reason(tree) == "", result.stdout
    assert len(modules(tree)) == 1
    code = (
        "import re, torch\nfrom bssn_kernels import _build_info, _cpu\n"
        "assert all(getattr(_cpu, isa, lambda: isa)() == isa for isa in _build_info.CPU_ISAS)\n"
        "torch.set_num_threads(2)\n"
        "libraries = set(re.findall(r'/(lib[gi]?omp[^/ ]*)$', open('/proc/self/maps').read(), re.MULTILINE))\n"
        "print(_cpu.threads(), len(libraries), *_build_info.CPU_ISAS)"
    )
    isas = "plain avx2 avx512" if os.uname().machine == "x86_64" else "plain"
    assert python(code, tree.parent, PYTHONPATH=str(tree)) == f"2 1 {isas}"


@needs_compiler
def test_a_compiler_that_takes_no_probe_builds_the_plain_part(tree, tmp_path):
    """Flags are tried out for instruction sets alone; what every compiler must take, compiling tells."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fsyntax-only*) exit 1 ;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    result = build(tree, CXX=str(compiler))
    assert result.returncode == 0 and reason(tree) == "" and len(modules(tree)) == 1, result.stdout
    assert built_facts(tree)["CPU_ISAS"] == ("plain",)


@needs_compiler
def test_build_makes_only_what_changed(tree):
    assert {"bindings", "normalize.plain"} <= compiled(build(tree, MAX_JOBS="2"))
    assert compiled(build(tree, MAX_JOBS="2")) == set()
    (tree / "csrc" / "cpu" / "kernel.h").write_text("// changed")
    changed = compiled(build(tree, MAX_JOBS="2"))
    assert "normalize.plain" in changed
    assert "bindings" not in changed  # (new isolated environments move pybind11, which only bindings.o knows)


@needs_compiler
def test_wheel_holds_the_module_and_no_sources(tree):
    code = "from setuptools import build_meta; build_meta.build_wheel('wheels')"
    result = run([sys.executable, "-c", code], tree, CXXFLAGS="-O0")
    assert result.returncode == 0, result.stdout
    (wheel,) = (tree / "wheels").glob("bssn_kernels-1.2.3-*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert len(names) == 3 and {"bssn_kernels/__init__.py", "bssn_kernels/_build_info.py"} < set(names)


def test_an_editable_install_is_found_beside_its_checkout(tree):
    """A path, not an import hook: in the folder above a checkout named bssn_kernels, Python finds the checkout itself
    as an empty namespace package, which a hook comes too late to prevent."""
    build(tree, BSSN_CPU="0")
    (wheel,) = (tree / "wheels").glob("*.whl")
    assert zipfile.ZipFile(wheel).read("__editable__.bssn_kernels-1.2.3.pth").decode().split() == [str(tree)]


@needs_compiler
def test_a_failing_compile_leaves_the_module_out_and_an_old_one_too(tree):
    suffix = python("import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))", tree)
    (tree / "bssn_kernels" / f"_cpu{suffix}").write_text("from an earlier build")
    (tree / "csrc" / "cpu" / "normalize.cpp").write_text("#error made to fail\n")
    result = build(tree)
    assert result.returncode == 0, result.stdout
    assert f"warning: bssn_kernels is installed WITHOUT bssn_kernels._cpu: {reason(tree)}" in result.stdout
    assert re.match(r"it did not compile: csrc/cpu/normalize.cpp:1:2: error: .*made to fail", reason(tree))
    assert not modules(tree)


@pytest.mark.parametrize(
    "env, why",
    [
        ({"CXX": "/nowhere/g++ -m64"}, "the C++ compiler '/nowhere/g++ -m64' does not run"),
        ({"PATH": "/nowhere"}, "no C++ compiler was found on PATH"),
        ({"BSSN_CPU": "0"}, "BSSN_CPU=0 left it out of the build"),
    ],
)
def test_a_build_without_a_compiler_says_why(tree, env, why):
    result = build(tree, **env)
    assert result.returncode == 0, result.stdout
    assert "installed WITHOUT bssn_kernels._cpu" in result.stdout
    assert why in reason(tree)
    assert not modules(tree)


@pytest.mark.parametrize(
    "value, message",
    [("1", "required by BSSN_CPU=1, but the C++ compiler"), ("yes", "BSSN_CPU must be 0 (leave out) or 1 (required)")],
)
def test_a_build_that_must_compile_fails(tree, value, message):
    result = build(tree, BSSN_CPU=value, CXX="/nowhere/g++")
    assert result.returncode != 0
    assert message in result.stdout


def test_install_without_a_compiler(real_tree):
    """pip's own way, then life without the compiled part: import, doctor, a layer by the reference, strictness."""
    site, elsewhere = real_tree.parent / "site", real_tree.parent
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-index", "--no-build-isolation"]
    result = run([*pip, "--target", site, real_tree], elsewhere, PATH="/nowhere")
    assert result.returncode == 0, result.stdout
    assert "installed WITHOUT bssn_kernels._cpu: no C++ compiler was found" in result.stdout
    assert not modules(site)

    doctor = run([sys.executable, "-m", "bssn_kernels", "doctor"], elsewhere, PYTHONPATH=str(site))
    assert doctor.returncode == 0, doctor.stdout
    assert str(site) in doctor.stdout
    assert re.search(r"cpu +cannot run:\s+- .*no C\+\+ compiler was found", doctor.stdout)
    assert re.search(r"reference +ready", doctor.stdout)

    layer = "import torch, bssn_kernels as bk; bk.spectral_norm(torch.nn.Linear(3, 4))(torch.ones(2, 3)); print('ran')"
    assert python(f"{layer}; {layer}", elsewhere, PYTHONPATH=str(site)).count("falls back to the slow reference") == 1
    strict = run([sys.executable, "-c", layer], elsewhere, PYTHONPATH=str(site), BSSN_STRICT="1")
    assert strict.returncode != 0 and "BSSN_STRICT" in strict.stdout and "no C++ compiler" in strict.stdout


def test_import_is_quick(tmp_path):
    """At most 100 ms beyond `import torch`, taken within one process, where nothing but our own import lies between."""
    code = "import time, torch\nbegin = time.perf_counter()\nimport bssn_kernels\nprint(time.perf_counter() - begin)"
    path = {"PYTHONPATH": str(Path(bssn_kernels.__file__).parents[1])}
    python(code, tmp_path, **path)  # writes the bytecode
    seconds = [float(python(code, tmp_path, **path).split()[-1]) for _ in range(7)]
    assert statistics.median(seconds) < 0.1, seconds


def test_import_does_nothing_else(tmp_path):
    """No other program is started (a compiler), no library is looked for (a driver), no triton or numpy comes in."""
    code = (
        "import sys, torch\nbefore, seen = set(sys.modules), []\n"
        "watched = ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'ctypes.dlopen')\n"
        "sys.addaudithook(lambda event, args: seen.append((event, args)) if event in watched else None)\n"
        "import bssn_kernels\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not seen, seen\n"
        "assert not new & {'triton', 'numpy', 'matplotlib', 'sklearn'}, new\n"
        "assert not torch.cuda.is_initialized()\n"
        "print('bssn_kernels.bench' in sys.modules, 'torch._dynamo' in set(sys.modules) - before)"
    )
    path = str(Path(bssn_kernels.__file__).parents[1])
    assert python(code, tmp_path, PYTHONPATH=path).splitlines()[-1] == "False False"


def test_the_module_under_test_is_built_from_these_sources():
    """An editable install does not follow csrc by itself: without this, the tests could pass on an old module."""
    changed = changed_since_build()
    assert not changed, f"run pip install -e . again: {changed} was changed after the build"


def test_requirements():
    """Nothing but torch at run time, without an upper bound; nothing but the three tools at build time."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dependencies"] == ["torch>=2.6"]
    names = [re.match(r"\w+", requirement)[0] for requirement in project["build-system"]["requires"]]
    assert sorted(names) == ["ninja", "pybind11", "setuptools"]
    assert (ROOT / "constraints.txt").read_text().split() == ["torch==2.13.0"]


def test_one_version():
    assert importlib.metadata.version("bssn_kernels") == bssn_kernels.__version__
