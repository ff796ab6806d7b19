"""Random groups: a layer gets the same bits in any group, at any place in it, on any number of threads."""

import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import hypothesis
import hypothesis.strategies as st
import model
import pytest
import torch
from drafts import Layer, assert_same_bits, draft_of, run
from torch import Tensor
from zoo import DTYPES, SHORT, home, interpreted, layouts, on_threads

from bssn_kernels.backends import cpu
from bssn_kernels.variants import Variant, semantics_names

pytestmark = pytest.mark.device

SIZES = st.integers(1, 9) | st.sampled_from([16, 17, 31, 32, 33, 64, 65])
POISONS = ("none", "none", "none", "zero", "nan", "inf", "huge")


@st.composite
def layer_drafts(draw, most: int = 40_000) -> dict:
    """A layer of up to so many numbers."""
    shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=5)))
    while torch.Size(shape).numel() > most:
        shape = shape[:-1]
    out, into = draw(st.sampled_from([(1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (0.3, 0.9)]))
    return {
        "shape": shape,
        "axis": draw(st.integers(0, min(1, len(shape) - 1))),
        "layout": draw(st.sampled_from(layouts(shape))),
        "variant": Variant(out, into, draw(st.sampled_from([0.0, 0.5, 1e3])), draw(st.sampled_from([1.0, 1.6]))),
        "semantics": draw(st.sampled_from(semantics_names())),
        "iterations": draw(st.integers(0, 4)),
        "gain": draw(st.booleans()),
        "frozen": draw(st.booleans()),
        "poison": draw(st.sampled_from(POISONS)),
        "poison_vectors": draw(st.sampled_from(POISONS)),
        "seed": draw(st.integers(0, 2**31)),
    }


groups = st.lists(layer_drafts(), min_size=1, max_size=6)
QUICK = layer_drafts(most=8_000)  # for Triton's interpreter


def check_group_against_layers_alone(backend: str, dtype: torch.dtype, drafts: list[dict], order) -> None:
    device = home(backend)
    alone = [run([Layer(draft, dtype, device)], backend)[0] for draft in drafts]
    places = list(range(len(drafts)))
    for _ in range(2):
        together = run([Layer(drafts[i], dtype, device) for i in places], backend)
        assert_same_bits(together, [alone[i] for i in places])
        order.shuffle(places)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@hypothesis.settings(max_examples=40, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(drafts=groups, order=st.randoms(use_true_random=False))
def test_group_equals_its_layers_alone(backend, dtype, drafts, order):
    """In the order given and in another one."""
    if interpreted(backend):
        pytest.skip("40 groups take Triton's interpreter minutes: test_interpreted_group_equals_its_layers_alone has 6")
    check_group_against_layers_alone(backend, dtype, drafts, order)


@pytest.mark.usefixtures("interpreted_triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@hypothesis.settings(max_examples=6, phases=[hypothesis.Phase.generate])
@hypothesis.given(drafts=st.lists(QUICK, min_size=2, max_size=4), order=st.randoms(use_true_random=False))
def test_interpreted_group_equals_its_layers_alone(dtype, drafts, order):
    check_group_against_layers_alone("triton", dtype, drafts, order)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@hypothesis.settings(max_examples=25)
@hypothesis.given(drafts=groups)
def test_number_of_threads(dtype, drafts):
    found = []
    for count in (1, 2, 3, 7):
        with on_threads(count):
            found.append(run([Layer(draft, dtype) for draft in drafts], "cpu"))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_large_layers_on_threads(dtype):
    """Layers of several tiles, beside small ones, large and small first; twice, since a race may win once."""
    shapes = [(3, 5), (200, 256, 3, 3), (70, 11), (3, 90_000), (90_000, 3), (129, 65, 2, 2), (7,)]
    shapes += [(512, 2304), (256, 512, 3, 3)]
    drafts = [
        draft_of(shape, i, iterations=1 + i % 3, gain=i % 2 == 0, semantics=semantics_names()[-1 - i % 5])
        for i, shape in enumerate(shapes)
    ]
    drafts[1]["layout"], drafts[5]["axis"] = "channels_last", 1
    with on_threads(1):
        expected = run([Layer(draft, dtype) for draft in drafts], "cpu")
    for count in (2, 3, 7, 2):
        with on_threads(count):
            found = run([Layer(draft, dtype) for draft in reversed(drafts)], "cpu")
        assert_same_bits(found[::-1], expected)


FEW_CHANNELS = [
    *[(shape, "contiguous") for shape in ((512, 3, 7, 7), (4096, 2, 3, 3), (700, 1, 5, 5), (9000, 3))],
    *[(shape, "channels_last") for shape in ((64, 3, 7, 7), (64, 2, 11, 11), (3000, 3, 3, 3), (40, 3, 5, 5, 5))],
]


@pytest.mark.parametrize("iterations", [0, 1])
@pytest.mark.parametrize(("shape", "layout"), FEW_CHANNELS, ids=str)
def test_few_channels_on_threads(shape, layout, iterations):
    """A layer alone, whose rows are shorter than what four of them give; several tiles; right and always the same."""
    draft = draft_of(shape, 3, layout=layout, iterations=iterations)
    expected = run([Layer(draft, torch.float32)], "reference")[0]
    with on_threads(1):
        first = run([Layer(draft, torch.float32)], "cpu")
    for x, y in zip(first[0], expected):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * y.abs().max().item())
    for count in (2, 3, 7, 2, 2, 2):
        with on_threads(count):
            assert_same_bits(run([Layer(draft, torch.float32)], "cpu"), first)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> ModuleType:
    """The compiled part, for any processor, with guards in its workspace."""
    if not model.compiler():
        (pytest.fail if os.environ.get("BSSN_STRICT") == "1" else pytest.skip)("no C++ compiler")
    import pybind11

    csrc, target = model.ROOT / "csrc", tmp_path_factory.mktemp("guarded") / "_cpu.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-DBSSN_GUARD", "-DBSSN_ISA=plain", f"-I{csrc}"]
    flags += [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    command = [model.compiler(), *flags, *map(str, sorted((csrc / "cpu").glob("*.cpp"))), "-o", str(target)]
    subprocess.run(command, check=True)
    # Under a name of its own: pybind11 gives a second module of the same name out as the first.
    spec = importlib.util.spec_from_file_location("guarded._cpu", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("shape", "layout"), FEW_CHANNELS, ids=str)
def test_nothing_is_written_outside_of_its_place(guarded, monkeypatch, shape, layout):
    monkeypatch.delenv("BSSN_CPU_ISA", raising=False)
    monkeypatch.setattr(cpu, "_load", lambda: (guarded, ""))
    for semantics in semantics_names():
        for iterations in (0, 1, 2):
            draft = draft_of(shape, 3, layout=layout, iterations=iterations, semantics=semantics)
            run([Layer(draft, torch.float32)], "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@hypothesis.settings(max_examples=100, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(draft=layer_drafts(), other=layer_drafts())
def test_no_layer_writes_outside_of_its_place(guarded, monkeypatch, dtype, draft, other):
    """Alone, where no larger layer's memory hides it, and beside another one; eval too, whatever was drawn."""
    monkeypatch.delenv("BSSN_CPU_ISA", raising=False)
    monkeypatch.setattr(cpu, "_load", lambda: (guarded, ""))
    for drafts in ([draft], [{**draft, "iterations": 0}], [draft, other]):
        run([Layer(one, dtype) for one in drafts], "cpu")


def test_python_threads(fused_backend):
    """Calls of many threads at once, the interpreter's lock released, give the bits of one call."""
    shapes, calls = [(64, 32, 3, 3), (10, 7), (200, 300), (9,)], 40
    if interpreted(fused_backend):  # which does one launch after the other
        shapes, calls = [(6, 5, 3, 3), (10, 7)], 4
    drafts = [draft_of(shape, i) for i, shape in enumerate(shapes)]

    def call(_: int) -> list[list[Tensor]]:
        torch.set_num_threads(2)
        return run([Layer(draft, torch.float32, home(fused_backend)) for draft in drafts], fused_backend)

    with on_threads(2):
        expected = call(0)
        with ThreadPoolExecutor(8) as pool:
            for found in pool.map(call, range(calls)):
                assert_same_bits(found, expected)


@hypothesis.settings(max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(drafts=groups)
def test_finite_layers_stay_finite_beside_poisoned_ones(backend, drafts):
    """And what is stored is always finite and not zero, if what was stored was."""
    if interpreted(backend):
        pytest.skip("60 groups take Triton's interpreter minutes: test_interpreted_layers_stay_finite has 8")
    check_finite(backend, drafts)


@pytest.mark.usefixtures("interpreted_triton")
@hypothesis.settings(max_examples=8, phases=[hypothesis.Phase.generate])
@hypothesis.given(drafts=st.lists(QUICK, min_size=2, max_size=5))
def test_interpreted_layers_stay_finite(drafts):
    check_finite("triton", drafts)


def check_finite(backend: str, drafts: list[dict]) -> None:
    drafts = [{**draft, "poison_vectors": "none"} for draft in drafts]
    layers = [Layer(draft, torch.float32, home(backend)) for draft in drafts]
    for draft, layer, (out, _, multiplier, *rest) in zip(drafts, layers, run(layers, backend)):
        for vector in rest[: len(layer.vectors)]:
            assert vector.isfinite().all() and vector.any()
        if draft["poison"] in ("none", "zero"):
            assert all(x.isfinite().all() for x in (out, multiplier, *rest))
        if draft["poison"] == "zero":
            assert not out.any()
