"""torch.jit.trace and torch.export of a fused model in eval, as of a native one."""

import pytest
import torch
from nets import images, native
from torch import nn

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
def test_same_outputs(form: str, how: str):
    net, x = model(form)
    expected = net(x)
    if how == "trace":
        exported = torch.jit.trace(net, (x,), check_trace=False)
    else:
        exported = torch.export.export(net, (x,)).module()
    assert (exported(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
