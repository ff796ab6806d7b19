"""The work of one fused launch on a GPU as data: tiles in the order in which programs take them.

A launch is a persistent grid. A program takes the next ticket, waits until the tile's counter has reached its target,
does the tile, and raises the counter of the tile's *block*; whoever raises it last adds the block's partial sums in
their fixed order and raises the next counter. So sums do not depend on who computes what, and a tile waits only on
tiles with smaller tickets, so nothing depends on how many programs run. Changing the schedule means changing the
lists here, not a kernel.

The order is made for the L2 cache: the second product of an iteration comes LAG bytes after the first product of its
group of rows or columns, the scale pass of a layer LAG bytes after its last product and from its end to its beginning,
small layers fill the gaps, and what was begun and not yet scaled stays within BUDGET where layers allow it. Neither
changes a bit of the results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from bssn_kernels.backends._geometry import FLAT, ColumnBlock, Columns, Geometry, Role
from bssn_kernels.plan import LayerRow

LAG = 6 << 20  # bytes between a product and what waits for it
BUDGET = 24 << 20  # bytes of weights on their way; 26 MiB of an A100's L2 and 44 of an H200's behave
RING = 1 << 18  # numbers of partial sums in a batch of small layers; two batches are alive at once

# What a tile does.
INNER, OUTER, VECTORS, SCALE, DOT, UPDATE = range(6)
# Where a product reads its vector: as stored, a raw vector of the workspace (of one of two alternating copies), the
# same times the scale of its iteration, or the vectors in `saved`.
STORED, RAW, SCALED, SAVED = 0, 1, 3, 5

TILE_FIELDS = (
    *("kind", "layer", "row0", "rows", "col0", "chunks", "step", "width", "end", "slot0", "slot1"),
    *("wait", "wait_target", "block", "mask", "source"),
)
# start*, count*: the numbers of a slab or spread, by role, that the block completes; segments: see ColumnBlock.
# `then` is raised once when the block is complete; who raises it to then_target finishes the iteration and raises
# `done` and `batch`.
BLOCK_FIELDS = (
    *("kind", "layer", "counter", "arrivals", "then", "then_target", "done", "batch", "mask", "parity"),
    *("start0", "count0", "segments", "start1", "count1", "share", "final", "dot"),
)
LAYER_FIELDS = (
    *("index", "p", "l", "r", "numel", "aligned", "scalars", "has_gain", "norm_adds", "through", "iterated"),
    *("dots", "dot_count"),
)
ROLE_FIELDS = (
    *("exists", "direction", "inner_first", "stored_xq", "stored_xr", "stored_yp", "stored_yq", "stored_yr"),
    *("raw_xq", "raw_xr", "raw_yp", "raw_yq", "raw_yr", "modulus", "fold", "fold_stride", "entry_stride"),
    *("slab_size", "inner_slots", "inner_partial", "outer_slots", "outer_partial"),
    *("slab", "slab_odd", "spread", "spread_odd"),
    *("inner_shares", "inner_share_count", "outer_shares", "outer_share_count", "results"),
    *("saved_spread", "saved_slab", "saved_start"),
)
# One vector, or a part of it, to be written into `saved`: number e of memory order is number
# (e // divisor) * high + (e % divisor) * low of the stored vector. `raw` is its place in the workspace, `scale` that
# of its factor and `ok` of the flag that the iteration went well; copy: the stored vector as it is; start: whatever
# the iteration gave.
VECTOR_FIELDS = (
    *("layer", "address", "raw", "scale", "ok", "copy", "start", "saved"),
    *("divisor", "high", "low", "begin", "count", "size"),
)
ADDRESSES = ("weight", "spread0", "slab0", "spread1", "slab1", "gain")
RESULTS = ("first_scale", "second_scale", "ok")  # of a direction and iteration, float64
VECTOR_PART = 4096  # numbers of a vector that one tile writes


class Arena:
    """Hands out places in a buffer, in multiples of 16 numbers."""

    def __init__(self) -> None:
        self.numel = 0

    def take(self, n: int) -> int:
        at = self.numel
        self.numel += -(-n // 16) * 16
        return at


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


class Schedule:
    """The tables of one launch.

    Attributes:
        tiles, blocks, layers, vectors, floats: what the kernels read, on the CPU; columns as in *_FIELDS.
        n_counters: int32 counters, the first of which is the ticket.
        workspace, doubles: numbers in accumulation dtype and in float64 that a launch needs.
        general: whether a layer needs role 1; through: whether one differentiates through its iteration.
        traffic: bytes read and written in each phase, partial sums left out.
    """

    def __init__(self, rows: Sequence[LayerRow], itemsize: int) -> None:
        self.itemsize = itemsize
        self.geometries = [Geometry(row, itemsize) for row in rows]
        self.general = any(g.general for g in self.geometries)
        self.through = any(row.through for row in rows)
        self._counter = count(1)
        self._arena, self._double_arena = Arena(), Arena()
        self._tables: list[dict[str, int]] = []
        self._vectors: list[list[int]] = []
        self.traffic: dict[str, int] = {}

    @staticmethod
    def directions(row: LayerRow, itemsize: int) -> list[tuple[int, bool] | None]:
        """By role: the direction, and whether its spread is v; None where a role has none."""
        roles = Geometry(row, itemsize).roles
        return [role and (role.direction, role.axis == 0) for role in roles]

    def _seal(self, works: Sequence[Work], rows: Sequence[LayerRow]) -> None:
        order = _Order(works, self)
        blocks = [block for work in works for block in work.blocks]
        self.tiles = _table(order.tiles, TILE_FIELDS, torch.int32)
        self.blocks = _table(blocks, BLOCK_FIELDS, torch.int32)
        self.vectors = _table(self._vectors, VECTOR_FIELDS, torch.int64)
        names = [*LAYER_FIELDS, *(f"{name}{e}" for e in range(2) for name in ROLE_FIELDS)]
        self.layers = _table([[t.get(name, 0) for name in names] for t in self._tables], names, torch.int64)
        floats = [[r.eps, r.weight_out, r.weight_in, r.floor, r.gain] for r in rows]
        self.floats = torch.tensor(floats, dtype=torch.float64, device="cpu")
        self.n_counters = next(self._counter)
        self.workspace, self.doubles = self._arena.numel, self._double_arena.numel

    def _layer(self, k: int, index: int, row: LayerRow) -> dict[str, int]:
        """The fields that do not depend on what is computed."""
        geometry = self.geometries[k]
        fields = dict(index=index, p=row.p, l=geometry.L, r=geometry.R, numel=geometry.numel)
        fields |= dict(aligned=geometry.aligned, scalars=row.scalar_offset, has_gain=row.has_gain)
        fields |= dict(norm_adds=row.norm_adds, through=row.through)
        for e, role in enumerate(geometry.roles):
            if role is not None:
                fields |= {f"{name}{e}": value for name, value in _role_fields(role, row).items()}
        self._tables.append(fields)
        return fields

    def _reserve_partials(self, work: Work, inner: Sequence[bool], outer: Sequence[bool]) -> None:
        """Room for the partial sums of these products, by role; offsets within the layer's region for now."""
        fields, geometry, region = self._tables[work.k], work.geometry, Arena()
        for e, role in enumerate(geometry.roles):
            fields[f"inner_slots{e}"] = geometry.slots[e]
            fields[f"outer_slots{e}"] = len(geometry.row_blocks)
            if inner[e]:
                fields[f"inner_partial{e}"] = region.take(geometry.slots[e] * role.slab_size)
            if outer[e]:
                fields[f"outer_partial{e}"] = region.take(len(geometry.row_blocks) * geometry.L)
        work.region = region.numel

    def place_region(self, work: Work, base: int) -> None:
        for e in range(2):
            for name in (f"inner_partial{e}", f"outer_partial{e}"):
                if name in self._tables[work.k]:
                    self._tables[work.k][name] += base

    def _count(self, phase: str, nbytes: int) -> None:
        self.traffic[phase] = self.traffic.get(phase, 0) + nbytes

    def _inner_step(self, work: Work, block: int, group: int, mask: int, source: int, wait: _Wait, number: int) -> Step:
        """Inner products of a row block over the columns of a group; they raise the counter of block ``number``."""
        tiles, numel = [], 0
        for row0, rows in work.geometry.inner_row_tiles(block):
            for part in work.geometry.inner[group]:
                tiles.append(_tile(INNER, work.k, row0, rows, part, wait, number, mask, source))
                numel += rows * part.numel
        self._count("inner", numel * self.itemsize)
        return Step(tiles, numel * self.itemsize)

    def _outer_step(
        self, work: Work, block: int, parts: Sequence[Columns], mask: int, source: int, wait: _Wait, number: int
    ) -> Step:
        row0, rows = work.geometry.row_blocks[block]
        slot = (block, block)
        tiles = [_tile(OUTER, work.k, row0, rows, p, wait, number, mask, source, slot) for p in parts]
        numel = sum(rows * p.numel for p in parts)
        self._count("outer", numel * self.itemsize)
        return Step(tiles, numel * self.itemsize)

    def _row_block(self, work: Work, b: int, mask: int, dot: int = 0, **fields: int) -> int:
        geometry = work.geometry
        row0, rows = geometry.row_blocks[b]
        arrivals = len(geometry.inner_row_tiles(b)) * sum(map(len, geometry.inner))
        return self._block(work, INNER, arrivals, mask, start0=row0, count0=rows, share=b, dot=dot, **fields)

    def _column_block(self, work: Work, c: ColumnBlock, j: int, mask: int, **fields: int) -> int:
        arrivals = len(work.geometry.row_blocks) * len(c.outer)
        (start0, count0), (start1, count1) = c.entries
        places = dict(start0=start0, count0=count0, segments=c.segments, start1=start1, count1=count1)
        return self._block(work, OUTER, arrivals, mask, share=j, **places, **fields)

    def _both(self, work: Work, inner: int, outer: int, source: int, wait: _Wait, fields: dict[str, int]) -> Step:
        """Inner and outer products of the roles in the two masks, over the whole layer, the tiles of the same rows together."""
        geometry, step = work.geometry, Step([], 0)
        numbers = [self._column_block(work, c, j, outer, **fields) for j, c in enumerate(geometry.columns) if outer]
        for b in range(len(geometry.row_blocks)):
            if inner:
                number = self._row_block(work, b, inner, **fields)
                for g in range(len(geometry.groups)):
                    step.add(self._inner_step(work, b, g, inner, source, wait, number))
            for c, number in zip(geometry.columns, numbers):
                step.add(self._outer_step(work, b, c.outer, outer, source, wait, number))
        return step

    def _flat_step(self, work: Work, kind: int, wait: _Wait, after: Step | None, number: int = -1) -> Step:
        """Flat tiles over the whole layer."""
        size, numel = work.geometry.flat_tile, work.geometry.numel
        tiles = [
            _record(
                TILE_FIELDS, kind=kind, layer=work.k, row0=start // FLAT, rows=min(size, numel - start),
                wait=wait.counter, wait_target=wait.target, block=number, slot0=start // size,
            )
            for start in range(0, numel, size)
        ]  # fmt: skip
        return Step(tiles, numel * self.itemsize, after)

    def _block(self, work: Work, kind: int, arrivals: int, mask: int, **fields: int) -> int:
        """A new block of the layer; returns its number, counted within the layer until the order is known."""
        record = dict(kind=kind, layer=work.k, counter=next(self._counter), arrivals=arrivals, mask=mask, batch=-1)
        work.blocks.append(_record(BLOCK_FIELDS, **record, **fields))
        return len(work.blocks) - 1


