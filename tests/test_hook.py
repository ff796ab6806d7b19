"""What torch's own tests check of its old hook, with fuse on top; ``fuse`` and torch's functions in any order."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from nets import close, same, state
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import remove_spectral_norm, spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm

from bssn_kernels.group import fuse, group_of


def fused(layer: nn.Module, *args, **kwargs) -> nn.Module:
    fuse(spectral_norm(layer, *args, **kwargs))
    return layer


def test_attributes():
    layer = fused(nn.Linear(5, 7))
    assert layer.weight_u.shape == (7,) and layer.weight_v.shape == (5,)
    assert set(layer._parameters) == {"weight_orig", "bias"} and set(layer._buffers) == {"weight_u", "weight_v"}
    assert layer.weight_orig.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()
    assert [isinstance(hook, SpectralNorm) for hook in layer._forward_pre_hooks.values()] == [False, True]
    layer(torch.randn(2, 5))
    assert "weight" in layer.__dict__ and layer.weight.requires_grad
    layer = remove_spectral_norm(layer)
    assert "weight" in layer._parameters and not hasattr(layer, "weight_u") and not layer._state_dict_hooks
    with pytest.raises(ValueError, match="spectral_norm of 'weight' not found"):
        remove_spectral_norm(layer)
    layer(torch.randn(2, 5))


def test_a_second_hook_is_refused():
    layer = fused(nn.Linear(5, 7))
    with pytest.raises(RuntimeError, match="Cannot register two spectral_norm hooks"):
        spectral_norm(layer)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_training_and_eval(requires_grad):
    torch.manual_seed(0)
    x = torch.randn(2, 3, dtype=torch.float64)

    def make():
        layer = nn.Linear(3, 4).double()
        layer.weight.requires_grad_(requires_grad)
        return fused(layer)

    layer = make()
    u, v = layer.weight_u.clone(), layer.weight_v.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).sum().backward()
    optimizer.step()
    out = layer(x)
    assert not torch.equal(u, layer.weight_u) and not torch.equal(v, layer.weight_v)
    if requires_grad:
        torch.autograd.grad(out.sum(), layer.weight_orig)

    saved = layer.weight_u.clone(), layer.weight_v.clone()

    def forwards(*modes):
        def run(x):
            layer.weight_u.data.copy_(saved[0]), layer.weight_v.data.copy_(saved[1])
            return sum(layer.train(mode)(x) for mode in modes)

        return run

    assert gradcheck(forwards(True, True), (x.clone().requires_grad_(),), check_batched_grad=False)
    assert gradcheck(forwards(True, False, True, False), (x.clone().requires_grad_(),))
    if requires_grad:
        layer.eval()
        assert gradcheck(lambda weight: layer(x), (layer.weight_orig,))
        assert gradgradcheck(lambda weight: layer(x), (layer.weight_orig,))

    layer = make()
    before = layer(x)
    remove_spectral_norm(layer)
    close(layer(x), before, 1e-12)

    layer = make()
    last = [layer(x) for _ in range(2)][1]
    u, v = layer.weight_u.clone(), layer.weight_v.clone()
    layer.eval()
    close(layer(x), last, 1e-12)
    assert torch.equal(layer.weight_u, u) and torch.equal(layer.weight_v, v)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("eps", [1e-12, 1e-2])
def test_a_naive_forward_gives_the_same(n, eps):
    layer = fused(nn.Linear(5, 7).double(), n_power_iterations=n, eps=eps)
    u, weight = layer.weight_u.clone(), layer.weight_orig.detach()
    for _ in range(n):
        v = F.normalize(weight.T @ u, dim=0, eps=eps)
        u = F.normalize(weight @ v, dim=0, eps=eps)
    x = torch.randn(3, 5, dtype=torch.float64)
    close(layer(x), F.linear(x, weight / torch.dot(u, weight @ v), layer.bias))


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_dim(dim):
    torch.manual_seed(0)
    layer = spectral_norm(nn.ConvTranspose2d(3, 4, (5, 6)).double(), dim=dim)
    expected = spectral_norm(nn.ConvTranspose2d(3, 4, (5, 6)).double(), dim=dim)
    fuse(layer)
    expected.load_state_dict(layer.state_dict())
    assert layer.weight_u.shape == ((3,) if dim == 0 else (4,))
    x = torch.randn(2, 3, 10, 12, dtype=torch.float64)
    for _ in range(2):
        close(layer(x), expected(x))
    close(state(layer), state(expected))


@pytest.mark.parametrize("name", ["bias", "weight_ih_l0"])
def test_other_tensors_and_vectors(name):
    """A vector keeps u and v under the old hook; weights of recurrent layers are just tensors."""
    make = {"bias": lambda: nn.Linear(4, 3), "weight_ih_l0": lambda: nn.RNN(4, 3)}[name]
    layer, expected = make().double(), make().double()
    for module in (layer, expected):
        torch.manual_seed(0)
        spectral_norm(module, name)
    expected.load_state_dict(layer.state_dict())
    assert list(fuse(layer).sigmas()) == [name]
    for training in (True, False):
        layer.train(training)(torch.ones(2, 4).double()), expected.train(training)(torch.ones(2, 4).double())
        close(getattr(layer, name), getattr(expected, name).detach())
    close(state(layer), state(expected))


def test_load_state_dict():
    x = torch.randn(2, 3)
    for times in (0, 3):
        layer = fused(nn.Linear(3, 5))
        for _ in range(times):
            layer(x)
        saved = copy.deepcopy(layer.state_dict())
        assert set(saved) == {"weight_orig", "bias", "weight_u", "weight_v"}
        assert saved._metadata[""]["spectral_norm"] == {"weight.version": 1}
        partial = copy.deepcopy(saved)
        partial["nonsense"] = "nonsense"
        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "nonsense"'):
            layer.load_state_dict(partial, strict=True)
        layer.load_state_dict(partial, strict=False)
        for gone in ("weight_orig", "weight_u", "weight_v"):
            partial.pop(gone)
            layer.load_state_dict(partial, strict=False)
        rewrapped = spectral_norm(remove_spectral_norm(layer))
        rewrapped.load_state_dict(saved)
        again = fused(nn.Linear(3, 5))
        again.load_state_dict(saved)
        for training in (False, True, True, False):
            close(rewrapped.train(training)(x), again.train(training)(x), 1e-5)


def test_pickle_and_save():
    layer = fused(nn.Linear(5, 7))
    layer(torch.randn(1, 5)).sum().backward()
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert isinstance(other, nn.Linear) and group_of(other) is not group_of(layer)
        x = torch.randn(2, 5)
        other.load_state_dict(layer.state_dict())
        close(other(x), copy.deepcopy(layer)(x), 1e-6)
    torch.save(layer, file := io.BytesIO())
    file.seek(0)
    assert same(state(torch.load(file, weights_only=False)), state(layer))


def test_a_copy_after_a_forward_that_was_not_the_roots():
    """The attribute has a place in the graph then; natively the copy fails."""
    net = nn.Sequential(spectral_norm(nn.Linear(3, 3)), spectral_norm(nn.Linear(3, 3)))
    with pytest.raises(RuntimeError, match="deepcopy"):
        net[0](torch.randn(2, 3))
        copy.deepcopy(net)
    fuse(net)
    net[0](torch.randn(2, 3))
    for replica in (copy.deepcopy(net)[0], copy.deepcopy(net[0])):
        assert torch.equal(replica.weight, net[0].weight) and replica.weight is not net[0].weight
        assert not replica.weight.requires_grad


def test_complex_weights_stay_native():
    """torch's old hook does not conjugate; a fused call would give other numbers."""
    net = nn.Sequential(spectral_norm(nn.Linear(3, 2).to(torch.complex64)), spectral_norm(nn.Linear(2, 2)))
    assert fuse(net).native == {"0": "torch's old hook does not conjugate its complex weight"}
