"""Fixtures of all tests: the backends of this machine, and memory that shows what nobody wrote."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

try:
    import hypothesis
except ImportError:  # as on a machine with a GPU that only torch was made ready for
    hypothesis = None

# Before anything imports Triton, which reads it once: without a GPU its kernels run in its interpreter, on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import model
from zoo import home, interpreted

from bssn_kernels import backends

NEED_HYPOTHESIS = [f.name for f in Path(__file__).parent.glob("test_*.py") if "import hypothesis" in f.read_text()]
collect_ignore = [] if hypothesis else NEED_HYPOTHESIS
if hypothesis:
    # The same examples in every run: a test that fails here fails everywhere.
    hypothesis.settings.register_profile("bssn", derandomize=True, deadline=None, print_blob=True)
    hypothesis.settings.load_profile("bssn")


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU the CUDA kernels run on a model of one. It is built before workers start, who inherit its place."""
    if not torch.cuda.is_available() and "BSSN_CUDA_MODEL" not in os.environ and model.compiler():
        os.environ["BSSN_CUDA_MODEL"] = str(model.build())


def pytest_report_header() -> str:
    return "" if hypothesis else f"hypothesis is not installed: left out {', '.join(NEED_HYPOTHESIS)}"


@pytest.fixture(autouse=True, scope="session")
def nan_filled_empty():
    """torch.empty and its relatives return NaN, so that an element that no kernel writes is seen.

    torch does that itself in its deterministic mode; warn_only, since the rest of that mode is not our subject.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Most tests are too small to share out: threads would only wait for each other. Those about threads set them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_seed():
    """Tests do not depend on their order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Triton's interpreter prepares its language anew for each function that a kernel calls, and checks every sum of
    32-bit numbers for overflow, which takes half of its time. Once per launch is enough, and tests of large layers
    switch the checks on again.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or backends.get("triton").unsupported():
        yield
        return
    from triton.runtime import interpreter

    prepare, launch, prepared = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def prepare_once(function):
        if id(function.__globals__) not in prepared:
            prepared.add(id(function.__globals__))
            return prepare(function)
        return None

    def launch_afresh(*args, **kwargs):
        prepared.clear()
        return launch(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_afresh)
        builder = interpreter.interpreter_builder
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield


def runnable(name: str, node: pytest.Item) -> str:
    reasons = backends.get(name).unsupported()
    if reasons and os.environ.get("BSSN_STRICT") == "1":
        pytest.fail(f"backend {name!r} cannot run and BSSN_STRICT=1: {'; '.join(reasons)}")
    if reasons:
        pytest.skip(f"backend {name!r}: {'; '.join(reasons)}")
    if home(name).type != "cpu" and node.get_closest_marker("device") is None:
        pytest.skip("a test of CPU tensors, which runs on this backend where there is no GPU")
    return name


@pytest.fixture(params=backends.names())
def backend(request) -> str:
    """Every backend by name; one that cannot run is skipped with its reasons, and fails under BSSN_STRICT=1."""
    return runnable(request.param, request.node)


@pytest.fixture(params=[name for name in backends.names() if name != "reference"])
def fused_backend(request) -> str:
    """The same without the reference, whose sums are torch's."""
    return runnable(request.param, request.node)


@pytest.fixture
def interpreted_triton(request) -> None:
    """Triton in its interpreter, by the same rules."""
    if not interpreted(runnable("triton", request.node)):
        pytest.skip("a test of Triton's interpreter: TRITON_INTERPRET=1")
