"""Source trees to build in a test: without isolation and without network, whatever the environment says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Where nvcc is (CUDA_HOME) steers nothing: some machines have no other way to it.
STEERING = {"CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS", "BSSN_CPU", "BSSN_CUDA", "TORCH_CUDA_ARCH_LIST"}
STEERING |= {"NVCC_APPEND_FLAGS", "BSSN_STRICT", "PYTHONDONTWRITEBYTECODE"}


def run(command, cwd, **env):
    """Run in an environment without the variables that steer a build, and with these."""
    env = {name: value for name, value in os.environ.items() if name not in STEERING} | env
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def python(code, cwd, **env):
    """Run Python code far from the checkout; its output."""
    result = run([sys.executable, "-c", code], cwd, **env)
    assert result.returncode == 0, result.stdout
    return result.stdout.strip()


def make_tree(folder, csrc):
    """A source tree with a stand-in for the package, and these texts by name for csrc."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    files = {f"csrc/{name}": text for name, text in csrc.items()}
    for name, text in {"bssn_kernels/__init__.py": '__version__ = "1.2.3"\n', **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def build(tree, **env):
    """Build as an editable install does."""
    env.setdefault("CXXFLAGS", "-O0")
    code = "from setuptools import build_meta; build_meta.build_editable('wheels')"
    return run([sys.executable, "-c", code], tree, **env)


def built_facts(tree):
    """What the generated file says."""
    facts = {}
    exec((tree / "bssn_kernels" / "_build_info.py").read_text(), facts)
    return facts


def compiled(result):
    """Objects that this build made."""
    assert result.returncode == 0, result.stdout
    return set(re.findall(r"compile .*/([\w.]+)\.o$", result.stdout, re.MULTILINE))
