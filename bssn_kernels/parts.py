"""How the layers of a group are arranged for fused calls: one part per device and dtype, buckets for the backward."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bssn_kernels import functional, ops
from bssn_kernels.frame import Frame, distributed
from bssn_kernels.run import Run, resolve_dtype
from bssn_kernels.sharding import in_pieces


class Source(NamedTuple):
    """Where the tensors of a layer stand. They are looked up for every frame, since much of torch swaps them.

    Attributes:
        owner, key: ``owner[key]`` is the module that holds the weight; a missing key means that the layer is gone.
        container, name: ``getattr(owner[key], container)[name]`` is the weight.
        buffers, vectors: ``buffers[k]`` for k in vectors are the stored vectors.
        gains: ``gains["_gain"]`` is the learnable gain; None without one.
        mode: ``mode["training"]`` is the layer's training flag.
    """

    owner: dict[str, Any]
    key: str
    container: str
    name: str
    buffers: dict[str, Tensor]
    vectors: Sequence[str]
    gains: dict[str, Tensor] | None
    mode: dict[str, Any]


class Part:
    """Layers of one device and dtype, in the order of their plan.

    Args:
        layers: objects with ``index``, ``rule`` (see rule.py) and ``source()``; the rules agree in
            backend and output_dtype.
        weights: theirs, as they stand.
        manual: vectors move only on request.
    """

    def __init__(self, layers: Sequence, weights: Sequence[Tensor], manual: bool) -> None:
        rules = [layer.rule for layer in layers]
        self.indices = [layer.index for layer in layers]
        self.plan = functional.make_plan([rule.spec(w) for rule, w in zip(rules, weights)], rules[0].backend)
        self.output_dtype = rules[0].output_dtype
        sources = [layer.source() for layer in layers]
        self.weight_places = [(s.owner, s.key, s.container, s.name) for s in sources]
        self.vector_places = [(s.buffers, name) for s in sources for name in s.vectors]
        self.gain_places = [s.gains for s in sources if s.gains is not None]
        self.modes = [s.mode for s in sources]
        self.every = [rule.n_power_iterations for rule in rules]
        self.resting = [rule.resting_iterations for rule in rules]
        self.moves = [rule.semantics.moves == "forward" and not manual for rule in rules]
        self.training = [n if moves else rest for n, moves, rest in zip(self.every, self.moves, self.resting)]
        self.vector_owners = [j for j, s in enumerate(sources) for _ in s.vectors]
        self.movers = self._movers([True] * len(layers))
        self.known: list[Tensor] = []
        self.vectors()

    def _movers(self, training: Sequence[bool]) -> list[int] | None:
        """Indices of the vectors that this forward moves, None for all."""
        movers = [k for k, j in enumerate(self.vector_owners) if training[j] and self.moves[j]]
        return None if len(movers) == len(self.vector_owners) else movers

    def weights(self) -> list[Tensor] | None:
        """The weights, or None if this part has to be arranged anew."""
        try:
            weights = [getattr(owner[key], container)[name] for owner, key, container, name in self.weight_places]
        except KeyError:
            return None
        if not ops.are_plain(weights) and any(map(in_pieces, weights)):
            return None
        return weights if self.plan.matches(weights) else None

    def vectors(self) -> list[Tensor]:
        """The stored vectors, flat; shapes and devices are looked at when they are other tensors than before."""
        vectors = [buffers[name] for buffers, name in self.vector_places]
        if len(vectors) != len(self.known) or not all(map(operator.is_, vectors, self.known)):
            self._check(vectors)
            self.known = vectors
        return vectors

    def _check(self, vectors: Sequence[Tensor]) -> None:
        for vector, size, j, (_, name) in zip(vectors, self.plan.sizes, self.vector_owners, self.vector_places):
            spec = self.plan.specs[j]
            if vector.shape != (size,) or vector.device != spec.device:
                raise ValueError(
                    f"layer {spec.name!r}: expected {name} of shape ({size},) on {spec.device}, "
                    f"got {tuple(vector.shape)} on {vector.device}"
                )

    def run(self, weights: list[Tensor], *, still: bool = False, every: bool = False) -> Run:
        """One fused call.

        Args:
            still: nothing moves, whatever the training flags say.
            every: all layers iterate and move.
        """
        flags = [mode["training"] for mode in self.modes]
        if every:
            iterations, stored = self.every, None
        elif still or not any(flags):
            iterations, stored = self.resting, ()
        elif all(flags):
            iterations, stored = self.training, self.movers
        else:
            iterations = [t if flag else r for t, r, flag in zip(self.training, self.resting, flags)]
            stored = self._movers(flags)
        gains = [place["_gain"] for place in self.gain_places]
        dtype = resolve_dtype(self.output_dtype, weights[0])
        return Run(self.plan, weights, self.vectors(), gains, iterations, dtype, stored)


class Arrangement:
    """All parts of a group.

    Args:
        layers: all of the group, by index.
        buckets: number of autograd nodes per part, or "auto".
        nested: modules whose layers are left out.

    Attributes:
        places: part and place in it of each layer, None for layers that are gone or left out.
        left_out: layers that compute by themselves when they are read, since only then FSDP has put their weights
            together; ``in_pieces``, those of them that are in no nested module, and take part once they are whole.
        simple: there is one part, in the order of the layers.
    """

    def __init__(
        self, layers: Sequence, manual: bool, buckets: int | str, nested: Collection[nn.Module] = ()
    ) -> None:
        kinds: dict[tuple, list] = {}
        self.left_out, self.in_pieces = [], []
        for layer in layers:
            weight = layer.weight()
            if weight is None:
                continue
            if any(module in nested for module in layer.modules()):
                self.left_out.append(layer)
            elif in_pieces(weight):
                self.left_out.append(layer)
                self.in_pieces.append(layer)
            else:
                kind = weight.device, weight.dtype, layer.rule.backend, layer.rule.output_dtype
                kinds.setdefault(kind, []).append((layer, weight))
        self.parts = [Part(*zip(*members), manual) for members in kinds.values()]
        self.places: list[tuple[int, int] | None] = [None] * len(layers)
        for number, part in enumerate(self.parts):
            for j, i in enumerate(part.indices):
                self.places[i] = number, j
        self.simple = len(self.parts) == 1 and None not in self.places
        self._buckets = buckets
        counts = (1, 4) if buckets == "auto" else (buckets,)
        self._cuts = {count: [self._cut(part, count) for part in self.parts] for count in counts}

    def weights(self) -> list[list[Tensor]] | None:
        """Of each part, or None if the layers have to be arranged anew."""
        if self.in_pieces and not all(in_pieces(layer.weight()) for layer in self.in_pieces):
            return None
        weights = [part.weights() for part in self.parts]
        return None if None in weights else weights

    def frame(self, weights: Sequence[list[Tensor]], **how: bool) -> Frame:
        """Compute W_bar of all layers; ``how`` as in :meth:`Part.run`."""
        return Frame(self, [part.run(w, **how) for part, w in zip(self.parts, weights)])

    def scatter(self, lists: Sequence[Sequence]) -> list:
        """Lists by part to one list by layer."""
        return [None if place is None else lists[place[0]][place[1]] for place in self.places]

    def bucket(self, number: int, j: int) -> tuple[list[int], list[int]]:
        """The layers that share an autograd node with layer j of a part: places in the part, and indices."""
        count = self._buckets
        if count == "auto":
            count = 4 if distributed() else 1
        return self._cuts[count][number][j]

    @staticmethod
    def _cut(part: Part, count: int) -> list[tuple[list[int], list[int]]]:
        """The bucket of each layer: runs of neighbours with about the same number of elements."""
        sizes = [torch.Size(spec.shape).numel() for spec in part.plan.specs]
        total, numbers = sum(sizes), []
        for end, size in zip(accumulate(sizes), sizes):
            numbers.append(min(count - 1, int(count * (end - size / 2) / total)))
        buckets: dict[int, tuple[list[int], list[int]]] = {}
        for j, n in enumerate(numbers):
            places, indices = buckets.setdefault(n, ([], []))
            places.append(j)
            indices.append(part.indices[j])
        return [buckets[n] for n in numbers]
