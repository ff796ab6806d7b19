"""What torch's own tests ask of its parametrization, asked of ours: one layer alone, and torch's own layer fused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as native

import bssn_kernels as bk


@pytest.fixture(params=[False, True], ids=["keep", "swap"])
def swap(request):
    """torch's future way of moving parameters: two tensors exchange their contents."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.fixture(params=["alone", "fused"])
def wrap(request, backend):
    """Ours in the place of ``torch.nn.utils.parametrizations.spectral_norm``."""

    def alone(module: nn.Module, name: str = "weight", **kwargs) -> nn.Module:
        return bk.spectral_norm(module, name, backend=backend, **kwargs)

    def fused(module: nn.Module, name: str = "weight", **kwargs) -> nn.Module:
        native(module, name, **kwargs)
        bk.fuse(module, backend=backend)
        return module

    return alone if request.param == "alone" else fused


def vectors(module: nn.Module) -> list[Tensor]:
    norm = module.parametrizations.weight[0]
    return [norm._u, norm._v]


def linear(requires_grad: bool = True) -> nn.Linear:
    layer = nn.Linear(3, 4, dtype=torch.float64)
    layer.weight.requires_grad_(requires_grad)
    return layer


def test_where_the_tensors_are(wrap, swap):
    layer = wrap(nn.Linear(5, 7, dtype=torch.float64))
    weights, norm = layer.parametrizations.weight, layer.parametrizations.weight[0]
    assert "original" in weights._parameters and set(norm._buffers) == {"_u", "_v"}
    assert norm._u.shape == (7,) and norm._v.shape == (5,)
    assert layer.weight is not None and "weight" not in layer._buffers and "weight" not in layer._parameters
    assert weights.original.shape == layer.weight.shape and weights.original.stride() == layer.weight.stride()
    parametrize.remove_parametrizations(layer, "weight")
    assert not hasattr(layer, "parametrizations") and "weight" in layer._parameters
    assert type(layer) is nn.Linear


def test_several_on_one_module(backend, swap):
    """Twice on the weight, once on the bias; they go one tensor at a time."""
    layer = nn.Linear(5, 7, dtype=torch.float64)
    for name in ("weight", "weight", "bias"):
        bk.spectral_norm(layer, name, backend=backend)
    assert len(layer.parametrizations.weight) == 2
    torch.testing.assert_close(layer.bias.norm(), torch.ones((), dtype=torch.float64))
    parametrize.remove_parametrizations(layer, "bias")
    assert "bias" in layer._parameters and hasattr(layer, "parametrizations") and "weight" not in layer._parameters
    parametrize.remove_parametrizations(layer, "weight")
    assert not parametrize.is_parametrized(layer) and "weight" in layer._parameters


@pytest.mark.parametrize("requires_grad", [True, False])
def test_training(wrap, swap, requires_grad):
    """Vectors move with the weight; gradients reach what they should, also through two forwards."""
    layer, x = wrap(linear(requires_grad)), torch.randn(2, 3, dtype=torch.float64)
    before = [v.clone() for v in vectors(layer)]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).sum().backward()
    optimizer.step()
    out = layer(x)
    if requires_grad:
        assert not any(map(torch.equal, before, vectors(layer)))
        (grad,) = torch.autograd.grad(out.sum(), layer.parametrizations.weight.original)
        assert grad.any()
    start = [v.clone() for v in vectors(layer)]

    def twice(x: Tensor) -> Tensor:
        for vector, saved in zip(vectors(layer), start):
            vector.data.copy_(saved)
        return layer(x) + layer(x)

    twice(x.clone().requires_grad_()).sum().backward()
    assert gradcheck(twice, (x.clone().requires_grad_(),), check_batched_grad=False)


@pytest.mark.parametrize("forwards", [1, 3])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_removal_in_eval_keeps_the_output(wrap, swap, requires_grad, forwards):
    """Removing reads the weight once more, which would iterate in training."""
    layer, x = linear(requires_grad), torch.randn(2, 3, dtype=torch.float64)
    for _ in range(2):  # the second time on what the first one left
        wrap(layer)
        for _ in range(forwards):
            out = layer(x).detach()
        layer.eval()
        parametrize.remove_parametrizations(layer, "weight")
        torch.testing.assert_close(layer(x).detach(), out)
        layer.train()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_eval(wrap, swap, requires_grad):
    """The last training forward's result, again and again; vectors stay."""
    layer, x = wrap(linear(requires_grad)), torch.randn(2, 3, dtype=torch.float64)
    layer(x)
    out, last = layer(x), [v.clone() for v in vectors(layer)]
    layer.eval()
    torch.testing.assert_close(layer(x), out)
    assert torch.equal(layer(x), layer(x)) and all(map(torch.equal, last, vectors(layer)))

    def mixed(x: Tensor) -> Tensor:
        for vector, saved in zip(vectors(layer), last):
            vector.data.copy_(saved)
        total = 0
        for training in (True, False, True, False):
            layer.train(training)
            total = total + layer(x)
        return total

    assert gradcheck(mixed, (x.clone().requires_grad_(),))
    if requires_grad:
        assert gradcheck(lambda weight: layer(x), (layer.parametrizations.weight.original,))