@dataclass(frozen=True)
class _Wait:
    counter: int = 0
    target: int = 0


NO_WAIT = _Wait()


class ForwardSchedule(Schedule):
    """Power iterations, sigmas and scale pass of all layers, each with its own number of iterations."""

    def __init__(self, rows: Sequence[LayerRow], iterations: Sequence[int], itemsize: int) -> None:
        super().__init__(rows, itemsize)
        works = [self._work(k, row, n) for k, (row, n) in enumerate(zip(rows, iterations))]
        self._seal(works, rows)

    def _work(self, k: int, row: LayerRow, iterations: int) -> Work:
        work = Work(k, self.geometries[k])
        fields = self._layer(k, k, row)
        fields["iterated"] = iterations > 0
        self._reserve(work, fields, iterations)
        done, last = NO_WAIT, None
        for i in range(max(iterations, 1)):
            done, last = self._iteration(work, i, iterations, done, last)
        self._vector_steps(work, row, iterations, done, last)
        work.steps += _from_the_end(self._flat_step(work, SCALE, done, last))
        self._count("scale", work.geometry.numel * self.itemsize)
        self._count("written", work.geometry.numel * self.itemsize)
        return work

    def _reserve(self, work: Work, fields: dict[str, int], iterations: int) -> None:
        geometry = work.geometry
        present = [role is not None for role in geometry.roles]
        outer = present if iterations else [False, False]
        self._reserve_partials(work, present, outer)
        for e, role in enumerate(geometry.roles):
            if role is None:
                continue
            sizes = {"slab": role.slab_size} | ({"spread": role.spread_size} if iterations else {})
            for name, size in sizes.items():
                fields[f"{name}{e}"] = self._arena.take(size)
                fields[f"{name}_odd{e}"] = self._arena.take(size) if iterations > 1 else fields[f"{name}{e}"]
            counts = {"inner": len(geometry.row_blocks), "outer": len(geometry.columns)}
            for name, n in counts.items():
                fields[f"{name}_shares{e}"] = self._double_arena.take(n)
                fields[f"{name}_share_count{e}"] = n
            fields[f"results{e}"] = self._double_arena.take(2 * len(RESULTS))

    def _iteration(self, work: Work, i: int, iterations: int, before: _Wait, last: Step | None):
        """Both products of one iteration, or the one product that a forward without iteration needs.

        Returns:
            What tells that it is done, and its last step.
        """
        geometry, parity = work.geometry, i & 1
        inner_first, outer_first = geometry.masks
        common = dict(parity=parity, final=int(i + 1 >= iterations))
        finish = dict(done=next(self._counter), then=next(self._counter))
        source = STORED if i == 0 else SCALED + (1 - parity)
        if iterations == 0:
            firsts, seconds = self._one_product(work, inner_first | outer_first, common | finish), []
        elif geometry.mixed:
            firsts, seconds = self._layer_wide(work, source, before, common, finish)
        elif inner_first:
            firsts, seconds = self._by_rows(work, source, before, common, finish)
        else:
            firsts, seconds = self._by_columns(work, source, before, common, finish)
        for step in firsts:
            step.after = last
        if i == 0:
            work.first = [tile for step in firsts for tile in step.tiles]
        work.steps += [*firsts, *seconds]
        return _Wait(finish["done"], 1), work.steps[-1]

    def _one_product(self, work: Work, mask: int, fields: dict[str, int]) -> list[Step]:
        """u^T M v of stored vectors: inner products, and the share of each row block in their dot product with the slab."""
        steps, blocks = [], range(len(work.geometry.row_blocks))
        for b in blocks:
            number = self._row_block(work, b, mask, dot=1, then_target=len(blocks), **fields)
            step = Step([], 0)
            for group in range(len(work.geometry.groups)):
                step.add(self._inner_step(work, b, group, mask, STORED, NO_WAIT, number))
            steps.append(step)
        return steps

    def _by_rows(self, work: Work, source: int, before: _Wait, common: dict, finish: dict):
        """Inner products first: a block of rows has its outer products once its inner ones are complete."""
        columns, mask = work.geometry.columns, work.geometry.masks[0]
        firsts, seconds = [], []
        numbers = [
            self._column_block(work, c, j, mask, then_target=len(columns), **common, **finish)
            for j, c in enumerate(columns)
        ]
        for b in range(len(work.geometry.row_blocks)):
            ready = next(self._counter)
            number = self._row_block(work, b, mask, then=ready, **common)
            firsts.append(self._inner_step(work, b, 0, mask, source, before, number))
            second = Step([], 0, firsts[-1])
            for c, number in zip(columns, numbers):
                wait = _Wait(ready, 1)
                second.add(self._outer_step(work, b, c.outer, mask, RAW + common["parity"], wait, number))
            seconds.append(second)
        return firsts, seconds

    def _by_columns(self, work: Work, source: int, before: _Wait, common: dict, finish: dict):
        """Outer products first: a group of columns has its inner products once its outer ones are complete."""
        geometry, mask = work.geometry, work.geometry.masks[1]
        blocks = range(len(geometry.row_blocks))
        firsts, seconds, order = [], [], count()
        numbers = [self._row_block(work, b, mask, then_target=len(blocks), **common, **finish) for b in blocks]
        for g, group in enumerate(geometry.groups):
            ready = next(self._counter)
            first = Step([], 0)
            for c in group:
                number = self._column_block(work, c, next(order), mask, then=ready, **common)
                for b in blocks:
                    first.add(self._outer_step(work, b, c.outer, mask, source, before, number))
            second = Step([], 0, first)
            for b in blocks:
                wait = _Wait(ready, len(group))
                second.add(self._inner_step(work, b, g, mask, RAW + common["parity"], wait, numbers[b]))
            firsts.append(first)
            seconds.append(second)
        return firsts, seconds

    def _layer_wide(self, work: Work, source: int, before: _Wait, common: dict, finish: dict):
        """Directions that contradict each other: both first products of the layer, then both second ones."""
        inner_first, outer_first = work.geometry.masks
        ready, parts = next(self._counter), len(work.geometry.row_blocks) + len(work.geometry.columns)
        first = self._both(work, inner_first, outer_first, source, before, common | dict(then=ready))
        last = common | finish | dict(then_target=parts)
        second = self._both(work, outer_first, inner_first, RAW + common["parity"], _Wait(ready, parts), last)
        second.after = first
        return [first], [second]

    def _vector_steps(self, work: Work, row: LayerRow, iterations: int, done: _Wait, last: Step | None) -> None:
        """Tiles that write the new vectors, and the start of the last iteration, into `saved`."""
        fields, geometry = self._tables[work.k], work.geometry
        first, parity = len(self._vectors), max(iterations - 1, 0) & 1
        for e, role in enumerate(geometry.roles):
            if role is None:
                continue
            for what in ("spread", "slab", "start"):
                if what == "start" and not row.through:
                    continue
                of_spread = role.inner_first if what == "start" else what == "spread"
                name, start = ("spread" if of_spread else "slab"), what == "start"
                at = 1 - parity if start else parity
                is_first = role.inner_first != of_spread  # of the two products; the start was the second one before
                divisor, high, low = _logical(role, of_spread, geometry)
                size = role.spread_size if of_spread else role.slab_size
                record = dict(
                    layer=work.k, address=ADDRESSES.index(f"{name}{e}"), start=start,
                    raw=fields.get(f"{name}_odd{e}" if at else f"{name}{e}", 0),
                    scale=fields[f"results{e}"] + len(RESULTS) * at + (0 if is_first else 1),
                    ok=fields[f"results{e}"] + len(RESULTS) * at + 2,
                    copy=iterations == 0 or (start and iterations == 1),
                    saved=fields[f"saved_{what}{e}"], divisor=divisor, high=high, low=low, size=size,
                )  # fmt: skip
                for begin in range(0, size, VECTOR_PART):
                    part = record | dict(begin=begin, count=min(VECTOR_PART, size - begin))
                    self._vectors.append(_record(VECTOR_FIELDS, **part))
        step = Step([], 0, last)
        # Vectors of one tile are few numbers together: a small layer has one tile for all.
        begin, numbers = first, 0
        for i in range(first, len(self._vectors) + 1):
            n = self._vectors[i][VECTOR_FIELDS.index("count")] if i < len(self._vectors) else VECTOR_PART
            if numbers and numbers + n > VECTOR_PART:
                step.tiles.append(
                    _record(
                        TILE_FIELDS, kind=VECTORS, layer=work.k, row0=begin, rows=i - begin, wait=done.counter,
                        wait_target=done.target, block=-1,
                    )  # fmt: skip
                )
                begin, numbers = i, 0
            numbers += n
        work.steps.append(step)


