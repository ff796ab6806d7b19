"""The work of one fused launch on a GPU as data: tiles in the order in which programs take them.

A launch is a persistent grid. A program takes the next ticket, waits until the tile's counter has reached its target,
does the tile, and raises the counter of the tile's *block*; whoever raises it last adds the block's partial sums in
their fixed order and raises the next counter. So sums do not depend on who computes what, and a tile waits only on
tiles with smaller tickets, so nothing depends on how many programs run. Changing the schedule means changing the
lists here, not a kernel.

_geometry.py cuts layers into tiles, _order.py puts them in order, _tables.py names the columns of the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from bssn_kernels.backends._geometry import FLAT, ColumnBlock, Columns, Geometry, Role
from bssn_kernels.backends._order import Machine, Order, Step, Work, from_the_end
from bssn_kernels.backends._tables import (
    ADDRESSES,
    BLOCK_FIELDS,
    COMBINE,
    DOT,
    INNER,
    LAYER_FIELDS,
    OUTER,
    RAW,
    RESULTS,
    ROLE_FIELDS,
    ROWS,
    SAVED,
    SCALE,
    SCALED,
    STORED,
    TILE_FIELDS,
    UPDATE,
    VECTOR_FIELDS,
    VECTOR_PART,
    VECTORS,
    Arena,
    record,
    table,
)
from bssn_kernels.plan import LayerRow


@dataclass(frozen=True)
class Wait:
    counter: int = 0
    target: int = 0


NO_WAIT = Wait()


class Schedule:
    """The tables of one launch.

    Attributes:
        tiles, blocks, layers, vectors, floats: what the kernels read, on the CPU; columns as in *_FIELDS.
        stores: those of `vectors` that belong where the stored ones are; the others are starts of iterations.
        n_counters: int32 counters, the first of which is the ticket.
        workspace, doubles: numbers in accumulation dtype and in float64 that a launch needs.
        general: whether a layer needs role 1; through: whether one differentiates through its iteration.
        traffic: bytes read and written in each phase, partial sums left out.
    """

    def __init__(
        self, rows: Sequence[LayerRow], itemsize: int, machine: Callable[[Schedule], Machine] | None = None
    ) -> None:
        """
        Args:
            machine: what a schedule's launch runs on, which decides the order of tiles and no bit of the results.
        """
        self.itemsize, self.machine = itemsize, machine
        self.geometries = [self._geometry(k, row) for k, row in enumerate(rows)]
        self.general = any(g.general for g in self.geometries)
        self.through = any(row.through for row in rows)
        self.counter = count(1)
        self.arena, self._doubles = Arena(), Arena()
        self._tables: list[dict[str, int]] = []
        self._vectors: list[list[int]] = []
        self.traffic: dict[str, int] = {}

    def _geometry(self, k: int, row: LayerRow) -> Geometry:
        return Geometry(row, self.itemsize)

    @staticmethod
    def directions(row: LayerRow, itemsize: int) -> list[tuple[int, bool] | None]:
        """By role: the direction, and whether its spread is v; None where a role has none."""
        roles = Geometry(row, itemsize).roles
        return [role and (role.direction, role.axis == 0) for role in roles]

    def _seal(self, works: Sequence[Work], rows: Sequence[LayerRow]) -> None:
        order = Order(works, self, self.machine(self) if self.machine else Machine())
        blocks = [block for work in works for block in work.blocks]
        self.tiles = table(order.tiles, TILE_FIELDS, torch.int32)
        self.blocks = table(blocks, BLOCK_FIELDS, torch.int32)
        self.vectors = table(self._vectors, VECTOR_FIELDS, torch.int64)
        self.stores = self.vectors[self.vectors[:, VECTOR_FIELDS.index("start")] == 0]
        names = [*LAYER_FIELDS, *(f"{name}{e}" for e in range(2) for name in ROLE_FIELDS)]
        self.layers = table([[t.get(name, 0) for name in names] for t in self._tables], names, torch.int64)
        floats = [[r.eps, r.weight_out, r.weight_in, r.floor, r.gain] for r in rows]
        self.floats = torch.tensor(floats, dtype=torch.float64, device="cpu")
        self.n_counters = next(self.counter)
        self.workspace, self.doubles = self.arena.numel, self._doubles.numel

    def _layer(self, k: int, row: LayerRow) -> dict[str, int]:
        """The fields that do not depend on what is computed."""
        geometry = self.geometries[k]
        fields = {"p": row.p, "l": geometry.L, "r": geometry.R, "numel": geometry.numel}
        fields |= {"aligned": geometry.aligned, "scalars": row.scalar_offset, "has_gain": row.has_gain}
        fields |= {"norm_adds": row.norm_adds, "through": row.through}
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

    def _inner_step(self, work: Work, block: int, group: int, mask: int, source: int, wait: Wait, number: int) -> Step:
        """Inner products of a row block over the columns of a group; they raise the counter of block ``number``."""
        tiles, numel = [], 0
        for row0, rows in work.geometry.inner_row_tiles(block):
            for part in work.geometry.inner[group]:
                tiles.append(_tile(INNER, work.k, row0, rows, part, wait, number, mask, source))
                numel += rows * part.numel
        self._count("inner", numel * self.itemsize)
        return Step(tiles, numel * self.itemsize)

    def _outer_step(
        self, work: Work, block: int, parts: Sequence[Columns], mask: int, source: int, wait: Wait, number: int
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
        arrivals = 1 if work.geometry.whole else len(work.geometry.row_blocks) * len(c.outer)
        (start0, count0), (start1, count1) = c.entries
        places = {"start0": start0, "count0": count0, "segments": c.segments, "start1": start1, "count1": count1}
        return self._block(work, OUTER, arrivals, mask, share=j, **places, **fields)

    def _both(self, work: Work, inner: int, outer: int, source: int, wait: Wait, fields: dict[str, int]) -> Step:
        """Inner and outer products of the roles in two masks over the whole layer, tiles of the same rows together."""
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

    def _flat_step(self, work: Work, kind: int, wait: Wait, after: tuple[Step, ...], number: int = -1) -> Step:
        """Flat tiles over the whole layer."""
        size, numel = work.geometry.flat_tile, work.geometry.numel
        tiles = [
            record(
                TILE_FIELDS, kind=kind, layer=work.k, row0=start // FLAT, rows=min(size, numel - start),
                wait=wait.counter, wait_target=wait.target, block=number, slot0=start // size,
            )
            for start in range(0, numel, size)
        ]  # fmt: skip
        return Step(tiles, numel * self.itemsize, after, streams=2 if kind == DOT else 1)

    def _block(self, work: Work, kind: int, arrivals: int, mask: int, **fields: int) -> int:
        """A new block of the layer; returns its number, counted within the layer until the order is known."""
        fields |= {"kind": kind, "layer": work.k, "counter": next(self.counter), "arrivals": arrivals, "mask": mask}
        work.blocks.append(record(BLOCK_FIELDS, batch=-1, **fields))
        return len(work.blocks) - 1


class ForwardSchedule(Schedule):
    """Power iterations, sigmas and scale pass of all layers, each with its own number of iterations."""

    def __init__(
        self,
        rows: Sequence[LayerRow],
        iterations: Sequence[int],
        itemsize: int,
        machine: Callable[[Schedule], Machine] | None = None,
        whole_rows: Sequence[bool] = (),
    ) -> None:
        """
        Args:
            whole_rows: layers that may have tiles of whole rows, by default none; the kernels have to know such tiles,
                and the weight has to stand at a multiple of 16 bytes.
        """
        allowed = whole_rows or [False] * len(rows)
        self.whole_rows = [may and n > 0 for may, n in zip(allowed, iterations)]
        super().__init__(rows, itemsize, machine)
        works = [self._work(k, row, n) for k, (row, n) in enumerate(zip(rows, iterations))]
        self._seal(works, rows)

    def _geometry(self, k: int, row: LayerRow) -> Geometry:
        return Geometry(row, self.itemsize, whole=self.whole_rows[k])

    def _work(self, k: int, row: LayerRow, iterations: int) -> Work:
        work = Work(k, self.geometries[k])
        fields = self._layer(k, row)
        fields["iterated"] = iterations > 0
        self._reserve(work, fields, iterations)
        done, last = NO_WAIT, ()
        for i in range(max(iterations, 1)):
            done, last = self._iteration(work, i, iterations, done, last)
        self._vector_steps(work, row, iterations, done, last)
        work.steps.append(from_the_end(self._flat_step(work, SCALE, done, last)))
        self._count("scale", work.geometry.numel * self.itemsize)
        self._count("written", work.geometry.numel * self.itemsize)
        return work

    def _reserve(self, work: Work, fields: dict[str, int], iterations: int) -> None:
        geometry = work.geometry
        present = [role is not None for role in geometry.roles]
        outer = present if iterations else [False, False]
        self._reserve_partials(work, [p and not geometry.whole for p in present], outer)
        for e, role in enumerate(geometry.roles):
            if role is None:
                continue
            sizes = {"slab": role.slab_size} | ({"spread": role.spread_size} if iterations else {})
            for name, size in sizes.items():
                fields[f"{name}{e}"] = self.arena.take(size)
                fields[f"{name}_odd{e}"] = self.arena.take(size) if iterations > 1 else fields[f"{name}{e}"]
            counts = {"inner": len(geometry.row_blocks), "outer": len(geometry.columns)}
            for name, n in counts.items():
                fields[f"{name}_shares{e}"] = self._doubles.take(n)
                fields[f"{name}_share_count{e}"] = n
            fields[f"results{e}"] = self._doubles.take(2 * len(RESULTS))

    def _iteration(self, work: Work, i: int, iterations: int, before: Wait, last: tuple[Step, ...]):
        """Both products of one iteration, or the one product that a forward without iteration needs.

        Returns:
            What tells that it is done, and its steps.
        """
        geometry, parity = work.geometry, i & 1
        inner_first, outer_first = geometry.masks
        common = {"parity": parity, "final": int(i + 1 >= iterations)}
        finish = {"done": next(self.counter), "then": next(self.counter)}
        source = STORED if i == 0 else SCALED + (1 - parity)
        if iterations == 0:
            firsts, seconds = self._one_product(work, inner_first | outer_first, common | finish), []
        elif geometry.whole:
            firsts, seconds = self._whole(work, source, before, common, finish)
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
        return Wait(finish["done"], 1), (*firsts, *seconds)

    def _one_product(self, work: Work, mask: int, fields: dict[str, int]) -> list[Step]:
        """u^T M v of stored vectors: inner products, and each row block's share of their dot product with the slab."""
        steps, blocks = [], range(len(work.geometry.row_blocks))
        for b in blocks:
            number = self._row_block(work, b, mask, dot=1, then_target=len(blocks), **fields)
            step = Step([], 0)
            for group in range(len(work.geometry.groups)):
                step.add(self._inner_step(work, b, group, mask, STORED, NO_WAIT, number))
            steps.append(step)
        return steps

    def _by_rows(self, work: Work, source: int, before: Wait, common: dict, finish: dict):
        """Inner products first: a block of rows has its outer products once its inner ones are complete."""
        columns, mask = work.geometry.columns, work.geometry.masks[0]
        firsts, seconds = [], []
        numbers = [
            self._column_block(work, c, j, mask, then_target=len(columns), **common, **finish)
            for j, c in enumerate(columns)
        ]
        for b in range(len(work.geometry.row_blocks)):
            ready = next(self.counter)
            number = self._row_block(work, b, mask, then=ready, **common)
            firsts.append(self._inner_step(work, b, 0, mask, source, before, number))
            second = Step([], 0, (firsts[-1],))
            for c, number in zip(columns, numbers):
                wait = Wait(ready, 1)
                second.add(self._outer_step(work, b, c.outer, mask, RAW + common["parity"], wait, number))
            seconds.append(second)
        return firsts, seconds

    def _whole(self, work: Work, source: int, before: Wait, common: dict, finish: dict):
        """Both products of whole rows by one tile; what its outer product left is added up when all are there."""
        geometry, ready = work.geometry, next(self.counter)
        number = self._block(work, INNER, len(geometry.row_blocks), 0, then=ready, **common)
        whole = Columns(0, 1, 0, geometry.L, geometry.L)
        first = Step([], geometry.numel * self.itemsize)
        for b, (row0, rows) in enumerate(geometry.row_blocks):
            first.tiles.append(_tile(ROWS, work.k, row0, rows, whole, before, number, 1, source, (b, b)))
        self._count("rows", first.nbytes)
        partials = len(geometry.row_blocks) * geometry.L * max(self.itemsize, 4)
        second = Step([], partials, (first,))
        for j, c in enumerate(geometry.columns):
            number = self._column_block(work, c, j, 1, then_target=len(geometry.columns), **common, **finish)
            second.tiles.append(_tile(COMBINE, work.k, 0, 0, whole, Wait(ready, 1), number, 1, 0))
        return [first], [second]

    def _by_columns(self, work: Work, source: int, before: Wait, common: dict, finish: dict):
        """Outer products first: a group of columns has its inner products once its outer ones are complete."""
        geometry, mask = work.geometry, work.geometry.masks[1]
        blocks = range(len(geometry.row_blocks))
        firsts, seconds, order = [], [], count()
        numbers = [self._row_block(work, b, mask, then_target=len(blocks), **common, **finish) for b in blocks]
        for g, group in enumerate(geometry.groups):
            ready = next(self.counter)
            first = Step([], 0)
            for c in group:
                number = self._column_block(work, c, next(order), mask, then=ready, **common)
                for b in blocks:
                    first.add(self._outer_step(work, b, c.outer, mask, source, before, number))
            second = Step([], 0, (first,))
            for b in blocks:
                wait = Wait(ready, len(group))
                second.add(self._inner_step(work, b, g, mask, RAW + common["parity"], wait, numbers[b]))
            firsts.append(first)
            seconds.append(second)
        return firsts, seconds

    def _layer_wide(self, work: Work, source: int, before: Wait, common: dict, finish: dict):
        """Directions that contradict each other: both first products of the layer, then both second ones."""
        inner_first, outer_first = work.geometry.masks
        ready, parts = next(self.counter), len(work.geometry.row_blocks) + len(work.geometry.columns)
        first = self._both(work, inner_first, outer_first, source, before, common | {"then": ready})
        last = common | finish | {"then_target": parts}
        second = self._both(work, outer_first, inner_first, RAW + common["parity"], Wait(ready, parts), last)
        second.after = (first,)
        return [first], [second]

    def _vector_steps(self, work: Work, row: LayerRow, iterations: int, done: Wait, last: tuple[Step, ...]) -> None:
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
                common = {
                    "layer": work.k,
                    "address": ADDRESSES.index(f"{name}{e}"),
                    "start": start,
                    "size": size,
                    "raw": fields.get(f"{name}_odd{e}" if at else f"{name}{e}", 0),
                    "scale": fields[f"results{e}"] + len(RESULTS) * at + (0 if is_first else 1),
                    "ok": fields[f"results{e}"] + len(RESULTS) * at + 2,
                    "copy": iterations == 0 or (start and iterations == 1),
                    "saved": fields[f"saved_{what}{e}"],
                    "divisor": divisor,
                    "high": high,
                    "low": low,
                }
                for begin in range(0, size, VECTOR_PART):
                    part = {"begin": begin, "count": min(VECTOR_PART, size - begin)}
                    self._vectors.append(record(VECTOR_FIELDS, **common, **part))
        step = Step([], 0, last)
        # Vectors of one tile are few numbers together: a small layer has one tile for all.
        begin, numbers = first, 0
        for i in range(first, len(self._vectors) + 1):
            n = self._vectors[i][VECTOR_FIELDS.index("count")] if i < len(self._vectors) else VECTOR_PART
            if numbers and numbers + n > VECTOR_PART:
                step.tiles.append(
                    record(
                        TILE_FIELDS, kind=VECTORS, layer=work.k, row0=begin, rows=i - begin, wait=done.counter,
                        wait_target=done.target, block=-1,
                    )  # fmt: skip
                )
                begin, numbers = i, 0
            numbers += n
        work.steps.append(step)


