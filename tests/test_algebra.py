"""The truth on one matrix: its own properties, and torch's native spectral_norm."""

import pytest
import torch
import truth
from torch import nn
from truth import relative

from bssn_kernels import algebra
from bssn_kernels.variants import Variant, resolve_semantics, semantics_names


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("norm", ["max", "add"])
@pytest.mark.parametrize("order", ["uv", "vu"])
def test_converges_to_the_singular_triple(order, norm, dtype):
    m = random(7, 5, dtype=dtype)
    rule = {"n_power_iterations": 500, "order": order, "norm": norm}
    u, v = algebra.power_iterate(m, random(7, dtype=dtype), random(5, dtype=dtype), **rule)
    top = torch.linalg.matrix_norm(m, 2)
    assert relative(algebra.sigma(m, u, v).abs(), top) < 1e-12
    assert relative((m @ v).abs(), (top * u).abs()) < 1e-9


@pytest.mark.parametrize("order", ["uv", "vu"])
def test_sigma_is_the_last_norm_before_normalizing(order):
    m = random(6, 9)
    u, v = algebra.power_iterate(m, random(6), random(9), n_power_iterations=1, order=order)
    last = m.t() @ u if order == "uv" else m @ v
    assert relative(algebra.sigma(m, u, v), last.norm()) < 1e-14


@pytest.mark.parametrize("iterations", [0, 1, 4])
@pytest.mark.parametrize("semantics", semantics_names())
def test_normalize(semantics, iterations):
    """The same as the tests' own few lines, in numbers and in gradients."""
    variant = Variant(0.4, 0.7, 0.0, 1.3)
    weight, gain = random(4, 3, 2, 2).requires_grad_(), torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    vectors = [random(n) for n in (4, 12, 3, 16)]
    rule = {"variant": variant, "axis": 0, "gain": gain}
    expected = truth.normalize(weight, vectors, semantics=semantics, iterations=iterations, **rule)
    resolved = resolve_semantics(semantics)
    found = algebra.normalize(weight, vectors, semantics=resolved, n_power_iterations=iterations, **rule)
    grad = random(4, 3, 2, 2)
    pairs = [
        (found.weight, expected.weight),
        *zip(found.sigmas, expected.sigmas),
        *zip(found.vectors, expected.vectors),
    ]
    pairs += zip(*(torch.autograd.grad(r.weight, (weight, gain), grad) for r in (found, expected)))
    for a, b in pairs:
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize("make, axis", [(lambda: nn.Linear(5, 7), 0), (lambda: nn.ConvTranspose2d(3, 4, 2), 1)])
def test_equals_torchs_parametrization(make, axis):
    layer = nn.utils.parametrizations.spectral_norm(make().double())
    norm, weight = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    vectors = [norm._u.clone(), norm._v.clone()]
    rule = {"variant": Variant(), "semantics": resolve_semantics("torch"), "axis": axis}
    for _ in range(3):
        found = algebra.normalize(weight, vectors, **rule)
        native = layer.weight
        grad = torch.randn_like(native)
        (grad_found,) = torch.autograd.grad(found.weight, weight, grad)
        (grad_native,) = torch.autograd.grad(native, weight, grad)
        assert relative(found.weight, native) < 1e-13 and relative(grad_found, grad_native) < 1e-12
        assert relative(found.vectors[0], norm._u) < 1e-13 and relative(found.vectors[1], norm._v) < 1e-13
        vectors = found.vectors


def test_settle():
    new, stored = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    good, bad = torch.tensor(True), torch.tensor(False)
    assert torch.equal(algebra.settle(new, stored, good), new)
    assert torch.equal(algebra.settle(new, stored, bad), stored)
    for useless in ([0.0, 0.0], [1.0, torch.nan], [torch.inf, 1.0]):
        assert torch.equal(algebra.settle(new, torch.tensor(useless), bad), torch.full((2,), 2**-0.5))


def test_multiplier():
    sigmas = [torch.tensor(2.0), torch.tensor(4.0)]
    assert algebra.multiplier(sigmas, Variant(0.5, 0.5, 0.0, 6.0)).item() == 2.0
    assert algebra.multiplier(sigmas[:1], Variant(0.5, 0.5, 0.0, 6.0)).item() == 3.0
    assert algebra.multiplier(sigmas, Variant(0.5, 0.5, 12.0, 6.0)).item() == 0.5
    assert algebra.multiplier(sigmas, Variant(0.5, 0.5, 0.0, 6.0), torch.tensor([0.5])).item() == 1.0
    assert algebra.multiplier([torch.tensor(0.0)], Variant(gain=3.0)).item() == 3.0


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_zero_weight_has_a_finite_gradient(floor):
    weight = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    variant, semantics = Variant(floor=floor, gain=2.0), resolve_semantics("torch")
    found = algebra.normalize(weight, [random(3), random(4)], variant=variant, semantics=semantics)
    grad = random(3, 4)
    (found_grad,) = torch.autograd.grad(found.weight, weight, grad)
    factor = 2.0 / floor if floor else 2.0
    assert torch.equal(found.weight, torch.zeros_like(weight)) and torch.equal(found_grad, factor * grad)


def test_nothing_is_written_to():
    tensors = [random(4, 3, 2), random(4), random(6), random(3), random(8)]
    before = [x.clone() for x in tensors]
    algebra.normalize(tensors[0], tensors[1:], variant=Variant(0.5, 0.5), semantics=resolve_semantics("paper"))
    assert all(torch.equal(x, old) for x, old in zip(tensors, before))