@pytest.mark.parametrize("forwards", [0, 3])
def test_state_dict(wrap, swap, forwards):
    x, layer = torch.randn(2, 3), wrap(nn.Linear(3, 5))
    for _ in range(forwards):
        layer(x)
    state = copy.deepcopy(layer.state_dict())
    prefix = "parametrizations.weight"
    assert set(state) == {"bias", f"{prefix}.original", f"{prefix}.0._u", f"{prefix}.0._v"}

    partial = copy.deepcopy(state)
    partial["nonsense"] = "nonsense"
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "nonsense"'):
        layer.load_state_dict(partial)
    layer.load_state_dict(partial, strict=False)
    for key in (f"{prefix}.original", f"{prefix}.0._u", f"{prefix}.0._v"):
        del partial[key]
        layer.load_state_dict(partial, strict=False)
    partial["weight"] = layer.weight.detach().clone()
    layer.load_state_dict(partial, strict=False)
    del partial._metadata[f"{prefix}.0"]
    layer.load_state_dict(partial, strict=False)
    del partial["weight"], partial["bias"]
    layer.load_state_dict(partial, strict=False)

    outs = []
    for _ in range(2):  # on a layer that was unwrapped and wrapped again
        parametrize.remove_parametrizations(layer, "weight")
        wrap(layer)
        layer.load_state_dict(state)
        found = []
        with torch.no_grad():
            for training in (False, True, True, False):
                layer.train(training)
                found.append(layer(x))
        layer.train()
        outs.append(found)
    assert all(map(torch.equal, *outs))


@pytest.mark.parametrize("forwards", [0, 3])
def test_state_dict_goes_to_native_and_back(wrap, forwards):
    x = torch.randn(2, 3, dtype=torch.float64)
    ours, theirs = wrap(linear()), native(linear())
    for _ in range(forwards):
        ours(x)
    theirs.load_state_dict(ours.state_dict())
    for training in (False, True, True, False):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=1e-12, atol=1e-13)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-13)


def test_transposed_convolution(wrap, swap):
    """Its output channels are axis 1."""
    layer = wrap(nn.ConvTranspose2d(3, 4, (5, 6)))
    layer(torch.randn(2, 3, 10, 12))
    assert layer.parametrizations.weight[0]._u.shape == (4,)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_dim(wrap, dim):
    layer = wrap(nn.Conv1d(4, 6, 5), dim=dim)
    layer(torch.randn(2, 4, 7))
    assert vectors(layer)[0].shape == ((6, 4, 5)[dim],)


def test_against_a_forward_written_out(wrap, swap):
    x, layer = torch.randn(3, 5), wrap(nn.Linear(5, 7))
    weight, v = layer.parametrizations.weight.original, vectors(layer)[1]
    u = F.normalize(torch.mv(weight, v), dim=0, eps=1e-12)
    v = F.normalize(torch.mv(weight.t(), u), dim=0, eps=1e-12)
    expected = F.linear(x, weight / torch.dot(u, torch.mv(weight, v)), layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_the_top_singular_value(wrap, swap):
    """Of a diagonal matrix it is the largest entry."""
    layer = nn.Linear(2, 2)
    diagonal = layer.weight.detach().diagonal().clone()
    layer.weight = nn.Parameter(torch.diag(diagonal))
    torch.testing.assert_close(wrap(layer).weight.detach(), torch.diag(diagonal / diagonal.abs().max()))


def test_the_top_singular_value_of_a_complex_matrix(monkeypatch, swap):
    """No fused backend knows complex numbers: plain PyTorch takes them."""
    monkeypatch.delenv("BSSN_STRICT", raising=False)
    layer = nn.Linear(2, 2, dtype=torch.cfloat)
    diagonal = layer.weight.detach().diagonal().clone()
    layer.weight = nn.Parameter(torch.diag(diagonal))
    bk.spectral_norm(layer)
    torch.testing.assert_close(layer.weight.detach(), torch.diag(diagonal / diagonal.abs().max()))
    layer.weight.abs().sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()
