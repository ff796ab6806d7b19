"""What the CUDA kernels compile to, read from the module of this installation: code, resources, accesses, order."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ptx import ACQUIRE, RELEASE, unordered
from sass import count, instructions, loops_around

from bssn_kernels.backends._compiled import build_reason

THREADS = 128
def resident(which: str, dtype: str, both: bool, arch: int) -> int:
    """Programs an SM for which registers are handed out; forward.cu and backward.cu have the reasons."""
    if which == "forward" and dtype == "h" and arch >= 120:
        return 2
    if which == "forward":
        return 3 if arch != 90 or (both and dtype == "d") else 4
    if arch >= 100:
        return 2
    return 3 if both or arch != 90 or dtype == "d" else 4


def module_file() -> Path | None:
    spec = importlib.util.find_spec("bssn_kernels._cuda")
    return spec and Path(spec.origin)


def cuobjdump() -> str | None:
    """That of the toolkit, or the one that comes with Triton."""
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    spec = importlib.util.find_spec("triton")
    if spec and spec.origin:
        places.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump") or next(filter(None, (shutil.which("cuobjdump", path=p) for p in places)), None)


MISSING = (build_reason("cuda") or "bssn_kernels._cuda is not there") if module_file() is None else ""
MISSING = MISSING or ("" if cuobjdump() else "no cuobjdump, of the CUDA toolkit or of Triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING) and os.environ.get("BSSN_STRICT") != "1", reason=MISSING or "it is built"),
]


def dump(*arguments: str) -> str:
    assert not MISSING, MISSING
    command = [cuobjdump(), *arguments, str(module_file())]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernel_of(mangled: str) -> tuple[str, str, bool] | None:
    """forward or backward, type of the weights (f, d, or h for both kinds of half precision), role 1."""
    found = re.search(r"\d+(forward|backward)_kernelI(f|d|6__half|13__nv_bfloat16)Lb([01])E", mangled)
    return found and (found[1], {"f": "f", "d": "d"}.get(found[2], "h"), found[3] == "1")


@pytest.fixture(scope="module")
def facts():
    from bssn_kernels import _build_info

    return _build_info


@pytest.fixture(scope="module", params=["80", "90", "100"])
def sass(request, facts) -> list[tuple[tuple[str, str, bool], str]]:
    """The kernels for one architecture."""
    if request.param not in facts.CUDA_ARCHS:
        pytest.skip(f"this build is for {', '.join(facts.CUDA_ARCHS)} alone")
    text = dump("--dump-sass", "--gpu-architecture", f"sm_{request.param}")
    parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)
    kernels = [(kernel_of(name), body) for name, body in zip(parts[1::2], parts[2::2]) if kernel_of(name)]
    assert len(kernels) == 16, "two kernels for four types, each with and without role 1"
    return kernels


def test_code_for_every_architecture(facts):
    found = set(re.findall(r"sm_(\d+)", dump("--list-elf")))
    assert found == set(facts.CUDA_ARCHS)
    assert set(re.findall(r"sm_(\d+)", dump("--list-ptx"))) == set(facts.CUDA_PTX)


def test_registers_and_shared_memory(facts):
    """So few that the programs meant to reside do; nothing is spilled, shared memory is asked for at the launch."""
    seen, arch = 0, 0
    pattern = re.compile(
        r"arch = sm_(?P<arch>\d+)|Function (?P<name>\S+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+)"
        r" SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)"
    )
    for found in pattern.finditer(dump("--dump-resource-usage")):
        arch = int(found["arch"] or arch)
        kernel = found["name"] and kernel_of(found["name"])
        if not kernel:
            continue
        registers, stack, shared, local = (int(found[x]) for x in ("registers", "stack", "shared", "local"))
        what = f"{kernel} for sm_{arch}"
        assert registers <= min(65536 // (resident(*kernel, arch) * THREADS) // 8 * 8, 255), f"{what}: {registers}"
        assert stack == local == 0, f"{what}: {stack} bytes of stack, {local} of local memory"
        assert shared <= 1024, what
        seen += 1
    assert seen == 16 * len(facts.CUDA_ARCHS)


def test_products_and_updates_copy_16_bytes_at_a_time(sass):
    """Asynchronously, a step of kPieces copies at once; in no such loop is anything spilled or called."""
    for kernel, text in sass:
        pieces = 2 if kernel[1] == "h" else 4
        steps = []
        for body in loops_around(text, "LDGSTS"):
            sums = count(body, "FFMA") + count(body, "FFMA2") + count(body, "DFMA")
            if count(body, "LDGSTS") == pieces and sums >= 8:  # loops around those copy ahead
                steps.append(body)
        # Inner and outer products, update, and <G, W> where it has as many sums in a step.
        assert len(steps) in ((2,) if kernel[0] == "forward" else (3, 4)), f"{kernel}: {len(steps)}"
        for body in steps:
            assert count(body, "LDGSTS", "128") == pieces <= count(body, "LDS", "128"), kernel
            assert not count(body, "LDL") and not count(body, "STL"), kernel


def test_flat_passes_access_16_bytes_at_a_time(sass):
    """Scaling into the weights' own type, and <G, W>, copy asynchronously; what is written leaves L2 first."""
    for kernel, text in sass:
        pieces, found = 2 if kernel[1] == "h" else 4, []
        for body in loops_around(text, "LDGSTS"):
            sums = count(body, "FFMA") + count(body, "FFMA2") + count(body, "DFMA")
            writes = count(body, "STG")
            if count(body, "LDGSTS") == count(body, "LDGSTS", "128") == pieces <= count(body, "LDS", "128"):
                scales = writes == count(body, "STG", "128") == count(body, "STG", "NA") >= pieces and not sums
                if scales if kernel[0] == "forward" else sums and not writes:
                    found.append(body)
        assert found, kernel
        for body in found:
            assert not count(body, "LDL") and not count(body, "STL"), kernel


def test_updates_write_16_bytes_at_a_time(sass):
    for kernel, text in sass:
        if kernel[0] == "backward":
            assert any(count(b, "STG", "128") == count(b, "STG") > 0 for b in loops_around(text, "LDGSTS")), kernel


def test_nothing_is_read_past_the_caches_that_this_launch_writes(sass):
    """No read-only loads: the compiler must not take a vector for constant."""
    for kernel, text in sass:
        assert not [i for i in instructions(text) if i.name.startswith("LDG") and "CONSTANT" in i.name], kernel


def test_order_of_memory():
    """A barrier stands between stores and each releasing atomic, and after each acquire."""
    text = dump("--dump-ptx")
    parts = re.split(r"^\.visible \.entry (\S+)\(", text, flags=re.MULTILINE)
    kernels = [(name, body) for name, body in zip(parts[1::2], parts[2::2]) if kernel_of(name)]
    assert len(kernels) == 16
    for name, body in kernels:
        assert not unordered(body), name
        assert len(RELEASE.findall(body)) >= 4 and ACQUIRE.search(body), name
        assert "createpolicy.fractional.L2::evict_first" in body, name
        assert re.search(r"cp\.async\.cg\.shared\.global\.L2::cache_hint", body), name
        assert "ld.global.nc" not in body, name
