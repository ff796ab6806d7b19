"""Random groups: a layer gets the same bits in any group, at any place in it, on any number of threads."""

from concurrent.futures import ThreadPoolExecutor

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor
from zoo import DTYPES, SHORT, home, interpreted, lay_out, layouts, on_threads

from bssn_kernels import functional
from bssn_kernels.plan import LayerSpec, accumulation_dtype
from bssn_kernels.variants import Variant, semantics_names

pytestmark = pytest.mark.device

SIZES = st.integers(1, 9) | st.sampled_from([16, 17, 31, 32, 33, 64, 65])
POISONS = ("none", "none", "none", "zero", "nan", "inf", "huge")


@st.composite
def layer_drafts(draw) -> dict:
    shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=5)))
    while torch.Size(shape).numel() > 40_000:
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


def draft_of(shape: tuple[int, ...], seed: int, **other) -> dict:
    """A plain layer of both directions."""
    plain = {"axis": 0, "layout": "contiguous", "variant": Variant(0.5, 0.5), "semantics": "torch", "iterations": 2}
    rest = {"gain": True, "frozen": False, "poison": "none", "poison_vectors": "none"}
    return {"shape": shape, "seed": seed, **plain, **rest, **other}


def poisoned(x: Tensor, poison: str) -> Tensor:
    if poison == "zero":
        x.zero_()
    elif poison != "none":
        x.view(-1)[x.numel() // 2] = {"nan": torch.nan, "inf": torch.inf, "huge": torch.finfo(x.dtype).max}[poison]
    return x


class Layer:
    """Tensors of a draft, made anew from its seed."""

    def __init__(self, draft: dict, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(draft["seed"])

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

        accum, self.iterations = accumulation_dtype(dtype), draft["iterations"]
        values = poisoned(normal(*draft["shape"]).to(dtype), draft["poison"])
        self.weight = lay_out(values, draft["layout"]).requires_grad_(not draft["frozen"])
        self.spec = LayerSpec.of(
            self.weight,
            name=str(draft["seed"]),
            axis=draft["axis"],
            variant=draft["variant"],
            semantics=draft["semantics"],
            gain=draft["gain"],
        )
        self.vectors = [normal(n).to(accum) for (n,) in self.spec.vector_shapes]
        for vector in self.vectors[:1]:
            poisoned(vector, draft["poison_vectors"])
        self.gains = [normal(1).to(accum).requires_grad_()] if draft["gain"] else []
        self.grad = normal(*draft["shape"]).to(dtype)


def run(layers: list[Layer], backend: str) -> list[list[Tensor]]:
    """W_bar, numbers, new vectors and gradients of every layer of one group."""
    plan = functional.make_plan([layer.spec for layer in layers], backend)
    weights = [layer.weight for layer in layers]
    vectors = [x for layer in layers for x in layer.vectors]
    gains = [x for layer in layers for x in layer.gains]
    result = functional.spectral_normalize(weights, vectors, plan, [layer.iterations for layer in layers], gains=gains)
    wanted = [out.requires_grad for out in result.weights]
    outs = [out for out, want in zip(result.weights, wanted) if want]
    for x in (*weights, *gains):
        x.grad = None
    if outs:
        torch.autograd.backward(outs, [layer.grad for layer, want in zip(layers, wanted) if want])
    scalars, new = plan.layout.scalars(result.saved), iter(result.vectors)
    multipliers = plan.multipliers_of(result.saved)
    found = []
    for i, layer in enumerate(layers):
        tensors = [result.weights[i].detach(), scalars[i, : 1 + layer.spec.directions], multipliers[i]]
        tensors += [next(new) for _ in layer.vectors]
        assert (layer.weight.grad is not None) == layer.weight.requires_grad
        tensors += [x.grad for x in (layer.weight, *layer.gains) if x.grad is not None]
        found.append([x.clone() for x in tensors])
    return found


def assert_same_bits(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    """All bits, but for the payloads of NaN."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert x.stride() == y.stride() or x.numel() == 1
            equal = ((x == y) & (x.signbit() == y.signbit())) | (x.isnan() & y.isnan())
            assert equal.all(), f"layer {i}, tensor {k}: {(~equal).sum()} of {x.numel()} differ"


groups = st.lists(layer_drafts(), min_size=1, max_size=6)


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


@pytest.mark.skipif(not interpreted("triton"), reason="Triton does not run in its interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@hypothesis.settings(max_examples=6, phases=[hypothesis.Phase.generate])
@hypothesis.given(drafts=st.lists(layer_drafts(), min_size=2, max_size=4), order=st.randoms(use_true_random=False))
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


@pytest.mark.skipif(not interpreted("triton"), reason="Triton does not run in its interpreter")
@hypothesis.settings(max_examples=8, phases=[hypothesis.Phase.generate])
@hypothesis.given(drafts=st.lists(layer_drafts(), min_size=2, max_size=5))
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
