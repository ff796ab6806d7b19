"""What torch's own tests ask of its old hook, asked of the fused one."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.utils import remove_spectral_norm
from torch.nn.utils import spectral_norm as native

import bssn_kernels as bk


@pytest.fixture
def wrap(backend):
    """Torch's hook, fused at once."""

    def fused(module: nn.Module, *args, **kwargs) -> nn.Module:
        native(module, *args, **kwargs)
        bk.fuse(module, backend=backend)
        return module

    return fused


def linear(requires_grad: bool = True) -> nn.Linear:
    layer = nn.Linear(3, 4, dtype=torch.float64)
    layer.weight.requires_grad_(requires_grad)
    return layer


def images() -> Tensor:
    return torch.randn(2, 3, dtype=torch.float64)


def test_where_the_tensors_are(wrap):
    layer = wrap(nn.Linear(5, 7, dtype=torch.float64))
    assert layer.weight_u.shape == (7,) and layer.weight_v.shape == (5,)
    assert set(layer._parameters) == {"weight_orig", "bias"} and set(layer._buffers) == {"weight_u", "weight_v"}
    assert "weight" in layer.__dict__, "a plain attribute"
    assert layer.weight_orig.shape == layer.weight.shape and layer.weight_orig.stride() == layer.weight.stride()
    assert layer.weight.untyped_storage().data_ptr() == layer.weight_orig.untyped_storage().data_ptr(), "till a forward"
    remove_spectral_norm(layer)
    assert not hasattr(layer, "weight_orig") and not hasattr(layer, "weight_u") and "weight" in layer._parameters


def test_two_hooks_are_refused(wrap):
    layer = wrap(linear())
    with pytest.raises(RuntimeError, match="register two spectral_norm hooks"):
        native(layer)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_training(wrap, requires_grad):
    layer, x = wrap(linear(requires_grad)), images()
    before = layer.weight_u.clone(), layer.weight_v.clone()
    out = layer(x)
    assert not torch.equal(before[0], layer.weight_u) and not torch.equal(before[1], layer.weight_v)
    if requires_grad:
        (grad,) = torch.autograd.grad(out.sum(), layer.weight_orig)
        assert grad.any()
    start = layer.weight_u.clone(), layer.weight_v.clone()

    def twice(x: Tensor) -> Tensor:
        layer.weight_u.data.copy_(start[0])
        layer.weight_v.data.copy_(start[1])
        return layer(x) + layer(x)

    assert gradcheck(twice, (x.clone().requires_grad_(),), check_batched_grad=False)


@pytest.mark.parametrize("forwards", [1, 3])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_removal_keeps_the_output(wrap, requires_grad, forwards):
    """Torch's removal does not iterate, in training either."""
    layer, x = linear(requires_grad), images()
    for _ in range(2):
        wrap(layer)
        for _ in range(forwards):
            out = layer(x)
        remove_spectral_norm(layer)
        torch.testing.assert_close(layer(x).detach(), out.detach())
        assert "weight" in layer._parameters and not hasattr(layer, "weight_orig")


@pytest.mark.parametrize("requires_grad", [True, False])
def test_eval(wrap, requires_grad):
    layer, x = wrap(linear(requires_grad)), images()
    layer(x)
    out, last = layer(x), (layer.weight_u.clone(), layer.weight_v.clone())
    layer.eval()
    torch.testing.assert_close(layer(x), out)
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(last[0], layer.weight_u) and torch.equal(last[1], layer.weight_v)

    def mixed(x: Tensor) -> Tensor:
        layer.weight_u.data.copy_(last[0])
        layer.weight_v.data.copy_(last[1])
        total = 0
        for training in (True, False, True, False):
            layer.train(training)
            total = total + layer(x)
        return total

    assert gradcheck(mixed, (x.clone().requires_grad_(),))
    if requires_grad:
        assert gradcheck(lambda weight: layer(x), (layer.weight_orig,))


