"""The truth: spectral normalization of ONE weight in plain PyTorch.

Every function works in any floating or complex dtype, is differentiable (twice) in its tensors, and mutates nothing.
Every backend must agree with this file in float64; DESIGN words: fused equals composed.

Notation: M is the matrix of one direction, u [rows], v [cols], sigma = u^H M v. Sources: Miyato et al. 2018,
algorithm 1; Lin, Sekar, Fanti 2021, section 4 (bidirectional) and section 3 (scaled).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bssn_kernels.variants import Semantics, Variant
from bssn_kernels.views import matrix, other_channel_axis

WARM_UP_ITERATIONS = 15


def unit(x: Tensor, eps: float, norm: str) -> Tensor:
    """``x / max(|x|, eps)`` for norm ``"max"``, ``x / (|x| + eps)`` for ``"add"``."""
    if norm == "max":
        return F.normalize(x, dim=0, eps=eps)
    return x / (torch.linalg.vector_norm(x) + eps)


def power_iterate(
    m: Tensor, u: Tensor, v: Tensor, *, n_power_iterations: int, order: str, eps: float = 1e-12, norm: str = "max"
) -> tuple[Tensor, Tensor]:
    """Run the power iteration on a matrix.

    Args:
        m: (rows, cols).
        u, v: (rows,), (cols,); order ``"uv"`` starts from v, ``"vu"`` from u.

    Returns:
        The new u (rows,) and v (cols,).
    """
    for _ in range(n_power_iterations):
        if order == "uv":
            u = unit(m @ v, eps, norm)
            v = unit(m.mH @ u, eps, norm)
        else:
            v = unit(m.mH @ u, eps, norm)
            u = unit(m @ v, eps, norm)
    return u, v


def sigma(m: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``u^H M v``, 0-dimensional."""
    return torch.vdot(u, m @ v)


def usable(x: Tensor) -> Tensor:
    """Whether every element is finite and one is not zero; a 0-dimensional bool tensor."""
    return torch.isfinite(x).all() & (x != 0).any()


def settle(new: Tensor, stored: Tensor, ok: Tensor) -> Tensor:
    """The vector to store: the new one if its iteration went well, else the stored one, else ones / sqrt(n).

    One zero or non-finite step must not poison the state for ever.
    """
    fallback = torch.where(usable(stored), stored, torch.full_like(stored, stored.numel() ** -0.5))
    return torch.where(ok, new, fallback)


def divisor(mean: Tensor, floor: float) -> Tensor:
    """``max(floor, mean)``; with floor 0 the mean as it is, also where untrained vectors make it negative."""
    if floor == 0:
        return mean
    return torch.where(mean.real <= floor, torch.full_like(mean, floor), mean)


def multiplier(sigmas: Sequence[Tensor], variant: Variant, gain: Tensor | None = None) -> Tensor:
    """``gain / max(floor, mean)``, 0-dimensional; the gain alone where the divisor is 0, so that nothing is NaN."""
    weights = direction_weights(variant, len(sigmas))
    d = divisor(sum(w * s for w, s in zip(weights, sigmas)), variant.floor)
    zero = d == 0
    factor = variant.gain / torch.where(zero, torch.ones_like(d), d)
    factor = torch.where(zero, torch.full_like(d, variant.gain), factor)
    return factor if gain is None else factor * gain.reshape(())


def direction_weights(variant: Variant, directions: int) -> tuple[float, ...]:
    """Weights of the sigmas in the mean; with one direction both sigmas are the same number."""
    return (variant.out + variant.into,) if directions == 1 else (variant.out, variant.into)


class Normalized(NamedTuple):
    """Result of :func:`normalize`."""

    weight: Tensor
    vectors: list[Tensor]
    sigmas: list[Tensor]
    multiplier: Tensor
    starts: list[Tensor]


def row_axes(ndim: int, axis: int, directions: int) -> tuple[int, ...]:
    """Logical row axis of each direction."""
    return (axis,) if directions == 1 else (axis, other_channel_axis(axis))


def normalize(
    weight: Tensor,
    vectors: Sequence[Tensor],
    *,
    variant: Variant,
    semantics: Semantics,
    axis: int = 0,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    gain: Tensor | None = None,
) -> Normalized:
    """Normalize one weight.

    Args:
        weight: at least one axis.
        vectors: u (rows,), v (cols,) of the out-direction, then of the in-direction if there is one.
        n_power_iterations: 0 uses the vectors as they are.
        gain: learnable factor with one element.

    Returns:
        ``weight`` W_bar in the shape of the weight; ``vectors`` the new vectors, without gradient; ``sigmas`` one per
        direction, ``multiplier`` m; ``starts`` what the last iteration of each direction started from (u for order
        vu, v for uv).
    """
    axes = row_axes(weight.ndim, axis, len(vectors) // 2)
    new, sigmas, starts = [], [], []
    for d, row_axis in enumerate(axes):
        m, order = matrix(weight, row_axis), semantics.order_of(d)
        stored = vectors[2 * d], vectors[2 * d + 1]
        rule = {"order": order, "eps": eps, "norm": semantics.norm}
        with torch.no_grad():
            before = power_iterate(m, *stored, n_power_iterations=max(n_power_iterations - 1, 0), **rule)
        last = min(n_power_iterations, 1)
        if semantics.gradient == "through":
            u, v = power_iterate(m, *before, n_power_iterations=last, **rule)
        else:
            with torch.no_grad():
                u, v = power_iterate(m, *before, n_power_iterations=last, **rule)
        s = sigma(m, u, v)
        sigmas.append(s)
        starts.append(before[1] if order == "uv" else before[0])
        with torch.no_grad():
            ok = usable(s.detach())
            for fresh, old in zip((u, v), stored):
                new.append(settle(fresh, old, ok) if n_power_iterations else old.clone())
    m = multiplier(sigmas, variant, gain)
    return Normalized(m * weight, new, sigmas, m, starts)
