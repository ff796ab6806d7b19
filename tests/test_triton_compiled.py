"""What the Triton kernels compile to: resources, widths of memory accesses, order of memory. No GPU is needed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ptx import ACQUIRE, BARRIER, RELEASE, read_too_early, unordered
from sass import count, innermost_loops, instructions, loops_around

from bssn_kernels.backends import _launch
from bssn_kernels.backends._geometry import COLS, ROWS, WHOLE_ROWS
from bssn_kernels.backends._triton_settings import REGISTERS
from bssn_kernels.backends.triton import _installed

# Compute capability and the types of weights to compile for it; the first with every kind of kernel.
SINGLE, HALF = ("fp32",), ("fp32", "bf16")
TARGETS = {75: SINGLE, 80: HALF, 89: HALF, 90: ("fp32", "fp64", "bf16", "fp16"), 100: SINGLE}
ITEMSIZE = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
THREADS = 128
SHARED_KIB = {75: 64, 80: 164, 89: 100, 90: 228, 100: 228}  # of an SM; from sm_80 on one of them goes to each program
MISSING = _installed()[1]
OLDER = _installed()[0] < (3, 9)  # than what the settings were made with

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING) and os.environ.get("BSSN_STRICT") != "1", reason=MISSING or "Triton is here"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[int, list[dict]]:
    """All kernels by compute capability, two compilers at a time; each record has the texts of PTX and SASS."""
    script = Path(__file__).with_name("compile_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    folders = {target: tmp_path_factory.mktemp(f"sm_{target}") for target in TARGETS}
    waiting, running = list(TARGETS), []

    def finish(process: subprocess.Popen) -> None:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output[-3000:]

    for target in waiting:
        command = [sys.executable, "-W", "ignore", str(script), str(target), str(folders[target]), *TARGETS[target]]
        private = {**environment, "TRITON_CACHE_DIR": str(folders[target] / "cache")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen(command, env=private, **pipes))
        if len(running) == 2:
            finish(running.pop(0))
    for process in running:
        finish(process)
    found = {}
    for target, folder in folders.items():
        found[target] = json.loads((folder / "index.json").read_text())
        for record in found[target]:
            record["ptx"] = (folder / f"{record['name']}.ptx").read_text()
            record["sass"] = (folder / f"{record['name']}.sass").read_text()
    return found


@pytest.fixture(params=TARGETS, ids=lambda target: f"sm_{target}")
def kernels(request, compiled) -> list[dict]:
    return compiled[request.param]


def modern(kernels: list[dict]) -> list[dict]:
    """Those for devices with asynchronous copies and cache policies."""
    return [k for k in kernels if k["capability"] >= 80]


def test_every_kind_is_compiled(compiled):
    for target, dtypes in TARGETS.items():
        kinds = {(k["kernel"], k["dtype"], k["general"], k["more"]) for k in compiled[target]}
        assert len(kinds) == 8 + 4 * (len(dtypes) - 1)


def test_registers_and_shared_memory(kernels):
    """No more than lets the configured number of programs reside. Nothing is spilled by the Triton that the settings
    were made with; by older ones little, within a loop that passes over a weight.
    """
    for k in modern(kernels):
        assert k["registers"] <= k["bound"], k["name"]
        passes = [b for b in innermost_loops(k["sass"]) if count(b, "LDGSTS", "128") or count(b, "LDG", "128")]
        assert passes and (k["stack"] == 0 or OLDER), f"{k['name']}: {k['stack']} bytes of stack"
        for body in passes if OLDER else [instructions(k["sass"])]:
            assert count(body, "LDL") + count(body, "STL") <= (16 if OLDER else 0), f"{k['name']} spills"


def has_products(kernel: dict) -> bool:
    return kernel["kernel"] == "forward_kernel" or kernel["more"]


def product_loops(kernel: dict, whole: bool = False) -> list:
    """Loops that copy a weight to shared memory and multiply: those over pieces, or those over whole rows, which copy
    more at once. Loops around them hold what comes before the first.
    """
    product = "DFMA" if kernel["dtype"] == "fp64" else "FFMA"
    bodies = loops_around(kernel["sass"], "LDGSTS")
    bodies = [b for b in bodies if not count(b, "ATOMG") and any(i.name.startswith(product) for i in b)]
    wide = at_once(kernel) // 16 // THREADS
    assert all(count(b, "LDGSTS", "128") in (wide, 2 * wide) for b in bodies), kernel["name"]
    return [b for b in bodies if (count(b, "LDGSTS", "128") > wide) == whole]


def at_once(kernel: dict) -> int:
    """Bytes of a weight that a step of a product reads; twice as many are those of whole rows."""
    itemsize = ITEMSIZE[kernel["dtype"]]
    assert WHOLE_ROWS[itemsize][1] == 2 * ROWS * COLS[itemsize]
    return ROWS * COLS[itemsize] * itemsize


def test_as_many_programs_reside_as_are_launched(kernels):
    """And together they have enough bytes on their way to hide how long memory takes."""
    for k in kernels:
        registers = -(-k["registers"] // 8) * 8 * THREADS
        assert k["programs"] * registers <= REGISTERS < (k["programs"] + 1) * k["bound"] * THREADS, k["name"]
        own = 1024 if k["capability"] >= 80 else 0
        assert k["programs"] * (k["shared"] + own) <= SHARED_KIB[k["capability"]] * 1024, k["name"]
    for k in modern(kernels):
        own, whole = (k["stages"] - 1) * at_once(k), (k["whole_stages"] - 1) * 2 * at_once(k)
        if has_products(k):
            most = max(own, whole if k["kernel"] == "forward_kernel" else 0)
            assert most <= k["shared"] <= max(own + (k["stages"] + 1) * 1024, most + 1024), f"{k['name']}: stages"
            assert min(own, whole) >= (16 if ITEMSIZE[k["dtype"]] >= 4 else 12) * 1024, k["name"]
        assert k["programs"] * k["step"] >= 32 * 1024, f"{k['name']}: flat passes"


def test_products_copy_16_bytes_at_a_time(kernels):
    """A loop of a product brings its block of W to shared memory in asynchronous copies of 16 bytes."""
    for k in modern(kernels):
        if not has_products(k):
            continue
        loops = product_loops(k)
        assert len(loops) == 2, f"{k['name']}: one loop for inner products, one for outer"
        for body in loops:
            narrow = count(body, "LDGSTS") - count(body, "LDGSTS", "128")
            assert narrow <= (12 if k["more"] else 4), f"{k['name']}: the rest are numbers of the vectors"
        loops = product_loops(k, whole=True)
        assert len(loops) == 2 * (k["kernel"] == "forward_kernel"), f"{k['name']}: four rows at once, or one"
        for body in loops:
            assert count(body, "LDGSTS") == count(body, "LDGSTS", "128"), k["name"]
            assert not count(body, "LDG"), f"{k['name']}: the vector is in registers"


def test_products_wait_for_the_oldest_copies_alone(kernels):
    """The wait in a loop of a product leaves all copies but the oldest on their way: it is a pipeline, and not a copy
    by way of shared memory. An address that depends on a branch within the loop is enough to lose that.
    """
    for k in modern(kernels):
        for body in product_loops(k):
            assert most_left(body) >= k["stages"] - 2 > 0, k["name"]
        for body in product_loops(k, whole=True):
            assert most_left(body) >= k["whole_stages"] - 2, k["name"]


def most_left(body: list) -> int:
    """How many copies a loop leaves on their way where it waits."""
    return max(int(i.operands.split(",")[1], 16) for i in body if i.name.startswith("DEPBAR"))


def flat_loops(kernel: dict, stores: bool) -> list:
    """Loops that read with 16-byte accesses alone, and write so, or not at all."""
    found = []
    for body in innermost_loops(kernel["sass"]):
        reads, writes = count(body, "LDG"), count(body, "STG")
        wide = reads == count(body, "LDG", "128") and writes == count(body, "STG", "128")
        if reads and wide and bool(writes) == stores:
            found.append(body)
    return found


def test_flat_passes_access_16_bytes_at_a_time(kernels):
    """The scale pass and the dot product; both read what is not needed again first to be evicted."""
    for k in modern(kernels):
        loops = flat_loops(k, stores=k["kernel"] == "forward_kernel")
        assert loops, f"{k['name']}: no loop of 16-byte accesses alone"
        for body in loops:
            assert count(body, "LDG", "EF") >= 2 and (OLDER or not count(body, "LDL")), k["name"]
            if k["kernel"] == "forward_kernel":
                assert count(body, "STG", "EF") == count(body, "STG"), k["name"]


def test_updates_access_16_bytes_at_a_time(kernels):
    """dW: G is read and dW written in 16-byte accesses, first to be evicted; vectors are read number by number."""
    for k in modern(kernels):
        if k["kernel"] == "backward_kernel":
            found = [b for b in innermost_loops(k["sass"]) if count(b, "STG", "128") and count(b, "LDG", "128")]
            assert any(count(b, "STG", "EF") and count(b, "LDG", "EF") for b in found), k["name"]


def test_cache_policies(kernels):
    """Evict-first is also a policy of L2, where it counts."""
    for k in modern(kernels):
        assert "createpolicy.fractional.L2::evict_first" in k["ptx"], k["name"]
        assert re.search(r"ld\.global\.L1::evict_first\.L2::cache_hint", k["ptx"]), k["name"]
        assert re.search(r"st\.global\.L1::evict_first\.L2::cache_hint\.v[24]", k["ptx"]), k["name"]


def test_order_of_memory(kernels):
    """A barrier of the program stands between its stores and each releasing atomic, and after each acquire."""
    for k in kernels:
        assert not unordered(k["ptx"]), k["name"]
        assert len(RELEASE.findall(k["ptx"])) >= 4, f"{k['name']}: block, iteration, done, batch"
        assert len(ACQUIRE.findall(k["ptx"])) == 1, f"{k['name']}: one, at the end of a poll"
        assert ".relaxed" not in "".join(re.findall(r"ld\.global\.gpu\.\w+", k["ptx"]))


def test_a_missing_barrier_would_be_found(compiled):
    """The check itself: without the barriers of one kind of place it complains."""
    ptx = compiled[90][0]["ptx"].splitlines()
    atomics = [i for i, line in enumerate(ptx) if RELEASE.search(line)]
    barrier = max(i for i in range(atomics[0]) if BARRIER.search(ptx[i]))
    store = "\tst.global.b32 [ %rd1 + 0 ], { %r1 };"
    assert unordered("\n".join([*ptx[:barrier], store, *ptx[barrier + 1 :]]))
    poll = next(i for i, line in enumerate(ptx) if ACQUIRE.search(line))
    without = [line for line in ptx[poll:] if not BARRIER.search(line)]
    assert unordered("\n".join([*ptx[: poll], *without]))


# What threads of a program read that others of its threads have just written.
SHARED_IN_A_PROGRAM = {
    "the squares of a tile's whole rows": "s = tl.load(slab_ptr + i + o, mask=i + o < rows, other=0.0)",
    "the product with a new slab": "sums += (tl.load(raw_ptr + e, mask=i + o < n, other=0.0",
}


def source_of(text: str) -> tuple[str, int]:
    """File and line of the kernels that have this text."""
    files = Path(_launch.__file__).with_name("_triton_kernels").glob("*.py")
    lines = [(file.name, i, line) for file in files for i, line in enumerate(file.read_text().splitlines(), 1)]
    ((name, number, _),) = [found for found in lines if text in found[2]]
    return name, number


@pytest.mark.parametrize("what", SHARED_IN_A_PROGRAM)
def test_what_other_threads_wrote_is_read_after_a_barrier(kernels, what):
    source, places = source_of(SHARED_IN_A_PROGRAM[what]), 0
    for k in kernels:
        if k["kernel"] == "forward_kernel":
            found, faults = read_too_early(k["ptx"], *source)
            assert found and not faults, (k["name"], faults)
            places += found
            without = "\n".join(line for line in k["ptx"].splitlines() if not BARRIER.search(line))
            assert read_too_early(without, *source)[1], "the check itself"
    assert places


def test_nothing_is_read_past_the_caches_that_this_launch_writes(kernels):
    """No read-only loads: the compiler must not take a vector for constant."""
    for k in kernels:
        assert "ld.global.nc" not in k["ptx"], k["name"]
        assert not [i for i in instructions(k["sass"]) if i.name.startswith("LDG") and "CONSTANT" in i.name]
