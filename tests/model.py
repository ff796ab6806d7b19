"""Builds the CUDA kernels for the model of a device in cuda_model/, on which they run without a GPU."""

import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = Path(__file__).resolve().parent / "cuda_model"
# Threads of the device are contexts that jump into each other, which _FORTIFY_SOURCE takes for an error.
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-fno-gnu-unique", "-U_FORTIFY_SOURCE")


def compiler() -> str | None:
    """A C++ compiler that knows _Float16, as g++ does from version 12 on, and nothing where there is none."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++")):
        if not shutil.which(name):
            continue
        command = [name, "-std=c++17", "-x", "c++", "-fsyntax-only", "-"]
        if subprocess.run(command, input="_Float16 x;", text=True, capture_output=True).returncode == 0:
            return name
    return None


def build(csrc: Path = ROOT / "csrc", folder: Path = ROOT / "build" / "cuda_model", *flags: str) -> Path:
    """The module, compiled where these sources and flags have none yet."""
    import pybind11

    sources = [*sorted(csrc.rglob("*")), *sorted(MODEL.rglob("*"))]
    digest = hashlib.sha256(repr((FLAGS, flags)).encode())
    for file in sources:
        if file.is_file():
            digest.update(file.read_bytes())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    target = folder / f"_cuda-{digest.hexdigest()[:16]}{suffix}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    includes = [MODEL, csrc]  # the model's device.cuh comes before the real one
    system = [pybind11.get_include(), sysconfig.get_path("include")]
    command = [
        *(compiler(), *FLAGS, *flags, *(f"-I{path}" for path in includes), *(f"-isystem{path}" for path in system)),
        *(csrc / "cuda" / "bindings.cpp", MODEL / "model.cpp", "-o", unfinished),
    ]
    done = subprocess.run([str(word) for word in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"the model of the CUDA kernels does not compile:\n{done.stdout[-4000:]}")
    os.replace(unfinished, target)
    return target
