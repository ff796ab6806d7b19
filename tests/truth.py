"""What spectral normalization is, written out for one weight in a few lines of float64, apart from the package."""

from typing import NamedTuple

import torch
from torch import Tensor

from bssn_kernels.variants import Variant

# Rows of the table of semantics: order of the out-direction, of the in-direction, norm, gradient through the iteration.
RULES = {
    "torch": ("uv", "vu", "max", False),
    "torch_hook": ("vu", "uv", "max", False),
    "miyato": ("vu", "uv", "add", False),
    "biggan": ("vu", "uv", "max", False),
    "paper": ("vu", "vu", "add", True),
}


class Truth(NamedTuple):
    """``vectors``: u, v of each direction; ``sigmas``: of each direction; ``mean``: what the multiplier divides by."""

    weight: Tensor
    vectors: list[Tensor]
    sigmas: list[Tensor]
    mean: Tensor
    multiplier: Tensor


def as_matrix(weight: Tensor, axis: int) -> Tensor:
    """Rows are ``axis``, columns all other axes in their order."""
    if weight.ndim == 1:
        return weight[:, None]
    others = [i for i in range(weight.ndim) if i != axis]
    return weight.permute(axis, *others).reshape(weight.shape[axis], -1)


def unit(x: Tensor, eps: float, norm: str) -> Tensor:
    length = x.square().sum().sqrt()
    return x / (length + eps if norm == "add" else length.clamp(min=eps))


def directions(shape: tuple[int, ...], variant: Variant) -> int:
    return 2 if len(shape) >= 3 and variant.into else 1


def iterate(m: Tensor, u: Tensor, v: Tensor, order: str, eps: float, norm: str) -> tuple[Tensor, Tensor]:
    if order == "uv":
        u = unit(m @ v, eps, norm)
        return u, unit(m.t() @ u, eps, norm)
    v = unit(m.t() @ u, eps, norm)
    return unit(m @ v, eps, norm), v


def normalize(
    weight: Tensor,
    vectors: list[Tensor],
    *,
    variant: Variant,
    semantics: str = "torch",
    axis: int = 0,
    iterations: int = 1,
    eps: float = 1e-12,
    gain: Tensor | None = None,
) -> Truth:
    """W_bar as a differentiable function of a float64 weight and gain.

    ``vectors`` is empty for a vector under order uv, which is divided by its norm.
    """
    order_out, order_in, norm, through = RULES[semantics]
    if not vectors:
        iterations, vectors, through = 1, [torch.ones_like(weight), torch.ones_like(weight[:1])], True
    new, sigmas = [], []
    for row_axis, order, u, v in zip((axis, 1 - axis), (order_out, order_in), vectors[::2], vectors[1::2]):
        m = as_matrix(weight, row_axis)
        for _ in range(iterations - 1):
            u, v = iterate(m.detach(), u, v, order, eps, norm)
        if iterations:
            u, v = iterate(m if through else m.detach(), u, v, order, eps, norm)
        new += [u.detach(), v.detach()]
        sigmas.append(u @ (m @ v))
    if len(sigmas) == 2:
        mean = variant.out * sigmas[0] + variant.into * sigmas[1]
    else:
        mean = (variant.out + variant.into) * sigmas[0]
    below = variant.floor > 0 and mean.item() <= variant.floor
    multiplier = variant.gain / (variant.floor if below else mean)
    if gain is not None:
        multiplier = multiplier * gain.reshape(())
    return Truth(
        multiplier * weight, new, sigmas, mean.detach(), torch.as_tensor(multiplier, dtype=torch.float64).detach()
    )


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in the Frobenius norm."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm()).item()