def replay(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Eval, two training forwards, eval."""
    outs = []
    with torch.no_grad():
        for training in (False, True, True, False):
            layer.train(training)
            outs.append(layer(x))
    layer.train()
    return outs


@pytest.mark.parametrize("forwards", [0, 3])
def test_state_dict(wrap, forwards):
    x, layer = torch.randn(2, 3), wrap(nn.Linear(3, 5))
    for _ in range(forwards):
        layer(x)
    state = copy.deepcopy(layer.state_dict())
    assert set(state) == {"weight_orig", "bias", "weight_u", "weight_v"}
    assert "spectral_norm" in state._metadata[""]

    partial = copy.deepcopy(state)
    partial["nonsense"] = "nonsense"
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "nonsense"'):
        layer.load_state_dict(partial)
    layer.load_state_dict(partial, strict=False)
    for key in ("weight_orig", "weight_u", "weight_v"):
        del partial[key]
        layer.load_state_dict(partial, strict=False)
    partial["weight"] = layer.weight.detach().clone()
    layer.load_state_dict(partial, strict=False)
    del partial._metadata[""]["spectral_norm"]
    layer.load_state_dict(partial, strict=False)
    del partial["weight"], partial["bias"]
    layer.load_state_dict(partial, strict=False)

    first_version = copy.deepcopy(state)  # without v, with the weight as a buffer, before versions were written
    del first_version._metadata[""]["spectral_norm"], first_version["weight_v"]
    first_version["weight"] = layer.weight.detach().clone()
    without_metadata = copy.deepcopy(state)
    del without_metadata._metadata[""]["spectral_norm"]

    outs = []
    for given in (state, without_metadata, state):
        remove_spectral_norm(layer)
        wrap(layer)
        layer.load_state_dict(given)
        outs.append(replay(layer, x))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*outs))
    if forwards:  # its v is solved for, on the assumption that there was a forward
        remove_spectral_norm(layer)
        wrap(layer)
        layer.load_state_dict(first_version)
        torch.testing.assert_close(replay(layer, x), outs[0])


def test_state_dict_goes_to_native_and_back(wrap):
    x = images()
    ours, theirs = wrap(linear()), native(linear())
    theirs.load_state_dict(ours.state_dict())
    for a, b in zip(replay(ours, x), replay(theirs, x)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-13)


def test_transposed_convolution(wrap):
    layer = wrap(nn.ConvTranspose2d(3, 4, (5, 6)))
    layer(torch.randn(2, 3, 10, 12))
    assert layer.weight_u.shape == (4,)


def test_against_a_forward_written_out(wrap):
    x, layer = torch.randn(3, 5), wrap(nn.Linear(5, 7))
    weight, u = layer.weight_orig, layer.weight_u
    v = F.normalize(torch.mv(weight.t(), u), dim=0, eps=1e-12)
    u = F.normalize(torch.mv(weight, v), dim=0, eps=1e-12)
    expected = F.linear(x, weight / torch.dot(u, torch.mv(weight, v)), layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_pickle(wrap):
    layer, x = wrap(nn.Linear(5, 7)), torch.randn(2, 5)
    layer(x)
    again = pickle.loads(pickle.dumps(layer))
    assert isinstance(again, nn.Linear)
    assert torch.equal(layer.eval()(x), again.eval()(x))


def test_copies_after_a_forward(wrap):
    """Natively refused while the weight has a place in the graph; a copy goes its own way."""
    layer, x = wrap(linear()), images()
    layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and torch.equal(twin.weight_u, layer.weight_u)
    twin(x)
    assert not torch.equal(twin.weight_u, layer.weight_u)


def test_restored_layers_are_torchs(backend):
    """What fuse changed, restore changes back: type of the hook, numbers, torch's removal."""
    layer, x = native(linear()), images()
    group = bk.fuse(layer, backend=backend)
    layer(x)
    twin = native(linear())
    twin.load_state_dict(layer.state_dict())
    group.restore()
    (hook,) = layer._forward_pre_hooks.values()
    assert type(hook) is type(next(iter(twin._forward_pre_hooks.values())))
    assert all(map(torch.equal, replay(layer, x), replay(twin, x)))
    remove_spectral_norm(layer)
