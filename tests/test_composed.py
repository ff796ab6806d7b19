"""Fused equals composed: the plain PyTorch path gives the same numbers, and is taken where a kernel cannot follow."""

import pytest
import torch
from torch import Tensor
from truth import relative
from zoo import SMALL, Built, Case, build, check

from bssn_kernels import functional
from bssn_kernels.variants import semantics_names

CASES = [
    Case(layer, "contiguous", torch.float64, variant, semantics, iterations, gain=i % 2 == 0)
    for i, layer in enumerate(SMALL)
    for variant, semantics, iterations in [
        (("sn", "bssn", "custom", "capped_below")[i % 4], semantics_names()[i % 5], i % 3),
        ("bssn", "paper", 1),
    ]
]


def group(layers: list[Built], backend: str) -> tuple:
    plan = functional.make_plan([layer.spec for layer in layers], backend)
    vectors = [x for layer in layers for x in layer.vectors]
    return [layer.weight for layer in layers], vectors, plan, [layer.case.iterations for layer in layers]


def assert_close(found: list[Tensor], expected: list[Tensor], bound: float = 1e-11) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).norm() <= bound * b.norm() + 1e-300 or relative(a, b) <= bound


@pytest.mark.parametrize("output_dtype", [None, torch.float32])
def test_fused_equals_composed(backend, output_dtype):
    layers = [build(case, i) for i, case in enumerate(CASES)]
    weights, vectors, plan, iterations = group(layers, backend)
    gains = [layer.gain for layer in layers if layer.gain is not None]
    fused = functional.spectral_normalize(weights, vectors, plan, iterations, gains=gains, output_dtype=output_dtype)
    composed = functional.composed(weights, vectors, plan, iterations, gains, output_dtype)
    assert composed.saved is None
    bound = 1e-11 if output_dtype is None else 1e-7
    assert_close(composed.weights, fused.weights, bound)
    assert_close(composed.vectors, fused.vectors)
    assert_close(composed.sigmas, fused.sigmas)
    assert not any(x.requires_grad for x in (*composed.vectors, *composed.sigmas))
    grads = [torch.randn_like(out) for out in fused.weights]
    found, expected = (torch.autograd.grad(r.weights, [*weights, *gains], grads) for r in (composed, fused))
    for layer, a, b, grad in zip(layers, found, expected, grads):
        scale = b.norm() + (grad.norm() if b.norm() < 1e-9 else 0)  # dW of one element cancels
        assert (a - b).norm() <= 1e-9 * scale, layer.case.name
    assert_close(found[len(layers) :], expected[len(layers) :], 1e-9)


class Tagged(Tensor):
    """A subclass whose meaning nobody knows."""


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed2d"])
def test_tensor_subclasses(backend, kind):
    """They stay what they are, through forward and backward."""
    layer = build(Case(kind, "contiguous", torch.float64, "bssn"))
    weights, vectors, plan, iterations = group([layer], backend)
    tagged = layer.weight.detach().as_subclass(Tagged).requires_grad_()
    assert functional.needs_composed([tagged]) and not functional.needs_composed(weights)
    found = functional.spectral_normalize([tagged], vectors, plan, iterations)
    expected = functional.spectral_normalize(weights, vectors, plan, iterations)
    assert type(found.weights[0]) is Tagged and found.saved is None
    grad = torch.randn_like(layer.weight)
    found.weights[0].backward(grad)
    expected.weights[0].backward(grad)
    assert relative(found.weights[0].as_subclass(Tensor), expected.weights[0]) < 1e-12
    assert relative(tagged.grad.as_subclass(Tensor), layer.weight.grad) < 1e-12


def test_parameters_and_buffers_are_plain(backend):
    layer = build(Case("linear"))
    parameter, buffer = torch.nn.Parameter(layer.weight.detach()), torch.nn.Buffer(layer.weight.detach())
    assert not functional.needs_composed([parameter, buffer])
    _, vectors, plan, _ = group([layer], backend)
    outs = [functional.spectral_normalize([w], vectors, plan).weights[0] for w in (parameter, buffer)]
    assert torch.equal(*outs) and outs[0].requires_grad and not outs[1].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_leaves_the_arithmetic_alone(backend, dtype):
    """Products and sums stay in float32 under autocast, forward and backward."""
    cases = [
        Case(layer, "contiguous", dtype, variant, semantics, iterations)
        for layer in ("linear", "conv2d", "transposed2d", "vector")
        for variant, semantics, iterations in (
            ("sn", "torch", 1),
            ("bssn", "paper", 1),
            ("bsn", "miyato", 3),
            ("sn", "biggan", 0),
        )
    ]
    with torch.autocast("cpu", torch.bfloat16):
        check(cases, backend)


@pytest.mark.parametrize("semantics", ["torch", "paper"])
def test_autocast_leaves_the_second_backward_alone(backend, semantics):
    layer = build(Case("conv2d", "contiguous", torch.float32, "bssn", semantics))
    weights, vectors, plan, iterations = group([layer], backend)
    grad = torch.randn_like(layer.weight)
    seconds = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (out,) = functional.spectral_normalize(weights, vectors, plan, iterations).weights
            (first,) = torch.autograd.grad(out, weights, grad, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), weights)[0])
    assert relative(*seconds) < 1e-5


def test_autocast_leaves_the_start_alone():
    """A model built under autocast begins as one built without."""
    layer, starts = build(Case("conv2d", variant="bssn")), []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            generator = torch.Generator().manual_seed(3)
            starts.append(functional.initial_vectors(layer.weight, layer.spec, generator))
    assert all(map(torch.equal, *starts))