class BackwardSchedule(Schedule):
    """<G, W> and dW of some layers; for those that differentiate through the iteration one more product each."""

    def __init__(self, rows: Sequence[LayerRow], layers: Sequence[int], itemsize: int) -> None:
        own = [rows[i] for i in layers]
        super().__init__(own, itemsize)
        works = [self._work(k, i, rows[i]) for k, i in enumerate(layers)]
        self._seal(works, own)

    def _work(self, k: int, index: int, row: LayerRow) -> Work:
        geometry = self.geometries[k]
        work, fields = Work(k, geometry), self._layer(k, index, row)
        flat = -(-geometry.numel // geometry.flat_tile)
        fields |= dict(dots=self._double_arena.take(flat + 1), dot_count=flat)
        inner, outer = geometry.masks if row.through else (0, 0)
        parts = 1 + len(geometry.row_blocks) * bool(inner) + len(geometry.columns) * bool(outer)
        finish = dict(then=next(self._counter), done=next(self._counter), then_target=parts, final=1)
        number = self._block(work, DOT, flat, 0, **finish)
        first = self._flat_step(work, DOT, NO_WAIT, None, number)
        self._count("dot", 2 * first.nbytes)
        if row.through:
            self._reserve_through(work, fields, inner, outer)
            first.tiles += self._both(work, inner, outer, SAVED, NO_WAIT, finish).tiles
        work.first, work.steps = first.tiles, [first]
        update = Step([], geometry.numel * self.itemsize, first)
        wait = _Wait(finish["done"], 1)
        for row0, rows in geometry.row_blocks:
            for c in geometry.columns:
                update.tiles += [_tile(UPDATE, k, row0, rows, part, wait, -1, 0, SAVED) for part in c.outer]
        work.steps += _from_the_end(update)
        self._count("update", update.nbytes)
        self._count("written", update.nbytes)
        return work

    def _reserve_through(self, work: Work, fields: dict[str, int], inner: int, outer: int) -> None:
        """Room for the product of W with the new vectors, of which r is made."""
        self._reserve_partials(work, [bool(inner >> e & 1) for e in range(2)], [bool(outer >> e & 1) for e in range(2)])
        for e, role in enumerate(work.geometry.roles):
            if role is not None:
                name, size = ("slab", role.slab_size) if role.inner_first else ("spread", role.spread_size)
                fields[f"{name}{e}"] = fields[f"{name}_odd{e}"] = self._arena.take(size)


def _from_the_end(step: Step) -> list[Step]:
    """A scale pass from what was read last to what was read first, in pieces of LAG bytes."""
    pieces, tiles = max(1, step.nbytes // LAG), step.tiles[::-1]
    size = -(-len(tiles) // pieces)
    cut = [tiles[i : i + size] for i in range(0, len(tiles), size)]
    return [Step(part, step.nbytes * len(part) // len(tiles), step.after, product=False) for part in cut]


class _Order:
    """Puts the steps of all layers into one list of tickets, and their partial sums into a ring of two batches."""

    def __init__(self, works: Sequence[Work], schedule: Schedule) -> None:
        self.schedule, self.tiles = schedule, []
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
        bases = [self.schedule._arena.take(size) for size in sizes]
        counters = [next(self.schedule._counter) for _ in self.batches]
        wait, target = TILE_FIELDS.index("wait"), TILE_FIELDS.index("wait_target")
        then_target, batch, final = (BLOCK_FIELDS.index(name) for name in ("then_target", "batch", "final"))
        for number, works in enumerate(self.batches):
            at = bases[number % 2]
            for work in works:
                self.schedule.place_region(work, at)
                at += work.region
                for block in work.blocks:
                    if block[then_target] and block[final]:
                        block[batch] = counters[number]
                if number >= 2 and work.region:
                    for tile in work.first:
                        tile[wait], tile[target] = counters[number - 2], len(self.batches[number - 2])


def _record(names: Sequence[str], **fields: int) -> list[int]:
    assert fields.keys() <= set(names), fields.keys() - set(names)
    return [int(fields.get(name, 0)) for name in names]


def _tile(
    kind: int, k: int, row0: int, rows: int, part: Columns, wait: _Wait, number: int, mask: int, source: int, slots=None
) -> list[int]:
    slot0, slot1 = slots or part.slots
    return _record(
        TILE_FIELDS, kind=kind, layer=k, row0=row0, rows=rows, col0=part.col0, chunks=part.count, step=part.step,
        width=part.width, end=part.end, slot0=slot0, slot1=slot1, wait=wait.counter, wait_target=wait.target,
        block=number, mask=mask, source=source,
    )  # fmt: skip


def _table(rows: Sequence[Sequence[int]], names: Sequence[str], dtype: torch.dtype) -> Tensor:
    return torch.tensor(rows, dtype=dtype, device="cpu").reshape(-1, len(names))


def _role_fields(role: Role, row: LayerRow) -> dict[str, int]:
    """What the kernels know of a direction, and where it stands in `saved`."""
    sizes = (row.rows_out, row.cols_out, row.rows_in, row.cols_in)
    u = row.vector_offset + sum(sizes[: 2 * role.direction])
    v = u + sizes[2 * role.direction]
    spread, slab = (v, u) if role.axis == 0 else (u, v)
    fields = dict(exists=1, direction=role.direction, inner_first=role.inner_first, modulus=role.modulus)
    fields |= dict(stored_xq=role.stored_x[0], stored_xr=role.stored_x[1], raw_xq=role.raw_x[0], raw_xr=role.raw_x[1])
    fields |= {f"stored_y{axis}": n for axis, n in zip("pqr", role.stored_y)}
    fields |= {f"raw_y{axis}": n for axis, n in zip("pqr", role.raw_y)}
    fields |= dict(fold=role.fold, fold_stride=role.fold_stride, entry_stride=role.entry_stride)
    fields |= dict(slab_size=role.slab_size, saved_spread=spread, saved_slab=slab)
    return fields | dict(saved_start=(row.start_offset_in if role.direction else row.start_offset_out))


def _logical(role: Role, of_spread: bool, geometry: Geometry) -> tuple[int, int, int]:
    """(divisor, high, low): where number e of memory order stands in the stored vector."""
    if of_spread:
        return (geometry.R, *role.stored_x) if role.axis == 0 else (1, 1, 0)
    yp, yq, yr = role.stored_y
    return {0: (1, 1, 0), 1: (geometry.R, yp, yr), 2: (geometry.Q, yp, yq)}[role.axis]


