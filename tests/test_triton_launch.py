"""How kernels get to a device: Triton is asked once for each kind of call, and what it told the driver is told again.

On a stand-in for the driver; tests/test_gpu.py runs them on a device.
"""

import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from bssn_kernels.backends.triton import _installed

MISSING = _installed()[1]
pytestmark = pytest.mark.skipif(bool(MISSING) and os.environ.get("BSSN_STRICT") != "1", reason=MISSING or "it is here")


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("launches")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("launch_triton.py")), str(folder / "steps")]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("BSSN_CUDA_MODEL", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "steps").read_text())


def in_runs(steps: list[dict]) -> list[tuple[str, list[dict]]]:
    return [(what, list(group)) for what, group in groupby(steps, key=lambda step: step["what"])]


def without_moving(step: dict) -> list:
    """What the driver was told, without the addresses of tensors that are new in each call, but with their places."""
    buffers = step["moving"]

    def plain(x):
        if isinstance(x, list) and len(x) == 3 and isinstance(x[0], str):  # a tensor
            return [*x[:2], buffers.index(x[2]) if x[2] in buffers else "elsewhere"]
        return [plain(y) for y in x] if isinstance(x, list) else x

    return plain(step["told"])


def test_triton_is_asked_once_for_each_kind_of_call(steps):
    known = set()
    for what, calls in in_runs(steps[:-1]):
        expected = [0] * len(calls)
        if not what.startswith("no launch"):
            expected[0] = int(what not in known)
        assert [call["asked"] for call in calls] == expected, what
        known.add(what)
    assert {"forward", "backward", "store", "vectors in half precision"} <= known


def test_the_driver_is_told_the_same_with_and_without_triton(steps):
    compared = 0
    first = {}
    for step in steps[:-1]:
        if step["what"].startswith("no launch"):
            continue
        expected = first.setdefault(step["what"], step)
        assert without_moving(step) == without_moving(expected), step["what"]
        moved = set(step["moving"]) - set(expected["moving"])
        compared += step is not expected and bool(moved)
    assert compared >= 5, "some calls had other tensors than the first of their kind"


def test_tables_are_the_same_memory(steps):
    forwards = [step["told"][4] for step in steps if step["what"] == "forward"]
    assert len(forwards) == 3
    for told in forwards[1:]:
        assert told[:9] == forwards[0][:9], "tables, addresses and anchors"


def test_each_kind_has_a_kernel_of_its_own(steps):
    functions = {step["what"]: step["told"][1] for step in steps[:-1] if "told" in step}
    assert functions.pop("forward of another plan") == functions["forward"], "which Triton had compiled"
    assert len(set(functions.values())) == len(functions) == 8


def test_stream_and_programs(steps):
    for step in steps[:-1]:
        if "told" in step:
            kernel, _, grid, stream, _ = step["told"]
            assert stream == 7 and grid[1:] == [1, 1]
            assert grid[0] == (4 if kernel == "store_kernel" else 2), "two vectors of each layer, no starts"


def test_vectors_are_stored_without_a_launch_where_they_are_not_what_was_read(steps):
    others = [step for step in steps if step["what"].startswith("no launch")]
    assert len(others) == 3 and not any("told" in step for step in others)


def test_a_launch_that_fails_names_the_layers(steps):
    assert steps[-1]["asked"] == 0 and steps[-1]["counters"] == 0, "it was known, and its counters are given up"
    layers = "2 layers ('0', '1'; the largest 4 x 54 x 1 in memory)"
    assert steps[-1]["error"] == f"forward of {layers} of torch.float32 on cpu: Triton Error [CUDA]: out of order"