class BackwardSchedule(Schedule):
    """<G, W> and dW of some layers; for those that differentiate through the iteration one more product each."""

    def __init__(
        self,
        rows: Sequence[LayerRow],
        layers: Sequence[int],
        itemsize: int,
        machine: Callable[[Schedule], Machine] | None = None,
    ) -> None:
        own = [rows[i] for i in layers]
        super().__init__(own, itemsize, machine)
        works = [self._work(k, row) for k, row in enumerate(own)]
        self._seal(works, own)

    def _work(self, k: int, row: LayerRow) -> Work:
        geometry = self.geometries[k]
        work, fields = Work(k, geometry), self._layer(k, row)
        flat = -(-geometry.numel // geometry.flat_tile)
        fields |= {"dots": self._doubles.take(flat + 1), "dot_count": flat}
        inner, outer = geometry.masks if row.through else (0, 0)
        parts = 1 + len(geometry.row_blocks) * bool(inner) + len(geometry.columns) * bool(outer)
        finish = {"then": next(self.counter), "done": next(self.counter), "then_target": parts, "final": 1}
        number = self._block(work, DOT, flat, 0, **finish)
        first = self._flat_step(work, DOT, NO_WAIT, (), number)
        self._count("dot", 2 * first.nbytes)
        if row.through:
            self._reserve_through(work, fields, inner, outer)
            first.tiles += self._both(work, inner, outer, SAVED, NO_WAIT, finish).tiles
        work.first, work.steps = first.tiles, [first]
        update = Step([], geometry.numel * self.itemsize, (first,))
        wait = Wait(finish["done"], 1)
        for row0, rows in geometry.row_blocks:
            for c in geometry.columns:
                update.tiles += [_tile(UPDATE, k, row0, rows, part, wait, -1, 0, SAVED) for part in c.outer]
        work.steps.append(from_the_end(update))
        self._count("update", update.nbytes)
        self._count("written", update.nbytes)
        return work

    def _reserve_through(self, work: Work, fields: dict[str, int], inner: int, outer: int) -> None:
        """Room for the product of W with the new vectors, of which r is made."""
        self._reserve_partials(work, [bool(inner >> e & 1) for e in range(2)], [bool(outer >> e & 1) for e in range(2)])
        for e, role in enumerate(work.geometry.roles):
            if role is not None:
                name, size = ("slab", role.slab_size) if role.inner_first else ("spread", role.spread_size)
                fields[f"{name}{e}"] = fields[f"{name}_odd{e}"] = self.arena.take(size)


def _tile(
    kind: int, k: int, row0: int, rows: int, part: Columns, wait: Wait, number: int, mask: int, source: int, slots=None
) -> list[int]:
    slot0, slot1 = slots or part.slots
    return record(
        TILE_FIELDS, kind=kind, layer=k, row0=row0, rows=rows, col0=part.col0, chunks=part.count, step=part.step,
        width=part.width, end=part.end, slot0=slot0, slot1=slot1, wait=wait.counter, wait_target=wait.target,
        block=number, mask=mask, source=source,
    )  # fmt: skip


def _role_fields(role: Role, row: LayerRow) -> dict[str, int]:
    """What the kernels know of a direction, and where it stands in `saved`."""
    sizes = (row.rows_out, row.cols_out, row.rows_in, row.cols_in)
    u = row.vector_offset + sum(sizes[: 2 * role.direction])
    v = u + sizes[2 * role.direction]
    spread, slab = (v, u) if role.axis == 0 else (u, v)
    fields = {"exists": 1, "direction": role.direction, "inner_first": role.inner_first, "modulus": role.modulus}
    fields |= {f"stored_x{axis}": n for axis, n in zip("qr", role.stored_x)}
    fields |= {f"raw_x{axis}": n for axis, n in zip("qr", role.raw_x)}
    fields |= {f"stored_y{axis}": n for axis, n in zip("pqr", role.stored_y)}
    fields |= {f"raw_y{axis}": n for axis, n in zip("pqr", role.raw_y)}
    fields |= {"fold": role.fold, "fold_stride": role.fold_stride, "entry_stride": role.entry_stride}
    fields |= {"slab_size": role.slab_size, "saved_spread": spread, "saved_slab": slab}
    return fields | {"saved_start": (row.start_offset_in if role.direction else row.start_offset_out)}


def _logical(role: Role, of_spread: bool, geometry: Geometry) -> tuple[int, int, int]:
    """(divisor, high, low): where number e of memory order stands in the stored vector."""
    if of_spread:
        return (geometry.R, *role.stored_x) if role.axis == 0 else (1, 1, 0)
    yp, yq, yr = role.stored_y
    return {0: (1, 1, 0), 1: (geometry.R, yp, yr), 2: (geometry.Q, yp, yq)}[role.axis]


