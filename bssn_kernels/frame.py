"""The frame: what one forward of a group computed, how its layers read it, and how it can be given again.

A frame belongs to one thread. The fused call runs without gradient when the frame is made; a bucket of layers gets
its autograd node when the first of them is read, so that the engine delivers gradients as it walks back.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from bssn_kernels import functional
from bssn_kernels.run import Run, versions_of


def distributed() -> bool:
    """Whether this process is one of several that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def in_backward() -> bool:
    """Whether the autograd engine runs this code: what is read now belongs to a forward of the past."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


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
        self.versions = versions_of(self.weights)
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

    def has(self, i: int) -> bool:
        """Whether layer i took part."""
        return self.arrangement.places[i] is not None

    def replay(self, i: int, weight: Tensor, gain: Tensor | None) -> Tensor:
        """W_bar of layer i as it was in this frame."""
        number, j = self.arrangement.places[i]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.held):
            return self.runs[number].replay(j, weight, gain)


class Replay(Frame):
    """A frame that gives W_bar of an earlier one again, for a forward that is recomputed in a backward."""

    def __init__(self, record: Frame, layers: Sequence) -> None:
        self.original, self.layers, self.arrangement, self.runs = record, layers, record.arrangement, ()
        self.weights = [layer.weight() if record.has(i) else None for i, layer in enumerate(layers)]
        self.versions = None
        self.graph, self.plain = [None] * len(layers), [None] * len(layers)
        self.keep, self.committed = False, True

    def record(self) -> Frame:
        return self.original

    def resolve(self, i: int) -> Tensor:
        out = self.original.replay(i, self.weights[i], self.layers[i].gain())
        (self.graph if torch.is_grad_enabled() else self.plain)[i] = out
        return out


# map takes half of a comprehension's time.
_is_leaf, _hooks = map(operator.attrgetter, ("is_leaf", "_backward_hooks"))


def _needs_its_own(weight: Tensor) -> bool:
    """Whether a weight needs a node of its own. It would notice that a shared one, where the layer was not used, has no
    gradient for it: its hooks are called with None, or the graph that computed it is walked, and freed.
    """
    return not weight.is_leaf or bool(weight._backward_hooks)
