"""Small networks and comparisons for the tests of the user's level."""

import copy

import torch
import torch.nn as nn
from torch.nn.utils import spectral_norm as torch_hook
from torch.nn.utils.parametrizations import spectral_norm as torch_parametrization

from bssn_kernels.group import fuse


def plain(dtype=torch.float64, seed=0) -> nn.Sequential:
    """Convolution, transposed convolution, linear; input (n, 3, 6, 6)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.LeakyReLU(0.1),
        nn.Conv2d(4, 5, 4, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(125, 1),
    ).to(dtype)


LAYERS = ("0", "2", "4", "6")


def native(form: str, dtype=torch.float64, seed=0) -> nn.Sequential:
    """The same under torch's spectral norm: form "parametrization", "hook" or "mixed"."""
    net = plain(dtype, seed)
    for k, name in enumerate(LAYERS):
        hooked = form == "hook" or (form == "mixed" and k % 2)
        (torch_hook if hooked else torch_parametrization)(net[int(name)])
    return net


def scattered(dtype: torch.dtype) -> nn.Sequential:
    """The same under torch's parametrization, its vectors far from where they are going."""
    model = native("parametrization", dtype)
    for name in LAYERS:
        norm = model[int(name)].parametrizations.weight[0]
        for vector in (norm._u, norm._v):
            vector.copy_(nn.functional.normalize(torch.randn(len(vector)), dim=0))
    return model


FORMS = ("parametrization", "hook", "mixed")


def images(n=4, seed=1, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in net.state_dict().items()}


def vectors(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in net.named_buffers()}


def close(a, b, rtol=1e-9) -> None:
    """Relative to the largest element: tensors, or dicts and lists of them."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            close(a[k], b[k], rtol)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            close(x, y, rtol)
    elif a is None or b is None:
        assert a is None and b is None
    else:
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = max(b.abs().max().item(), 1e-30)
        assert (a - b).abs().max().item() <= rtol * scale, f"{(a - b).abs().max().item() / scale} > {rtol}"


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def gradients(net: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def twin(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net)


def raw(layer: nn.Module) -> nn.Parameter:
    return layer.weight_orig if hasattr(layer, "weight_orig") else layer.parametrizations.weight.original


def pair(form: str, make=native) -> list[nn.Module]:
    """A native network and a fused one."""
    nets = [make(form), make(form)]
    fuse(nets[1], backend="cpu")
    return nets


def both(act, form: str, make=native) -> None:
    """Results and states agree."""
    nets = pair(form, make)
    found = [act(net) for net in nets]
    close(found[1], found[0])
    close(state(nets[1]), state(nets[0]))
