"""No number on a wrong result: what a provider computes is compared with float64 before it is timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bssn_kernels.algebra import multiplier, normalize, row_axes
from bssn_kernels.bench.providers import Root, Site
from bssn_kernels.variants import Variant, resolve_semantics, resolve_variant
from bssn_kernels.views import fold

# Native torch does everything in the dtype of the weights, vectors included, so it is given their rounding.
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
TOLERANCE = 1e-4


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

    # Layers that share a Parameter share its gradient: it is compared when the last of them has added its part.
    sharers = Counter(map(id, originals))
    grad_truths: dict[int, Tensor] = {}
    scales: dict[int, float] = {}
    weight_errors, grad_errors = [], []
    for site, weight, output, stored, grad in zip(root.sites, originals, outputs, vectors, grads):
        exact = truth(weight, stored, grad, site, resolve_variant(variant))
        size = norm(exact.weight)
        weight_errors.append((norm(exact.weight.sub_(output.detach())) / size, site.name))
        key = id(weight)
        grad_truths[key] = grad_truths[key] + exact.grad if key in grad_truths else exact.grad
        # dW can be small by cancellation (it is 0 for a single element): errors count against m G.
        scales[key] = scales.get(key, 0.0) + abs(float(exact.multiplier)) * norm(grad)
        sharers[key] -= 1
        if not sharers[key]:
            difference = grad_truths.pop(key)
            if weight.grad is not None:
                difference -= weight.grad
            weight.grad = None
            grad_errors.append((norm(difference) / scales[key], site.name))
    return Errors(*worst(weight_errors), *worst(grad_errors))


class Truth(NamedTuple):
    """One layer in float64."""

    weight: Tensor
    grad: Tensor
    multiplier: Tensor


@torch.no_grad()
def truth(weight: Tensor, vectors: list[Tensor], grad: Tensor, site: Site, variant: Variant) -> Truth:
    """Normalized weight and gradient of one layer.

    The gradient in closed form, m G + <G, W> dm/dsigma u v^T for each direction: autograd would take several times the
    memory, and this is done for layers of 100 MB.
    """
    wide = weight.detach().double()
    if not vectors:
        # A 1-D weight without state is a matrix of one column: one step from any v is exact.
        vectors = [wide.new_zeros(wide.numel()), wide.new_ones(1)]
    result = normalize(
        wide,
        vectors,
        variant=variant,
        semantics=resolve_semantics(site.semantics),
        axis=site.axis,
        n_power_iterations=site.n_power_iterations,
        eps=site.eps,
    )
    with torch.enable_grad():
        sigmas = [sigma.requires_grad_() for sigma in result.sigmas]
        slopes = torch.autograd.grad(multiplier(sigmas, variant), sigmas)
    grad = grad.double()
    inner = torch.linalg.vecdot(grad.flatten(), wide.flatten())
    exact = grad * result.multiplier
    for d, row_axis in enumerate(row_axes(wide.ndim, site.axis, len(slopes))):
        u, v = result.vectors[2 * d : 2 * d + 2]
        exact += fold(torch.outer(u * (inner * slopes[d]), v), tuple(wide.shape), row_axis)
    return Truth(result.weight, exact, result.multiplier)


def norm(x: Tensor) -> float:
    """Frobenius norm, summed in float64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def worst(errors: list[tuple[float, str]]) -> tuple[float, str]:
    """The largest error, where NaN is larger than all."""
    return max(errors, key=lambda error: float("inf") if error[0] != error[0] else error[0])
