"""The scheme of the BSN authors' code (Lin, Sekar, Fanti 2021) in plain PyTorch, step by step as they wrote it.

Each forward makes one iteration from the stored u, through which the gradient flows, and throws its vectors away; only
``update``, once after each step of the optimizer, stores them. n(x) is x / (|x| + eps), both directions run v, then u.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.composed import Composed
from bssn_kernels.bench.providers import Root


def unit(x: Tensor, eps: float) -> Tensor:
    return x / (torch.linalg.vector_norm(x) + eps)


class Authors(Composed):
    """A root of which every forward does what the authors' graph does for its weights."""

    def __init__(self, root: Root, variant: str) -> None:
        super().__init__(root, variant)
        self.sites = tuple(replace(site, semantics="paper") for site in root.sites)
        if any(weight.ndim < 2 for weight in self.weights):
            raise ValueError("the authors' scheme: expected weights of two dimensions and more")
        self.u = [
            [nn.init.trunc_normal_(w.detach().new_empty(w.shape[axis]), a=-2, b=2) for axis in self._axes(site, w)]
            for site, w in zip(self.sites, self.weights)
        ]

    def _axes(self, site, weight: Tensor) -> Sequence[int]:
        both = weight.ndim > 2 and self.variant.into
        return (site.axis, 1 - site.axis) if both else (site.axis,)

    def vectors(self) -> list[list[Tensor]]:
        """u and, as only u counts, zeros for v."""
        return [
            [x for u in of_layer for x in (u, u.new_zeros(w.numel() // len(u)))]
            for of_layer, w in zip(self.u, self.weights)
        ]

    def _iterate(self, site, weight: Tensor, axis: int, u: Tensor) -> tuple[Tensor, Tensor]:
        """Sigma of one direction and its next u."""
        m = weight.transpose(0, axis).reshape(weight.shape[axis], -1)
        v = unit(torch.mv(m.t(), u), site.eps)
        new = unit(torch.mv(m, v), site.eps)
        return torch.dot(torch.mv(m, v), new), new

    def forward(self) -> list[Tensor]:
        outs = []
        for site, weight, of_layer in zip(self.sites, self.weights, self.u):
            sigmas = [self._iterate(site, weight, *side)[0] for side in zip(self._axes(site, weight), of_layer)]
            outs.append(weight / (sum(sigmas) / len(sigmas)) * self.variant.gain)
        return outs

    @torch.no_grad()
    def update(self) -> None:
        """Store one iteration on the present weights."""
        for site, weight, of_layer in zip(self.sites, self.weights, self.u):
            for axis, u in zip(self._axes(site, weight), of_layer):
                u.copy_(self._iterate(site, weight, axis, u)[1])
