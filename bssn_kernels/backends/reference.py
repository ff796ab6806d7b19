"""The reference backend: algebra.py layer by layer, for every device and dtype. It is the meaning of the ops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor

from bssn_kernels import algebra
from bssn_kernels.plan import SCALARS, LayerRow, LayerSpec, accumulation_dtype, layer_rows
from bssn_kernels.variants import Semantics, Variant
from bssn_kernels.views import fold, matrix

_SLOT = {name: i for i, name in enumerate(SCALARS)}


def full_precision(function: Callable) -> Callable:
    """Products stay in accumulation dtype where autocast would make them half: it is switched off inside."""

    @wraps(function)
    def wrapped(*args, **kwargs):
        with contextlib.ExitStack() as off:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    off.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return wrapped


class ReferenceBackend:
    """Plain PyTorch: slow and right."""

    name = "reference"
    devices = None

    def unsupported(self, specs: Sequence[LayerSpec] | None = None) -> list[str]:
        """It runs everywhere."""
        return []

    def tables(self, specs: Sequence[LayerSpec]) -> list[Tensor]:
        """Nothing beside the layer table."""
        return []

    @full_precision
    def normalize(
        self,
        weights: Sequence[Tensor],
        vectors: Sequence[Tensor],
        gains: Sequence[Tensor],
        tables: Sequence[Tensor],
        iterations: Sequence[int],
        saved_numel: int,
        output_dtype: torch.dtype | None,
    ) -> tuple[list[Tensor], Tensor]:
        """See ``ops.normalize``."""
        accum = accumulation_dtype(weights[0].dtype)
        saved = torch.zeros(saved_numel, dtype=accum, device=weights[0].device)
        given_vectors, given_gains, normalized = iter(vectors), iter(gains), []
        for row, weight, n in zip(layer_rows(tables[0]), weights, iterations):
            stored = [next(given_vectors).to(accum) for _ in range(2 * row.directions)]
            gain = next(given_gains).to(accum) if row.has_gain else None
            result = algebra.normalize(
                weight.to(accum),
                stored,
                variant=Variant(row.weight_out, row.weight_in, row.floor, row.gain),
                semantics=_semantics(row),
                axis=row.axis,
                n_power_iterations=n,
                eps=row.eps,
                gain=gain,
            )
            for slot, x in zip(_vectors(row, saved), result.vectors):
                slot.copy_(x)
            for slot, x in zip(_starts(row, saved), result.starts):
                slot.copy_(x)
            _fill_scalars(_scalars(row, saved), row, weight.to(accum), result, n, gain)
            out = torch.empty_like(weight, dtype=output_dtype or weight.dtype)
            normalized.append(out.copy_(result.weight))
        return normalized, saved

    @full_precision
    def normalize_backward(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor],
        saved: Tensor,
        tables: Sequence[Tensor],
        layers: Sequence[int],
    ) -> tuple[list[Tensor], Tensor]:
        """See ``ops.normalize_backward``."""
        rows = layer_rows(tables[0])
        grad_weights, grad_gains = [], torch.empty(len(layers), dtype=saved.dtype, device=saved.device)
        for k, (i, grad, weight) in enumerate(zip(layers, grads, weights)):
            row, numbers = rows[i], _scalars(rows[i], saved)
            g, w = grad.to(saved.dtype), weight.to(saved.dtype)
            s = (g * w).sum()
            grad_gains[k] = s * numbers[_SLOT["slope_gain"]]
            total = numbers[_SLOT["multiplier"]] * g
            for d, rank in enumerate(_rank_terms(row, saved, w)):
                slope = numbers[_SLOT["slope_out"] + d]
                term = s * slope * rank
                total = total + torch.where(slope == 0, torch.zeros_like(term), term)
            grad_weights.append(torch.empty_like(weight).copy_(total))
        return grad_weights, grad_gains


def _semantics(row: LayerRow) -> Semantics:
    order, into = ("vu" if vu else "uv" for vu in (row.vu_out, row.vu_in))
    gradient, norm = "through" if row.through else "constant", "add" if row.norm_adds else "max"
    return Semantics(order, norm, "stored", gradient, "forward", "warm", into_order=into)


def _scalars(row: LayerRow, saved: Tensor) -> Tensor:
    return saved[row.scalar_offset : row.scalar_offset + len(SCALARS)]


def _vectors(row: LayerRow, saved: Tensor) -> tuple[Tensor, ...]:
    sizes = [row.rows_out, row.cols_out, row.rows_in, row.cols_in][: 2 * row.directions]
    return saved[row.vector_offset :][: sum(sizes)].split(sizes)


def _starts(row: LayerRow, saved: Tensor) -> list[Tensor]:
    if not row.through:
        return []
    out = saved[row.start_offset_out :][: row.rows_out if row.vu_out else row.cols_out]
    into = saved[row.start_offset_in :][: row.rows_in if row.vu_in else row.cols_in]
    return [out, into][: row.directions]


def _rank_terms(row: LayerRow, saved: Tensor, weight: Tensor) -> list[Tensor]:
    """d sigma / dW of each direction in the shape of the weight."""
    vectors, starts, numbers = _vectors(row, saved), _starts(row, saved), _scalars(row, saved)
    terms = []
    for d, axis in enumerate(algebra.row_axes(weight.ndim, row.axis, row.directions)):
        u, v = vectors[2 * d : 2 * d + 2]
        rank = torch.outer(u, v)
        if starts:
            m = matrix(weight, axis)
            start, residual = numbers[_SLOT["start_out"] + d], numbers[_SLOT["residual_out"] + d]
            if (row.vu_out, row.vu_in)[d]:
                rank = rank + start * torch.outer(starts[d], m.T @ u - residual * v)
            else:
                rank = rank + start * torch.outer(m @ v - residual * u, starts[d])
        terms.append(fold(rank, tuple(weight.shape), axis))
    return terms


def _fill_scalars(
    numbers: Tensor, row: LayerRow, weight: Tensor, result: algebra.Normalized, n: int, gain: Tensor | None
) -> None:
    """Write the SCALARS of one layer: sigmas, multiplier, and the derivatives that the backward needs."""
    variant = Variant(row.weight_out, row.weight_in, row.floor, row.gain)
    shares = algebra.direction_weights(variant, row.directions)
    mean = sum(share * s for share, s in zip(shares, result.sigmas))
    d = algebra.divisor(mean, row.floor)
    fixed = algebra.multiplier(result.sigmas, variant)
    total = fixed if gain is None else fixed * gain.reshape(())
    flat = (d == 0) | (mean <= row.floor if row.floor > 0 else False)
    slope = torch.where(flat, torch.zeros_like(total), -total / torch.where(d == 0, torch.ones_like(d), d))
    numbers[_SLOT["sigma"]] = mean
    numbers[_SLOT["multiplier"]] = total
    numbers[_SLOT["slope_gain"]] = fixed
    for k, (share, sigma) in enumerate(zip(shares, result.sigmas)):
        numbers[_SLOT["sigma_out"] + k] = sigma
        own = slope * share
        if n and row.through:
            alpha, start, residual = _through_factors(row, k, weight, result)
            own = own * alpha
            numbers[_SLOT["start_out"] + k] = start
            numbers[_SLOT["residual_out"] + k] = residual
        if n:
            own = torch.where(sigma == 0, torch.zeros_like(own), own)
        numbers[_SLOT["slope_out"] + k] = own


def _through_factors(row: LayerRow, d: int, weight: Tensor, result: algebra.Normalized) -> tuple[Tensor, ...]:
    """alpha, 1 / den(|x|) and residual of d sigma = alpha (u v^T + u0 r^T / den(|x|)), r = M^T u - residual v.

    Here for order vu; uv mirrors it. x = M^T u0 is the first product of the iteration and y the second,
    den(n) = max(n, eps) or n + eps. Away from eps alpha = 1 and residual = sigma.
    """
    m = matrix(weight, algebra.row_axes(weight.ndim, row.axis, row.directions)[d])
    first, second = (m.T, m) if (row.vu_out, row.vu_in)[d] else (m, m.T)
    x = first @ result.starts[d]
    norm_x = torch.linalg.vector_norm(x)
    den_x, slope_x = _den(norm_x, row)
    norm_y = torch.linalg.vector_norm(second @ (x / den_x))
    den_y, slope_y = _den(norm_y, row)
    return 2 - norm_y * slope_y / den_y, 1 / den_x, result.sigmas[d] * slope_x * den_x / norm_x


def _den(norm: Tensor, row: LayerRow) -> tuple[Tensor, Tensor]:
    """What a product of this norm is divided by, and the derivative of that."""
    if row.norm_adds:
        return norm + row.eps, torch.ones_like(norm)
    return norm.clamp_min(row.eps), (norm > row.eps).to(norm.dtype)


@full_precision
def compose(
    specs: Sequence[LayerSpec],
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    iterations: Sequence[int],
    gains: Sequence[Tensor],
) -> list[algebra.Normalized]:
    """The composed path: the same numbers by differentiable PyTorch, for what a fused kernel cannot follow.

    Used for double backward, complex weights, functorch transforms, batched gradients and tensor subclasses. Takes
    two vectors per direction of every layer; results are in accumulation dtype.
    """
    given_vectors, given_gains, results = iter(vectors), iter(gains), []
    for spec, weight, n in zip(specs, weights, iterations):
        accum = accumulation_dtype(weight.dtype)
        results.append(
            algebra.normalize(
                weight.to(accum),
                [next(given_vectors).to(accum) for _ in range(2 * spec.directions)],
                variant=spec.variant,
                semantics=spec.semantics if spec.stores_vectors else _EXACT,
                axis=spec.axis,
                n_power_iterations=n,
                eps=spec.eps,
                gain=next(given_gains).to(accum) if spec.gain else None,
            )
        )
    return results


@full_precision
def compose_backward(
    spec: LayerSpec,
    grad: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    vectors: Sequence[Tensor],
    starts: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """dW and dgain of one layer by autograd, themselves differentiable in grad, weight and gain.

    ``vectors`` are those of the forward; ``starts``, where the gradient goes through the iteration, what its last
    step started from.
    """
    if not any(t is not None and t.requires_grad for t in (weight, gain)):
        return None, None  # no longer, since the forward
    accum, semantics = accumulation_dtype(weight.dtype), spec.semantics if starts else _CONSTANT
    vectors = list(vectors)
    for d, start in enumerate(starts):
        vectors[2 * d + (spec.semantics.order_of(d) == "uv")] = start
    if not spec.stores_vectors:
        semantics, vectors[1] = _EXACT, torch.ones_like(vectors[1])
    with torch.enable_grad():
        result = algebra.normalize(
            weight.to(accum),
            vectors,
            variant=spec.variant,
            semantics=semantics,
            axis=spec.axis,
            n_power_iterations=int(semantics.gradient == "through"),
            eps=spec.eps,
            gain=None if gain is None else gain.to(accum),
        )
    wanted = [t for t in (weight, gain) if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(result.weight, wanted, grad.to(accum), create_graph=torch.is_grad_enabled()))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in (weight, gain))


_CONSTANT = Semantics("uv", "max", "stored", "constant", "forward", "warm")
# One step of order uv on a (n, 1) matrix is its norm, without error, and through the step so is every derivative.
_EXACT = Semantics("uv", "max", "stored", "through", "forward", "warm")
