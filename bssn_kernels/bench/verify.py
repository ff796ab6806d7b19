"""No number on a wrong result: what a provider computes is compared with float64 before it is timed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bssn_kernels.algebra import multiplier, power_iterate, row_axes, sigma
from bssn_kernels.bench.providers import Root, Site
from bssn_kernels.variants import Variant, resolve_semantics, resolve_variant
from bssn_kernels.views import fold, matrix

# Native torch does everything in the dtype of the weights, vectors included, so it is given their rounding.
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
TOLERANCE = 1e-4
CHUNK = 1 << 19


class Errors(NamedTuple):
    """Largest relative error (Frobenius) of any layer's normalized weight and gradient, and the layers' names."""

    weight: float
    weight_layer: str
    grad: float
    grad_layer: str

    def refusal(self, dtype: torch.dtype) -> str:
        """Why these numbers are too far off for weights of this dtype, or nothing. NaN is too far off."""
        limit = TOLERANCES.get(dtype, TOLERANCE)
        what = []
        if not self.weight <= limit:
            what.append(f"normalized weight of {self.weight_layer} off by {self.weight:.1e}")
        if not self.grad <= limit:
            what.append(f"gradient of {self.grad_layer} off by {self.grad:.1e}")
        return f"wrong numbers: {', '.join(what)} (limit {limit:.0e})" if what else ""


def compare(root: Root, variant: str, grads: Sequence[Tensor]) -> Errors:
    """Run one forward and backward of the root and compare it, layer by layer, with the truth in float64.

    Args:
        grads: gradient of each normalized weight.

    Raises:
        ValueError: the number or a shape of the results is not that of the weights.
    """
    originals = root.originals()
    for weight in originals:
        weight.grad = None
    # Taken now: the forward moves them.
    vectors = [[v.double().clone() for v in of_layer] for of_layer in root.vectors()]
    outputs = root()
    shapes, expected = [tuple(w.shape) for w in outputs], [tuple(w.shape) for w in originals]
    if shapes != expected:
        raise ValueError(f"expected normalized weights of shapes {expected}, got {shapes}")
    torch.autograd.backward(outputs, list(grads))

    # Layers that share a Parameter share its gradient: they are compared together, by the sum of their truths.
    sharers: dict[int, list[Truth]] = {}
    weight_errors, grad_errors = [], []
    left = Counter(map(id, originals))
    for site, weight, output, stored, grad in zip(root.sites, originals, outputs, vectors, grads):
        truth = Truth.of(weight, stored, grad, site, resolve_variant(variant))
        rows = list(row_chunks(weight))
        error = join(norm(truth.weight_error(output.detach()[r], r)) for r in rows)
        weight_errors.append((relative(error, abs(truth.multiplier) * norm(weight)), site.name))
        together = sharers.setdefault(id(weight), [])
        together.append(truth)
        left[id(weight)] -= 1
        if left[id(weight)] == 0:
            computed = torch.zeros_like(weight) if weight.grad is None else weight.grad
            error = join(norm(errors_of_sum(together, computed[r], r)) for r in rows)
            # dW can be small by cancellation (it is 0 for a single element): errors count against m G.
            scale = sum(abs(t.multiplier) * norm(t.grad) for t in together)
            grad_errors.append((relative(error, scale), site.name))
            weight.grad = None
            del sharers[id(weight)]
    return Errors(*worst(weight_errors), *worst(grad_errors))


@dataclass(frozen=True)
class Truth:
    """One layer in float64: numbers and vectors, from which normalized weight and gradient follow row by row.

    The gradient in closed form, m G + <G, W> dm/dsigma u v^T for each direction. In pieces, and element by element in
    float32 (float64 for such weights), whose rounding is far below what is tolerated: whole float64 copies of layers of
    100 MB would take longer than all that is timed.
    """

    weight: Tensor
    grad: Tensor
    multiplier: float
    ranks: list[tuple[int, Tensor, Tensor]]

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, vectors: list[Tensor], grad: Tensor, site: Site, variant: Variant) -> Truth:
        """From the weight and its stored vectors before the call, and the gradient of the normalized weight."""
        wide, semantics = weight.detach().double(), resolve_semantics(site.semantics)
        if not vectors:
            # A 1-D weight without state is a matrix of one column: one step from any v is exact.
            vectors = [wide.new_zeros(wide.numel()), wide.new_ones(1)]
        axes = row_axes(wide.ndim, site.axis, len(vectors) // 2)
        pairs, sigmas = [], []
        for d, row_axis in enumerate(axes):
            m = matrix(wide, row_axis)
            rule = {"order": semantics.order_of(d), "eps": site.eps, "norm": semantics.norm}
            u, v = vectors[2 * d : 2 * d + 2]
            u, v = power_iterate(m, u, v, n_power_iterations=site.n_power_iterations, **rule)
            pairs.append((u, v))
            sigmas.append(sigma(m, u, v))
        with torch.enable_grad():
            sigmas = [s.requires_grad_() for s in sigmas]
            factor = multiplier(sigmas, variant)
            slopes = torch.autograd.grad(factor, sigmas)
        inner = sum(float((grad[r].double() * wide[r]).sum()) for r in row_chunks(weight))
        exact = torch.promote_types(weight.dtype, torch.float32)
        ranks = [
            (axis, (u * (inner * slope)).to(exact), v.to(exact)) for axis, (u, v), slope in zip(axes, pairs, slopes)
        ]
        return cls(weight.detach(), grad, float(factor), ranks)

    def weight_error(self, computed: Tensor, rows: slice) -> Tensor:
        """Some rows (of axis 0) of a normalized weight less what they should be."""
        return computed - self.multiplier * self.weight[rows].to(self.ranks[0][1].dtype)

    def subtract_grad(self, computed: Tensor, rows: slice) -> Tensor:
        """Some rows (of axis 0) of a gradient less what they should be, or what this layer has its part in."""
        error = computed - self.multiplier * self.grad[rows].to(self.ranks[0][1].dtype)
        for row_axis, u, v in self.ranks:
            if row_axis == 0:
                u = u[rows]
            else:
                # Axis 0 is then the outermost of the columns.
                v = v.view(len(self.weight), -1)[rows].flatten()
            error -= fold(torch.outer(u, v), tuple(error.shape), row_axis)
        return error


def errors_of_sum(truths: Sequence[Truth], computed: Tensor, rows: slice) -> Tensor:
    """Some rows of the gradient of a weight that several layers share less what they should be."""
    for truth in truths:
        computed = truth.subtract_grad(computed, rows)
    return computed


def row_chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of axis 0 with about CHUNK elements."""
    step = max(1, CHUNK * len(weight) // weight.numel())
    return (slice(i, i + step) for i in range(0, len(weight), step))


def join(norms: Iterable[float]) -> float:
    """Norm of the whole from the norms of its parts."""
    return math.sqrt(sum(n * n for n in norms))


def relative(error: float, scale: float) -> float:
    """The error in units of the scale; as it is where that is 0, as with zero weights."""
    return error / scale if scale else error


def norm(x: Tensor) -> float:
    """Frobenius norm, in float32 at least."""
    return float(torch.linalg.vector_norm(x.detach(), dtype=torch.promote_types(x.dtype, torch.float32)))


def worst(errors: list[tuple[float, str]]) -> tuple[float, str]:
    """The largest error, where NaN is larger than all."""
    return max(errors, key=lambda error: float("inf") if error[0] != error[0] else error[0])
