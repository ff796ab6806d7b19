"""The frame: what one forward of a group computed, how its layers read it, and how it can be given again.

A frame belongs to one thread. The fused call runs without gradient when the frame is made; a bucket of layers gets
its autograd node when the first of them is read, so that the engine delivers gradients as it walks back.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Sequence
from itertools import accumulate, compress

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from bssn_kernels import functional, ops
from bssn_kernels.plan import GroupPlan


def distributed() -> bool:
    """Whether this process is one of several that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def in_backward() -> bool:
    """Whether the autograd engine runs this code: what is read now belongs to a forward of the past."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def resolve_dtype(output_dtype: torch.dtype | str | None, weight: Tensor) -> torch.dtype | None:
    """What ``output_dtype`` means now: "autocast" is autocast's dtype where it is on (it leaves float64 alone)."""
    if output_dtype != "autocast":
        return output_dtype
    kind = weight.device.type
    if weight.dtype == torch.float64 or weight.is_complex() or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class Member:
    """The tie of a layer to its group.

    A copy of the layer alone leaves the group; a copy of the group's root takes a copy of the group along.
    """

    def __init__(self, group, index: int) -> None:
        self.group, self.index = group, index

    def __deepcopy__(self, memo: dict) -> Member | None:
        if id(self.group) not in memo and id(self.group.root) not in memo:
            return None
        return Member(copy.deepcopy(self.group, memo), self.index)

    def frame(self):
        """The frame that this thread is in, or None."""
        frame = getattr(self.group._local, "frame", None)
        return parametrize._cache.get(frame_key(self.group)) if frame is None and parametrize._cache_enabled else frame


def frame_key(group) -> tuple[int, str]:
    """The place of a group's frame in the cache of ``parametrize.cached()``, which ends with the block."""
    return id(group), "frame of the group"


def alone_key(group) -> tuple[int, str]:
    """Marks there that a layer of the group computed by itself. (torch's own keys name the module that a class was made
    for, which a deep copy is not.)
    """
    return id(group), "a layer alone"


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
        self.versions = _versions(vectors) if stored is None or stored else None
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
        now = self.versions and _versions(old)
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


