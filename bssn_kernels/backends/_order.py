"""The order of tiles in a launch, made for the L2 cache, and the memory that partial sums share in turn.

The second product of an iteration comes LAG bytes after the first product of its group of rows or columns, the scale
pass of a layer LAG bytes after its last product and from its end to its beginning, small layers fill the gaps, and
what was begun and not yet scaled stays within BUDGET where layers allow it. None of it changes a bit of the results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bssn_kernels.backends._geometry import Geometry
from bssn_kernels.backends._tables import BLOCK_FIELDS, TILE_FIELDS, Arena

LAG = 6 << 20  # bytes between a product and what waits for it
BUDGET = 24 << 20  # bytes of weights on their way; 26 MiB of an A100's L2 and 44 of an H200's behave
RING = 1 << 18  # numbers of partial sums in a batch of small layers; two batches are alive at once


@dataclass(eq=False)
class Step:
    """Tiles that are issued together.

    Attributes:
        after: the step whose tiles it waits for, None if it waits for nothing of its layer.
        product: not a scale pass, which gives way to products.
    """

    tiles: list[list[int]]
    nbytes: int
    after: Step | None = None
    product: bool = True
    issued_at: int | None = None

    def add(self, other: Step) -> None:
        self.tiles += other.tiles
        self.nbytes += other.nbytes


@dataclass(eq=False)
class Work:
    """One layer of a launch.

    Attributes:
        k: its number in the launch.
        region: numbers of partial sums, which die with the layer; their place comes with the batch.
        first: tiles that wait for nothing but the batch whose memory they take over.
    """

    k: int
    geometry: Geometry
    steps: list[Step] = field(default_factory=list)
    region: int = 0
    first: list[list[int]] = field(default_factory=list)
    blocks: list[list[int]] = field(default_factory=list)
    batch: int = -1

    @property
    def nbytes(self) -> int:
        return sum(step.nbytes for step in self.steps if not step.product)


class Tables(Protocol):
    """What the order needs of a schedule: room, counters, and somebody who notes where a layer's partial sums stand."""

    arena: Arena
    counter: Iterator[int]

    def place_region(self, work: Work, base: int) -> None: ...


def from_the_end(step: Step) -> list[Step]:
    """A scale pass from what was read last to what was read first, in pieces of LAG bytes."""
    pieces, tiles = max(1, step.nbytes // LAG), step.tiles[::-1]
    size = -(-len(tiles) // pieces)
    cut = [tiles[i : i + size] for i in range(0, len(tiles), size)]
    return [Step(part, step.nbytes * len(part) // len(tiles), step.after, product=False) for part in cut]


class Order:
    """Puts the steps of all layers into one list of tickets, and their partial sums into a ring of two batches."""

    def __init__(self, works: Sequence[Work], owner: Tables) -> None:
        self.owner, self.tiles = owner, []
        self.issued, self.outstanding = 0, 0
        self.pending: dict[int, deque[Step]] = {}  # steps of begun layers, by layer
        self.begun: dict[int, Work] = {}
        by_size = sorted(works, key=lambda w: -w.nbytes)
        self.large = deque(w for w in by_size if w.nbytes > LAG)
        self.small = deque(w for w in by_size if w.nbytes <= LAG)
        self.batches: list[list[Work]] = []
        self.batch_sizes: list[int] = []
        self.first_block: dict[int, int] = {}
        n = 0
        for work in works:
            self.first_block[work.k] = n
            n += len(work.blocks)
        self._run()
        self._place()

    def _run(self) -> None:
        while True:
            ready = self._ready()
            if ready is None:
                work = self._next_layer()
                if work is not None:
                    self._begin(work)
                    continue
                ready = self._oldest()
            if ready is None:
                return
            self._issue(*ready)

    def _candidates(self) -> Iterable[tuple[int, Step]]:
        for k, steps in self.pending.items():
            for step in steps:
                if step.after is None or step.after.issued_at is not None:
                    yield k, step

    def _ready(self) -> tuple[int, Step] | None:
        """The oldest step whose turn has come: dependent products, then first products, then scale passes."""
        best = None
        for k, step in self._candidates():
            waits = step.after is not None
            if waits and self.issued < step.after.issued_at + LAG:
                continue
            rank = (not step.product, not waits, step.after.issued_at if waits else 0)
            if best is None or rank < best[0]:
                best = rank, (k, step)
        return best and best[1]

    def _oldest(self) -> tuple[int, Step] | None:
        found = list(self._candidates())
        return min(found, key=lambda c: (c[1].after.issued_at if c[1].after else -1), default=None)

    def _next_layer(self) -> Work | None:
        """The next layer to begin, if its turn has come: a large one where it fits, a small one to fill a gap, and the
        remaining small ones where they fit.
        """
        room, idle = BUDGET - self.outstanding, self.outstanding == 0
        if self.large and (idle or self.large[0].nbytes <= room):
            return self.large.popleft()
        if self.small and (idle or self._gap() or (not self.large and self.small[0].nbytes <= room)):
            return self.small.popleft()
        return None

    def _gap(self) -> bool:
        """Whether a small layer would fill the time until the next step may begin."""
        return bool(self.pending) and not any(w.nbytes <= LAG for w in self.begun.values())

    def _begin(self, work: Work) -> None:
        region = work.region
        limit = max(RING // 4, max(self.batch_sizes, default=0))
        if not self.batches or (self.batch_sizes[-1] and self.batch_sizes[-1] + region > limit):
            self.batches.append([])
            self.batch_sizes.append(0)
        self.batches[-1].append(work)
        self.batch_sizes[-1] += region
        work.batch = len(self.batches) - 1
        if work.batch >= 2:  # its memory has to be free: all products of the batch before the last are issued
            for old in self.batches[work.batch - 2]:
                while any(step.product for step in self.pending.get(old.k, ())):
                    self._issue(*self._first_of(old.k))
        self.pending[work.k] = deque(work.steps)
        self.begun[work.k] = work
        self.outstanding += work.nbytes

    def _first_of(self, k: int) -> tuple[int, Step]:
        steps = (s for s in self.pending[k] if s.product and (s.after is None or s.after.issued_at is not None))
        return k, next(steps)

    def _issue(self, k: int, step: Step) -> None:
        self.pending[k].remove(step)
        shift = self.first_block[k]
        block = TILE_FIELDS.index("block")
        for tile in step.tiles:
            if tile[block] >= 0:
                tile[block] += shift
        self.tiles += step.tiles
        self.issued += step.nbytes
        step.issued_at = self.issued
        if not self.pending[k]:
            self.outstanding -= self.begun[k].nbytes
            del self.pending[k], self.begun[k]

    def _place(self) -> None:
        """Two places for partial sums, used by the batches in turn; a batch waits for the one before the last."""
        sizes = [max(self.batch_sizes[parity::2], default=0) for parity in range(2)]
        bases = [self.owner.arena.take(size) for size in sizes]
        counters = [next(self.owner.counter) for _ in self.batches]
        wait, target = TILE_FIELDS.index("wait"), TILE_FIELDS.index("wait_target")
        then_target, batch, final = (BLOCK_FIELDS.index(name) for name in ("then_target", "batch", "final"))
        for number, works in enumerate(self.batches):
            at = bases[number % 2]
            for work in works:
                self.owner.place_region(work, at)
                at += work.region
                for block in work.blocks:
                    if block[then_target] and block[final]:
                        block[batch] = counters[number]
                if number >= 2 and work.region:
                    for tile in work.first:
                        tile[wait], tile[target] = counters[number - 2], len(self.batches[number - 2])
