"""What one fused call computed: how its vectors are stored, and how W_bar of one of its layers can be given again."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from bssn_kernels import functional, ops
from bssn_kernels.plan import GroupPlan


def resolve_dtype(output_dtype: torch.dtype | str | None, weight: Tensor) -> torch.dtype | None:
    """What ``output_dtype`` means now: "autocast" is autocast's dtype where it is on (it leaves float64 alone)."""
    if output_dtype != "autocast":
        return output_dtype
    kind = weight.device.type
    if weight.dtype == torch.float64 or weight.is_complex() or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _same(x):
    return x


def _uncounted():
    """For composed arithmetic: activation checkpointing must neither count nor drop what it saves."""
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


class Run:
    """What one fused call computed.

    Attributes:
        plan, saved, dtype, iterations, starts: enough to give W_bar again; `saved` is None on the composed path, which
            keeps copies of the vectors it started from.
        sigmas, directions: of each layer, composed path only.
        outs, weights, vectors, gains, new: what the frame hands out and stores; dropped with it.
        stored: indices of the vectors to store, None for all of them.
        versions: of the vectors, as they were read; None where nobody may ask.
    """

    def __init__(
        self,
        plan: GroupPlan,
        weights: Sequence[Tensor],
        vectors: Sequence[Tensor],
        gains: Sequence[Tensor],
        iterations: Sequence[int],
        dtype: torch.dtype | None,
        stored: Sequence[int] | None = (),
    ) -> None:
        self.plan, self.dtype, self.iterations, self.stored = plan, dtype, iterations, stored
        self.weights, self.vectors, self.gains = weights, vectors, gains
        plan.check_sizes(vectors)  # they may be the same tensors as before, and shorter
        self.versions = versions_of(vectors) if stored is None or stored else None
        if functional.needs_composed(weights):
            self.starts, self.saved = [v.clone() for v in vectors], None
            with _uncounted():
                result = functional.composed(weights, self.starts, plan, iterations, gains, dtype)
            self.outs, self.new = result.weights, result.vectors
            self.sigmas, self.directions = result.sigmas, result.directions
        else:
            self.outs, self.saved = functional.launch(weights, vectors, plan, iterations, gains, dtype)

    def store(self) -> None:
        """Write the new vectors into the layers' buffers, but for those that were written to since they were read: by a
        layer that computed by itself, by another frame, by ``update()`` or ``load_state_dict()``.
        """
        old, stored = self.vectors, self.stored
        if not old or (stored is not None and not stored):
            return
        now = self.versions and versions_of(old)
        if now and now != self.versions:
            which = range(len(old)) if stored is None else stored
            stored = [k for k in which if now[k] == self.versions[k] or _shares_memory(old[k])]
            if not stored:
                return
        if self.saved is not None and stored is None:
            ops.store(old, self.saved, self.plan)
            return
        new = self.new if self.saved is None else self.plan.vectors_of(self.saved)
        if stored is not None:
            new, old = [new[k] for k in stored], [old[k] for k in stored]
        with torch.no_grad():
            torch._foreach_copy_(old, new)

    def release(self) -> None:
        """Keep only what :meth:`replay` needs."""
        self.outs = self.weights = self.vectors = self.gains = self.new = self.versions = None

    def compose(self, j: int, weight: Tensor, vectors: Sequence[Tensor], gains: Sequence[Tensor]) -> Tensor:
        """W_bar of layer j alone by differentiable PyTorch, from the vectors that the run started from."""
        specs = self.plan.specs
        first = sum(len(spec.vector_shapes) for spec in specs[:j])
        own = vectors[first : first + len(specs[j].vector_shapes)]
        plan = functional.make_plan([specs[j]], self.plan.backend.name)
        with _uncounted():
            return functional.composed([weight], own, plan, [self.iterations[j]], gains, self.dtype).weights[0]

    def multiplier_of(self, j: int, weight: Tensor) -> Tensor:
        """The multiplier of a layer, 0-dimensional, before the run is released."""
        if self.saved is not None:
            return self.plan.multipliers_of(self.saved)[j]
        return torch.vdot(weight.flatten(), self.outs[j].flatten()) / torch.vdot(weight.flatten(), weight.flatten())

    def replay(self, j: int, weight: Tensor, gain: Tensor | None) -> Tensor:
        """W_bar of layer j as it was, with a place in the graph that saves nothing. Nothing moves."""
        gains = () if gain is None else (gain,)
        if self.saved is None:
            return self.compose(j, weight, self.starts, gains)
        # What counts the operations of a checkpointed region must not see these, which the forward did not have.
        unseen = _disable_current_modes() if is_in_torch_dispatch_mode(False) else contextlib.nullcontext()
        with torch.no_grad(), unseen:
            factor = self.plan.multipliers_of(self.saved)[j]
            out = (weight.detach().to(self.plan.accumulation_dtype) * factor).to(self.dtype or weight.dtype)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (weight, *gains)):
            (out,) = functional.attach([out], self.saved, self.plan, [j], [weight], gains)
        return out

    def gains_of(self, layers: Sequence[int]) -> list[Tensor]:
        """The learnable gains of some layers."""
        if not self.gains:
            return []
        position = list(accumulate((spec.gain for spec in self.plan.specs), initial=0))
        return [self.gains[position[j]] for j in layers if self.plan.specs[j].gain]

    def sigmas_of(self, directions: bool = False) -> list[Tensor]:
        """Sigma of each layer, 0-dimensional, or (directions,) numbers each."""
        if self.saved is not None:
            return self.plan.sigmas_of(self.saved, directions)
        return self.directions if directions else self.sigmas


_version = operator.attrgetter("_version")  # with map, half of a comprehension's time


def versions_of(tensors: Sequence[Tensor | None]) -> list[int | None] | None:
    """How often each was written to; None where nobody counts."""
    if torch.compiler.is_compiling():
        return None
    try:
        return list(map(_version, tensors))
    except AttributeError:  # a layer that is gone
        known = versions_of([t for t in tensors if t is not None])
        return known and [None if t is None else t._version for t in tensors]
    except RuntimeError:  # inference tensors have none
        return None


def _shares_memory(vector: Tensor) -> bool:
    """Whether it is a view of more, as of flattened buffers, all of which have one version."""
    return vector.untyped_storage().nbytes() != vector.nbytes
