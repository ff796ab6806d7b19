"""One bad step gives no NaN that was not there, and does not poison the state."""

import pytest
import torch
from torch import Tensor
from zoo import LAYERS, VARIANTS, Case, build, check, home, interpreted

from bssn_kernels import functional
from bssn_kernels.variants import semantics_names

pytestmark = pytest.mark.device

KINDS = ("linear", "conv2d", "transposed2d", "vector", "one_element4", "conv2d_large")
FREE = [name for name, variant in VARIANTS.items() if variant.floor == 0]
FLOORED = [name for name, variant in VARIANTS.items() if variant.floor > 0]


@pytest.fixture(autouse=True)
def no_large_layer_in_the_interpreter(request):
    chosen = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if chosen.get("kind") == "conv2d_large" and interpreted(chosen.get("backend", "")):
        pytest.skip("Triton's interpreter takes half a minute for it; conv2d is the same in fewer tiles")


def normalize(layer, weight: Tensor, vectors: list[Tensor], backend: str):
    plan = functional.make_plan([layer.spec], backend)
    gains = [] if layer.gain is None else [layer.gain]
    return functional.spectral_normalize([weight], vectors, plan, layer.case.iterations, gains=gains)


def zeroed(layer) -> Tensor:
    return torch.zeros_like(layer.weight).requires_grad_()


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("semantics", semantics_names())
@pytest.mark.parametrize("kind", KINDS)
def test_zero_weight(backend, kind, semantics, iterations):
    """W_bar = 0 and dW = gain G; the vectors stay."""
    for variant in (FREE[-1], FLOORED[-1]) if interpreted(backend) else (*FREE, *FLOORED):
        case = Case(kind, "contiguous", torch.float32, variant, semantics, iterations, gain=True)
        layer = build(case, device=home(backend))
        weight = zeroed(layer)
        result = normalize(layer, weight, layer.vectors, backend)
        grad = torch.randn_like(weight)
        result.weights[0].backward(grad)
        rule = VARIANTS[variant]
        factor = rule.gain / (rule.floor or 1.0) * layer.gain.item()
        assert torch.equal(result.weights[0], torch.zeros_like(weight))
        torch.testing.assert_close(weight.grad, factor * grad, rtol=1e-6, atol=0)
        assert layer.gain.grad.item() == 0 and result.sigmas[0].item() == 0
        assert all(map(torch.equal, result.vectors, layer.vectors))


@pytest.mark.parametrize("stored", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("semantics", semantics_names())
@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed2d"])
def test_useless_stored_vectors_become_ones(backend, kind, semantics, stored):
    """Where the weight cannot give better ones; each vector is judged for itself, and the next step is sound."""
    layer = build(Case(kind, variant="bssn", semantics=semantics), device=home(backend))
    useless = [x.clone() for x in layer.vectors]
    for x in useless[::2]:
        x.fill_(stored) if stored == 0 else x[1:2].fill_(stored)
    result = normalize(layer, zeroed(layer), useless, backend)
    if stored == 0:
        assert torch.equal(result.weights[0], torch.zeros_like(layer.weight))
    for k, (x, old) in enumerate(zip(result.vectors, useless)):
        expected = old if k % 2 else torch.full_like(old, old.numel() ** -0.5)
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=0)
    assert not normalize(layer, zeroed(layer), result.vectors, backend).weights[0].any()
    assert normalize(layer, layer.weight, result.vectors, backend).weights[0].isfinite().all()


