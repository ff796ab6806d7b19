"""The strongest form that torch's own operations give: what a user could write without any kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bssn_kernels.bench.providers import Root
from bssn_kernels.variants import resolve_variant


class Side:
    """One direction of a weight, as a matrix A with a = A b and b = A^T a, each normalized.

    A is a view where its rows come first in memory, and its vectors are in the order of memory. ``turned``: A is the
    transpose of the weight's matrix, so that v is a.
    """

    def __init__(self, weight: Tensor, axis: int, turned: bool, share: float) -> None:
        in_memory = sorted(range(weight.ndim), key=lambda i: (-weight.stride(i), -weight.shape[i]))
        rest = [i for i in range(weight.ndim) if i != axis]
        self.axes = [axis, *(in_memory[1:] if in_memory[0] == axis else rest)]
        self.shape = [weight.shape[i] for i in self.axes]
        self.turned, self.share = turned, share
        order = [rest.index(i) for i in self.axes[1:]]
        self.to_logical = [order.index(i) for i in range(len(order))]
        sizes = self.matrix(weight).shape
        self.a, self.b = (nn.functional.normalize(weight.new_empty(n).normal_(), dim=0) for n in sizes)

    def matrix(self, weight: Tensor) -> Tensor:
        m = weight.detach().permute(self.axes).reshape(self.shape[0], -1)
        return m.t() if self.turned else m

    def vectors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """u and v, the latter in the order of memory."""
        return (b, a) if self.turned else (a, b)

    def logical_vectors(self) -> tuple[Tensor, Tensor]:
        """u and v as everybody else has them."""
        u, v = self.vectors(self.a, self.b)
        return u, v.view(self.shape[1:]).permute(self.to_logical).reshape(-1)

    def add_outer(self, weight: Tensor, u: Tensor, v: Tensor) -> None:
        """``weight += u v^T``."""
        target = weight.permute(self.axes)
        if target.is_contiguous():
            target.view(self.shape[0], -1).addr_(u, v)
        else:
            target.add_(torch.outer(u, v).view(self.shape))


class Composed(nn.Module):
    """A root that normalizes by itself: the weights of another one, bare, with the same face."""

    def __init__(self, root: Root, variant: str) -> None:
        super().__init__()
        self.sites, self.variant = root.sites, resolve_variant(variant)
        self.weights = nn.ParameterList(root.originals())

    def originals(self) -> list[Tensor]:
        return list(self.weights)

    def gains(self) -> list[None]:
        return [None] * len(self.weights)


class Foreach(Composed):
    """A root of as few of torch's operations as we could make them.

    Products are chained without a norm between, sigma is the last norm, and all that has a ``_foreach`` form takes all
    layers at once.
    """

    def __init__(self, root: Root, variant: str) -> None:
        super().__init__(root, variant)
        self.layers: list[list[Side]] = []
        for site, weight in zip(root.sites, self.weights):
            shares = [self.variant.out, self.variant.into]
            if weight.ndim <= 2 or not self.variant.into:
                shares = [sum(shares)]
            axes = (site.axis, 1 - site.axis)
            self.layers.append([Side(weight, axes[d], d == 1, share) for d, share in enumerate(shares)])
        self.sides = [(k, side) for k, sides in enumerate(self.layers) for side in sides]

    def vectors(self) -> list[list[Tensor]]:
        return [[x for side in sides for x in side.logical_vectors()] for sides in self.layers]

    def forward(self) -> list[Tensor]:
        return list(Composition.apply(self, *self.weights))


class Composition(torch.autograd.Function):
    """Forward and backward of :class:`Foreach`."""

    @staticmethod
    def forward(ctx, module: Foreach, *weights: Tensor) -> tuple[Tensor, ...]:
        sides = [side for _, side in module.sides]
        matrices = [side.matrix(weights[k]) for k, side in module.sides]
        firsts = [torch.mv(m, side.b) for m, side in zip(matrices, sides)]
        seconds = [torch.mv(m.t(), first) for m, first in zip(matrices, firsts)]
        first_norms, second_norms = torch._foreach_norm(firsts), torch._foreach_norm(seconds)
        sigmas = torch.stack(second_norms) / torch.stack(first_norms)
        norms = torch._foreach_clamp_min([*first_norms, *second_norms], module.sites[0].eps)
        new = torch._foreach_div([*firsts, *seconds], norms)
        torch._foreach_copy_([*(side.a for side in sides), *(side.b for side in sides)], new)
        means = [torch.zeros_like(sigmas[0])] * len(weights)
        for (k, side), s in zip(module.sides, sigmas.unbind()):
            means[k] = means[k] + side.share * s
        mean = torch.stack(means)
        if module.variant.floor:
            mean = mean.clamp_min(module.variant.floor)
        ctx.module, ctx.weights, ctx.mean, ctx.multipliers = module, weights, mean, module.variant.gain / mean
        # Not what the sides hold, which the next forward moves.
        ctx.pairs = [side.vectors(a, b) for side, a, b in zip(sides, new, new[len(sides) :])]
        return tuple(torch._foreach_mul(weights, list(ctx.multipliers.unbind())))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        module = ctx.module
        out = [sides[0] for sides in module.layers]
        inner = [torch.dot(s.matrix(g).flatten(), s.matrix(w).flatten()) for s, g, w in zip(out, grads, ctx.weights)]
        slopes = (torch.stack(inner) * (-module.variant.gain) / ctx.mean.square()).unbind()
        grad_weights = torch._foreach_mul(grads, list(ctx.multipliers.unbind()))
        scaled = torch._foreach_mul([u for u, _ in ctx.pairs], [slopes[k] * side.share for k, side in module.sides])
        for (k, side), u, (_, v) in zip(module.sides, scaled, ctx.pairs):
            side.add_outer(grad_weights[k], u, v)
        return (None, *grad_weights)