class Frame:
    """W_bar of every layer of a group for one forward.

    Attributes:
        weights, versions: what W_bar was computed from; a layer whose weight is another one by now, or was written to,
            is not served: after a KeyboardInterrupt nobody ended the frame.
        graph, plain: W_bar of each layer for reads with and without gradient, None until first read.
        keep: it outlives a root forward (``hold``, ``parametrize.cached``).
        held: it hands out plain tensors in every gradient mode.
        committed: the vectors are stored.
    """

    held = False

    def __init__(self, arrangement, runs: Sequence[Run]) -> None:
        self.arrangement, self.runs = arrangement, runs
        self.keep = self.committed = False
        if arrangement.simple:
            self.weights, outs = runs[0].weights, runs[0].outs
        else:
            self.weights = arrangement.scatter([run.weights for run in runs])
            outs = arrangement.scatter([run.outs for run in runs])
        self.versions = _versions(self.weights)
        self.graph, self.plain = [None] * len(outs), [None] * len(outs) if torch.is_grad_enabled() else list(outs)

    def serves(self, i: int, weight: Tensor) -> bool:
        """Whether W_bar of layer i was computed from this weight as it stands."""
        return self.weights[i] is weight and (self.versions is None or self.versions[i] == weight._version)

    def read(self, i: int) -> Tensor:
        """W_bar of layer i for the present gradient mode."""
        out = (self.graph if torch.is_grad_enabled() else self.plain)[i]
        return self.resolve(i) if out is None else out

    def resolve(self, i: int) -> Tensor:
        """The first read of a layer in a gradient mode."""
        number, j = self.arrangement.places[i]
        run = self.runs[number]
        out = run.outs[j]
        if not torch.is_grad_enabled():
            out = self.plain[i] = out.detach() if out.requires_grad else out
            return out
        if torch._C._are_functorch_transforms_active() and run.saved is not None:
            return run.compose(j, run.weights[j], run.vectors, run.gains_of([j]))  # begun outside of the transform
        if run.saved is None:
            recorded = self.plain[i] is None or out.requires_grad
            self.graph[i] = out if recorded else run.compose(j, run.weights[j], run.starts, run.gains_of([j]))
        else:
            self._attach(number, run, j)
            if self.graph[i] is None:  # nothing to differentiate
                self.graph[i] = self.plain[i] = out
        return self.graph[i]

    def _attach(self, number: int, run: Run, j: int) -> None:
        """Give the bucket of layer j its autograd node; what was handed out as a plain tensor stays one."""
        places, indices = self.arrangement.bucket(number, j)
        if run.gains or not all(w.requires_grad for w in run.weights):
            wanted = [any(t.requires_grad for t in (run.weights[k], *run.gains_of([k]))) for k in places]
            places, indices = list(compress(places, wanted)), list(compress(indices, wanted))
            if j not in places:
                return
        weights, compiling = [run.weights[k] for k in places], torch.compiler.is_compiling()
        if not compiling and (any(map(_hooks, weights)) or not all(map(_is_leaf, weights))):
            alone = _needs_its_own(run.weights[j])
            together = [k == j or not (alone or _needs_its_own(w)) for k, w in zip(places, weights)]
            places, indices, weights = (list(compress(x, together)) for x in (places, indices, weights))
        outs = [run.outs[k] if self.plain[i] is None else run.outs[k].detach() for k, i in zip(places, indices)]
        if not compiling and outs[0].is_inference():
            outs = [out.clone() for out in outs]
        for i, out in zip(indices, functional.attach(outs, run.saved, run.plan, places, weights, run.gains_of(places))):
            self.graph[i] = out

    def hold(self) -> None:
        """Hand out plain tensors in every gradient mode, for more than one forward."""
        self.keep = self.held = True
        self.graph = self.plain

    def forget_versions(self) -> None:
        """Store the vectors whatever was written to them."""
        for run in self.runs:
            run.versions = None

    def commit(self) -> None:
        """Store the vectors, once."""
        if not self.committed:
            self.committed = True
            for run in self.runs:
                run.store()

    def record(self) -> Frame:
        """What replays this frame later: itself, or a copy without the weights if others go on reading it."""
        if not self.keep:
            return self
        record = copy.copy(self)
        record.runs = [copy.copy(run) for run in self.runs]
        record.release()
        return record

    def release(self) -> None:
        """Keep what a replay needs, drop the weights."""
        self.weights = self.versions = self.graph = self.plain = None
        for run in self.runs:
            run.release()

    def replay(self, i: int, weight: Tensor, gain: Tensor | None) -> Tensor:
        """W_bar of layer i as it was in this frame."""
        number, j = self.arrangement.places[i]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.held):
            return self.runs[number].replay(j, weight, gain)


class Replay(Frame):
    """A frame that gives W_bar of an earlier one again, for a forward that is recomputed in a backward."""

    def __init__(self, record: Frame, layers: Sequence) -> None:
        self.original, self.layers, self.arrangement, self.runs = record, layers, record.arrangement, ()
        self.weights, self.versions = [layer.weight() for layer in layers], None
        self.graph, self.plain = [None] * len(layers), [None] * len(layers)
        self.keep, self.committed = False, True

    def record(self) -> Frame:
        return self.original

    def resolve(self, i: int) -> Tensor:
        out = self.original.replay(i, self.weights[i], self.layers[i].gain())
        (self.graph if torch.is_grad_enabled() else self.plain)[i] = out
        return out


# map takes half of a comprehension's time.
_is_leaf, _hooks, _version = map(operator.attrgetter, ("is_leaf", "_backward_hooks", "_version"))


def _needs_its_own(weight: Tensor) -> bool:
    """Whether a weight needs a node of its own. It would notice that a shared one, where the layer was not used, has no
    gradient for it: its hooks are called with None, or the graph that computed it is walked, and freed.
    """
    return not weight.is_leaf or bool(weight._backward_hooks)


def _versions(weights: Sequence[Tensor]) -> list[int] | None:
    if torch.compiler.is_compiling():
        return None
    try:
        return list(map(_version, weights))
    except AttributeError:  # a layer that is gone
        known = _versions([w for w in weights if w is not None])
        return known and [None if w is None else w._version for w in weights]
    except RuntimeError:  # inference tensors have none
        return None


def _shares_memory(vector: Tensor) -> bool:
    """Whether it is a view of more, as of flattened buffers, all of which have one version."""
    return vector.untyped_storage().nbytes() != vector.nbytes