@pytest.mark.parametrize("semantics", semantics_names())
@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed2d"])
def test_useless_stored_vectors_recover(backend, kind, semantics):
    """From nothing but zeros two steps on a good weight lead to a good state."""
    layer = build(Case(kind, variant="bssn", semantics=semantics), device=home(backend))
    vectors = [torch.zeros_like(x) for x in layer.vectors]
    for _ in range(2):
        result = normalize(layer, layer.weight, vectors, backend)
        vectors = result.vectors
    assert result.weights[0].isfinite().all() and result.sigmas[0] > 0
    assert all(x.isfinite().all() and x.any() for x in vectors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_step_and_recovery(backend, kind, bad, dtype):
    """It leaves the vectors as they were, so the next step is what it would have been without it."""
    few = interpreted(backend)
    for semantics in (semantics_names()[len(kind) % 5],) if few else semantics_names():
        for iterations in (1 + len(semantics) % 2,) if few else (1, 3):
            layer = build(Case(kind, "contiguous", dtype, "bssn", semantics, iterations), device=home(backend))
            broken = layer.weight.detach().clone()
            broken.view(-1)[broken.numel() // 3] = bad
            during = normalize(layer, broken, layer.vectors, backend)
            assert not during.weights[0].isfinite().all(), "the loss has to show it"
            assert all(map(torch.equal, during.vectors, layer.vectors))
            after = normalize(layer, layer.weight, during.vectors, backend)
            never = normalize(layer, layer.weight, layer.vectors, backend)
            assert after.weights[0].isfinite().all()
            for found, expected in zip((*after.weights, *after.vectors), (*never.weights, *never.vectors)):
                if backend == "reference":  # torch's sums depend on where a vector stands in memory
                    torch.testing.assert_close(found, expected)
                else:
                    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed2d", "vector"])
def test_evaluation_leaves_the_vectors(backend, kind):
    for semantics in semantics_names():
        layer = build(Case(kind, variant="bssn", semantics=semantics, iterations=0), device=home(backend))
        result = normalize(layer, layer.weight, layer.vectors, backend)
        assert all(map(torch.equal, result.vectors, layer.vectors))
        assert not {x.data_ptr() for x in result.vectors} & {x.data_ptr() for x in layer.vectors}


@pytest.mark.parametrize("semantics", semantics_names())
def test_one_direction_without_a_product(backend, semantics):
    """The stored vector of the out-direction is orthogonal to all of W: that direction rests, the other goes on."""
    shape, _ = LAYERS["conv2d"]
    weight = torch.randn(shape).to(home(backend))
    weight[0], weight[:, 0] = 0, 0
    weight.requires_grad_()
    layer = build(Case("conv2d", variant="bsn", semantics=semantics), device=home(backend))
    u, v, u_in, v_in = layer.vectors
    u, v = torch.zeros_like(u), torch.zeros_like(v)
    u[0], v[0] = 1, 1  # row 0 of W is zero, and so is its first input channel
    result = normalize(layer, weight, [u, v, u_in, v_in], backend)
    result.weights[0].backward(torch.randn_like(weight))
    assert torch.equal(result.vectors[0], u) and torch.equal(result.vectors[1], v)
    assert not torch.equal(result.vectors[2], u_in)
    assert result.sigmas[0] > 0 and result.weights[0].isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("magnitude", [1e-9, 1e9])
@pytest.mark.parametrize("semantics", semantics_names())
def test_small_and_large_weights(backend, semantics, magnitude):
    """Scaling the weight scales sigma; no square of it may leave the range of float32."""
    for kind in ("linear", "conv2d"):
        layer = build(Case(kind, variant="bsn", semantics=semantics), device=home(backend))
        one = normalize(layer, layer.weight.detach(), layer.vectors, backend)
        other = normalize(layer, layer.weight.detach() * magnitude, layer.vectors, backend)
        bound = 2e-3 if magnitude < 1 else 1e-5  # eps is felt below
        torch.testing.assert_close(other.sigmas[0], one.sigmas[0] * magnitude, rtol=bound, atol=0)


def test_negative_sigma_of_untrained_vectors(backend):
    """Stored vectors that have never met the weight may give one; the numbers follow it, as natively."""
    layer = build(Case("linear", iterations=0), device=home(backend))
    u, v = layer.vectors
    layer.vectors = [-u, v]
    result = normalize(layer, layer.weight, layer.vectors, backend)
    assert result.sigmas[0] < 0
    torch.testing.assert_close(result.weights[0], layer.weight / result.sigmas[0], rtol=1e-6, atol=0)


def test_poison_in_one_layer_leaves_the_others(backend):
    """A group with a NaN layer in the middle still passes the zoo's check of its other layers."""
    cases = [Case(kind, variant="bssn") for kind in ("linear", "conv2d", "linear")]
    layers = [build(case, seed, device=home(backend)) for seed, case in enumerate(cases)]
    weights = [layer.weight.detach().clone() for layer in layers]
    plan = functional.make_plan([layer.spec for layer in layers], backend)
    vectors = [x for layer in layers for x in layer.vectors]
    expected = functional.spectral_normalize(weights, vectors, plan)
    weights[1].fill_(torch.nan)
    found = functional.spectral_normalize(weights, vectors, plan)
    assert torch.equal(found.weights[0], expected.weights[0]) and torch.equal(found.weights[2], expected.weights[2])
    check([Case("linear"), Case("conv2d")], backend)
