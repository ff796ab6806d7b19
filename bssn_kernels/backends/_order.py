"""The order of tiles in a launch, and the memory that partial sums share in turn.

Programs draw tiles in order, so a tile that waits holds its program up. The order is what a list scheduler makes: it
plays the launch with the programs of a device and rough times, and each time that one is free issues a tile whose wait
is over by then. First come second products, while what the first ones read is still in L2, then first products; scale
passes, which wait for their whole layer, are spread among the products of the layers after it, so that there is always
something to do while sums are on their way. Layers are begun, small ones and then the largest first, as long as what is
begun and not yet scaled stays within what L2 holds, and beyond that rather than wait. None of it changes a bit of the
results.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Protocol

from bssn_kernels.backends._geometry import WHOLE_PARTIALS, Geometry
from bssn_kernels.backends._tables import BLOCK_FIELDS, TILE_FIELDS, Arena

# What a launch is played with, in microseconds, measured on an H200.
TILE_US = 5.0  # of a tile, whatever its size
SUM_US = 15.0  # from the end of a step's last tile to the first that waits for it; 7 is usual, 20 one in twenty
PATIENCE_US = 1.0  # a program rather waits so long than begins a layer beyond the budget
L2_SHARE = 2 / 3  # of L2, for weights on their way
SCALE_SHARE = 2.0  # bytes of products for each byte of scale passes, while there are both
CREDIT = float(4 << 20)  # by how many bytes one of the two may be ahead
SMALL = 1 << 20  # bytes of a layer that is begun before all others
RING = 2 * WHOLE_PARTIALS  # bytes of partial sums in two batches of layers, which are alive at once


@dataclass(frozen=True)
class Machine:
    """What a launch is played on; as it stands, an H200 with four programs an SM.

    Attributes:
        programs: that run at once.
        bytes_per_us: that all of them read together.
        l2: bytes of the last cache.
    """

    programs: int = 528
    bytes_per_us: float = 4.4e6
    l2: int = 60 << 20

    @property
    def budget(self) -> int:
        """Bytes of weights that may be on their way."""
        return int(self.l2 * L2_SHARE)


@dataclass(eq=False)
class Step:
    """Tiles that wait for the same.

    Attributes:
        after: the steps whose tiles they wait for; none if they wait for nothing of their layer.
        product: not a scale pass, which gives way to products.
        streams: arrays of ``nbytes`` that are read; what is written nobody waits for.
        end: when the last of the tiles is done, in the played launch.
    """

    tiles: list[list[int]]
    nbytes: int
    after: tuple[Step, ...] = ()
    product: bool = True
    streams: int = 1
    end: float = 0.0

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

    itemsize: int
    arena: Arena
    counter: Iterator[int]

    def place_region(self, work: Work, base: int) -> None: ...


def from_the_end(step: Step) -> Step:
    """A scale pass, from what was read last to what was read first."""
    return replace(step, tiles=step.tiles[::-1], product=False)


@dataclass(eq=False)
class Begun:
    """A step of a layer that is begun: its tiles that are not issued, and for how many steps it waits."""

    work: Work
    step: Step
    tiles: deque[list[int]]
    missing: int
    ready: float = 0.0
    then: list[Begun] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return 0 if self.step.after else 1


class Order:
    """Puts the tiles of all layers into one list of tickets, and their partial sums into a ring of two batches."""

    def __init__(self, works: Sequence[Work], owner: Tables, machine: Machine) -> None:
        self.owner, self.machine, self.tiles = owner, machine, []
        self.room = RING // (2 * max(owner.itemsize, 4))  # numbers in a batch
        # Small ones first: they are little work, but their sums take as long, which would be the end of the launch.
        self.layers = deque(sorted(works, key=lambda w: (w.nbytes > SMALL, -w.nbytes)))
        self.free = [0.0] * machine.programs  # when each program is, as a heap
        self.coming: list[tuple[float, int, Begun]] = []  # steps that wait for sums, by when those are there
        self.products: list[tuple[int, int, Begun]] = []
        self.scales: deque[Begun] = deque()
        self.credit, self.number = 0.0, count()
        self.outstanding: dict[int, int] = {}  # bytes that L2 should keep, by layer
        self.batches: list[list[Work]] = []
        self.batch_sizes: list[int] = []
        self.open: list[int] = []  # tiles of products not yet issued, by batch
        self.batch_ends: list[float] = []
        self.first_block: dict[int, int] = {}
        n = 0
        for work in works:
            self.first_block[work.k] = n
            n += len(work.blocks)
        self._run()
        self._place()

    def _run(self) -> None:
        while True:
            now = self.free[0]
            while self.coming and self.coming[0][0] <= now:
                self._let_go(heapq.heappop(self.coming)[2])
            if self._may_begin(now):
                self._begin(self.layers.popleft(), now)
            elif self.scales and (not self.products or self.credit < 0):
                self._issue(self.scales[0])
            elif self.products:
                self._issue(self.products[0][2])
            elif self.coming:
                self._let_go(heapq.heappop(self.coming)[2])
            else:
                return

    def _let_go(self, begun: Begun) -> None:
        if begun.step.product:
            heapq.heappush(self.products, (begun.rank, next(self.number), begun))
        else:
            self.scales.append(begun)

    def _may_begin(self, now: float) -> bool:
        """Whether the next layer's turn has come."""
        if not self.layers or self.products:
            return False
        if not self._has_room(self.layers[0]):
            return False
        budget = self.machine.budget
        if sum(self.outstanding.values()) + min(self.layers[0].nbytes, budget) <= budget:
            return True
        return not self.scales and not (self.coming and self.coming[0][0] <= now + PATIENCE_US)

    def _joins(self, work: Work) -> bool:
        """Whether a layer's partial sums go into the last batch."""
        limit = max(self.room, max(self.batch_sizes, default=0))
        return bool(self.batches) and (not self.batch_sizes[-1] or self.batch_sizes[-1] + work.region <= limit)

    def _has_room(self, work: Work) -> bool:
        """Whether memory for a layer's partial sums is free: the products of the batch before the last are issued."""
        return self._joins(work) or len(self.batches) < 2 or not self.open[-2]

    def _begin(self, work: Work, now: float) -> None:
        if not self._joins(work):
            for of_batch, new in ((self.batches, []), (self.batch_sizes, 0), (self.open, 0), (self.batch_ends, 0.0)):
                of_batch.append(new)
        self.batches[-1].append(work)
        self.batch_sizes[-1] += work.region
        work.batch = len(self.batches) - 1
        self.open[-1] += sum(len(step.tiles) for step in work.steps if step.product)
        self.outstanding[work.k] = min(work.nbytes, self.machine.budget)
        begun = {id(step): Begun(work, step, deque(step.tiles), len(step.after)) for step in work.steps}
        for one in begun.values():
            for before in one.step.after:
                begun[id(before)].then.append(one)
        free = self.batch_ends[work.batch - 2] + SUM_US if work.batch >= 2 and work.region else now
        for one in begun.values():
            if not one.missing:
                heapq.heappush(self.coming, (max(free, now), next(self.number), one))

    def _issue(self, begun: Begun) -> None:
        """The next tile of a step that waits for nothing more."""
        step, work, tile = begun.step, begun.work, begun.tiles.popleft()
        block = TILE_FIELDS.index("block")
        if tile[block] >= 0:
            tile[block] += self.first_block[work.k]
        self.tiles.append(tile)
        nbytes = step.nbytes / len(step.tiles)
        start = max(heapq.heappop(self.free), begun.ready)
        end = start + TILE_US + step.streams * nbytes * self.machine.programs / self.machine.bytes_per_us
        heapq.heappush(self.free, end)
        step.end = max(step.end, end)
        if step.product:
            self.credit = max(self.credit - nbytes, -CREDIT)
            self.open[work.batch] -= 1
            self.batch_ends[work.batch] = max(self.batch_ends[work.batch], end)
        else:
            self.credit = min(self.credit + nbytes * SCALE_SHARE, CREDIT)
            self.outstanding[work.k] = max(0, self.outstanding[work.k] - int(nbytes))
        if begun.tiles:
            return
        if step.product:
            heapq.heappop(self.products)
        else:
            self.scales.popleft()
        for one in begun.then:
            one.missing -= 1
            one.ready = max(one.ready, step.end + SUM_US)
            if not one.missing:
                heapq.heappush(self.coming, (one.ready, next(self.number), one))

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
