"""torch.jit.trace and torch.export of a fused model in eval, as of a native one, and forwards of fake tensors."""

import copy

import pytest
import torch
from nets import images, native
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import spectral_norm as torch_hook
from torch.nn.utils.parametrizations import spectral_norm as torch_parametrization
from torch.utils.checkpoint import checkpoint

from bssn_kernels import spectral_norm
from bssn_kernels.group import fuse, normalize


def model(form: str) -> tuple[nn.Module, torch.Tensor]:
    if form == "linear":
        net = nn.Sequential(nn.Linear(20, 40))
        normalize(net)
        return net.eval(), torch.randn(2, 20)
    net = native(form)
    fuse(net)
    return net.eval(), images(2)


@pytest.mark.filterwarnings("ignore")  # both warn about Python values that they take for constants
@pytest.mark.parametrize("form", ["linear", "parametrization", "hook", "mixed"])
@pytest.mark.parametrize("how", ["trace", "export"])
@pytest.mark.parametrize("first", ["eager", "traced"])
def test_same_outputs(form: str, how: str, first: str):
    """Whichever forward is the first: the tables that it makes serve all that follow."""
    net, x = model(form)
    expected = net(x) if first == "eager" else copy.deepcopy(net)(x)
    if how == "trace":
        exported = torch.jit.trace(net, (x,), check_trace=False)
    else:
        exported = torch.export.export(net, (x,), strict=False).module()
    assert (exported(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for _ in range(2):
        assert torch.equal(net(x), expected)


@pytest.mark.parametrize("wrap", [spectral_norm, torch_parametrization, torch_hook])
def test_a_model_of_fake_tensors(wrap):
    """In a mode that refuses real ones, our tables too."""
    with FakeTensorMode():
        net = nn.Sequential(wrap(nn.Linear(4, 4)), wrap(nn.Linear(4, 3)))
        fuse(net)
        out = net(torch.randn(2, 4))
        out.sum().backward()
    assert out.shape == (2, 3) and all(p.grad.shape == p.shape for p in net.parameters())


@pytest.mark.parametrize("form", ["parametrization", "hook", "mixed"])
def test_a_trace_with_a_checkpoint(form: str):
    """make_fx sees the recomputed weights as functions of the Parameters."""
    net, x = model(form)

    def gradients(*weights):
        values = dict(zip(names, weights))
        out = checkpoint(lambda x: functional_call(net, values, (x,)), x, use_reentrant=False)
        return torch.autograd.grad(out.square().sum(), weights)

    names, weights = zip(*net.named_parameters())
    weights = [w.detach().clone().requires_grad_() for w in weights]
    traced = make_fx(gradients)(*weights)
    others = [(w * 1.5).detach().requires_grad_() for w in weights]
    for found, expected in zip(traced(*others), gradients(*others), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", ["linear", "parametrization", "hook", "mixed", "alone"])
def test_a_forward_of_fake_tensors(form: str):
    """Nothing of it is kept for those of real ones."""
    if form == "alone":
        net, x = nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 3)), spectral_norm(nn.Conv2d(4, 2, 3))).eval(), images(2)
        x = x.float()
    else:
        net, x = model(form)
    expected = copy.deepcopy(net)(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert net(x).shape == expected.shape
    assert torch.equal(net(x), expected)
