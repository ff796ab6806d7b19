"""torch.jit.trace and torch.export of a fused model in eval, as of a native one, and forwards of fake tensors."""

import copy

import pytest
import torch
from nets import images, native
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

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
        exported = torch.export.export(net, (x,)).module()
    assert (exported(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for _ in range(2):
        assert torch.equal(net(x), expected)


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
