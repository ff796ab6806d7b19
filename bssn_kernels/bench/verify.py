"""No number on a wrong result: what a provider computes is compared with float64 before it is timed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import bssn_kernels
from bssn_kernels.algebra import direction_weights, multiplier, power_iterate, row_axes, sigma
from bssn_kernels.bench.providers import Root, Site, tasks_of
from bssn_kernels.bench.task import Task
from bssn_kernels.variants import Variant, resolve_semantics, resolve_variant
from bssn_kernels.views import fold, matrix

# Native torch does everything in the dtype of the weights, vectors included, so it is given their rounding.
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
TOLERANCE = 1e-4
CHUNK = 1 << 19


class Errors(dict[str, tuple[float, str]]):
    """The largest relative error (Frobenius) of any layer, and that layer, by what was compared.

    "weight" and "grad" always; "gain" (its gradient) and "sigma" where there are any. NaN is the largest of all.
    """

    @property
    def largest(self) -> float:
        return worst(list(self.values()))[0]

    def refusal(self, dtype: torch.dtype) -> str:
        """Why these numbers are too far off for weights of this dtype, or nothing."""
        limit = TOLERANCES.get(dtype, TOLERANCE)
        wrong = [f"{WORDS[what]} {name} off by {e:.1e}" for what, (e, name) in self.items() if not e <= limit]
        return f"wrong numbers: {', '.join(wrong)} (limit {limit:.0e})" if wrong else ""


WORDS = {
    "weight": "normalized weight of",
    "grad": "gradient of",
    "gain": "gradient of the gain of",
    "sigma": "sigma of",
}


def compare(root: Root, variant: str, grads: Sequence[Tensor], task: Task | None = None) -> Errors:
    """Run one forward and backward of the root and compare it, layer by layer, with the truth in float64.

    Args:
        grads: gradient of each normalized weight.
        task: what runs them; None makes it.

    Raises:
        ValueError: the number or a shape of the results is not that of the weights.
    """
    task = task or tasks_of(root, grads)["both"]
    originals, gains = root.originals(), root.gains()
    task.reset()
    # Taken now: the forward moves them.
    vectors = [[v.double().clone() for v in of_layer] for of_layer in root.vectors()]
    outputs = task.run()
    shapes, expected = [tuple(w.shape) for w in outputs], [tuple(w.shape) for w in originals]
    if shapes != expected:
        raise ValueError(f"expected normalized weights of shapes {expected}, got {shapes}")
    group = bssn_kernels.group_of(root)
    sigmas = group.sigmas() if group else {}

    found: dict[str, list[tuple[float, str]]] = {"weight": [], "grad": []}
    # Layers that share a Parameter share its gradient: they are compared together, by the sum of their truths.
    sharers: dict[int, list[Truth]] = {}
    left = Counter(map(id, originals))
    for site, weight, output, stored, gain, grad in zip(root.sites, originals, outputs, vectors, gains, grads):
        truth = Truth.of(weight, stored, grad, site, resolve_variant(variant), gain)
        rows = list(row_chunks(weight))
        error = join(norm(truth.weight_error(output.detach()[r], r)) for r in rows)
        found["weight"].append((relative(error, abs(truth.multiplier) * norm(weight)), site.name))
        if gain is not None:
            exact = truth.inner * truth.multiplier / float(gain.detach())
            error = abs(float("nan") if gain.grad is None else float(gain.grad) - exact)
            scale = abs(truth.multiplier) * norm(weight) * norm(grad)
            found.setdefault("gain", []).append((relative(error, scale), site.name))
        if sigmas:
            error = abs(float(sigmas.get(layer_name(site), float("nan"))) - truth.sigma)
            found.setdefault("sigma", []).append((relative(error, abs(truth.sigma)), site.name))
        together = sharers.setdefault(id(weight), [])
        together.append(truth)
        left[id(weight)] -= 1
        if left[id(weight)] == 0:
            computed = torch.zeros_like(weight) if weight.grad is None else weight.grad
            error = join(norm(errors_of_sum(together, computed[r], r)) for r in rows)
            # dW can be small by cancellation (it is 0 for a single element): errors count against m G.
            scale = sum(abs(t.multiplier) * norm(t.grad) for t in together)
            found["grad"].append((relative(error, scale), site.name))
            del sharers[id(weight)]
    task.reset()
    return Errors({what: worst(errors) for what, errors in found.items()})


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
    sigma: float
    inner: float
    ranks: list[tuple[int, Tensor, Tensor]]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        weight: Tensor,
        vectors: list[Tensor],
        grad: Tensor,
        site: Site,
        variant: Variant,
        gain: Tensor | None = None,
    ) -> Truth:
        """From the weight and its stored vectors before the call, and the gradient of the normalized weight."""
        wide, semantics = weight.detach().double(), resolve_semantics(site.semantics)
        if not vectors:
            # A 1-D weight without state is a matrix of one column: one step from any v is exact.
            vectors = [wide.new_zeros(wide.numel()), wide.new_ones(1)]
        axes = row_axes(wide.ndim, site.axis, len(vectors) // 2)
        k = site.n_power_iterations
        pairs, sigmas = [], []  # pairs: d, and the factors of a term of the gradient of sigma_d
        for d, row_axis in enumerate(axes):
            m = matrix(wide, row_axis)
            rule = {"order": semantics.order_of(d), "eps": site.eps, "norm": semantics.norm}
            u0, v0 = power_iterate(m, *vectors[2 * d : 2 * d + 2], n_power_iterations=max(k - 1, 0), **rule)
            u, v = power_iterate(m, u0, v0, n_power_iterations=min(k, 1), **rule)
            pairs.append((d, u, v))
            sigmas.append(sigma(m, u, v))
            # The term that a gradient through the last iteration has besides u v^T.
            if semantics.gradient == "through" and k and rule["order"] == "vu":
                pairs.append((d, u0 / (m.T @ u0).norm(), m.T @ u - sigmas[d] * v))
            elif semantics.gradient == "through" and k:
                pairs.append((d, m @ v - sigmas[d] * u, v0 / (m @ v0).norm()))
        with torch.enable_grad():
            sigmas = [s.requires_grad_() for s in sigmas]
            factor = multiplier(sigmas, variant, None if gain is None else gain.detach().double())
            slopes = torch.autograd.grad(factor, sigmas)
        mean = sum(share * float(s) for share, s in zip(direction_weights(variant, len(axes)), sigmas))
        inner = sum(float((grad[r].double() * wide[r]).sum()) for r in row_chunks(weight))
        exact = torch.promote_types(weight.dtype, torch.float32)
        ranks = [(axes[d], (u * (inner * slopes[d])).to(exact), v.to(exact)) for d, u, v in pairs]
        return cls(weight.detach(), grad, float(factor), mean, inner, ranks)

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


def layer_name(site: Site) -> str:
    """The site's layer, as a group on a Root names it."""
    parts = ["model", site.module, "" if site.tensor == "weight" else site.tensor]
    return ".".join(part for part in parts if part)


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
