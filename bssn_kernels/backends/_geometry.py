"""How the kernels of a GPU cut one layer into tiles: rows, chunks of columns, blocks whose sums belong together.

A weight [P, Q, R] is P rows of L = Q R consecutive numbers (views.py). A direction has one vector along a row, its
*spread*, and one across rows, its *slab*:

    row axis P: spread = v, L numbers        slab = u, P numbers
    row axis Q: spread = u, Q numbers        slab = v, P x R numbers (R classes)
    row axis R: spread = u, R numbers        slab = v, P x Q numbers (Q classes)

The *inner* product (slab from spread) sums along rows and is complete for a block of rows once those are read; the
*outer* product (spread from slab) sums across rows and is complete for a block of columns. Every index into a vector
is linear in (p, q, r), and a tile's chunks are chosen such that it is linear in the chunk's number and in a table of
the place within the chunk: see `Columns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

from bssn_kernels.plan import LayerRow

ROWS = 8  # of a weight that a program reads at once
COLS = {8: 128, 4: 256, 2: 256}  # the same, by bytes of a number; a chunk is at most so wide
MOST_CHUNKS = 8  # in an inner tile, whose class sums cost as much as some chunks
TILES = 64  # that a layer gets, about, within the next bounds
SMALLEST_TILE, LARGEST_TILE = 4096, 49152  # elements
GROUP_ROWS = 128  # rows of an outer tile: its partial sums are 1 / 128 of the layer
TALL_ROWS = 512  # the same for layers with short rows; more would add too many numbers in fp32
GROUP_ELEMENTS = 1 << 21  # of a group of columns: 8 MB of fp32 stay in L2 between two products
FLAT = 1024  # flat tiles begin at multiples of this
# Tiles of whole rows: shortest and longest row, by bytes of a number; a program holds a row, its vector and its sums.
WHOLE_ROWS = {8: (128, 2048), 4: (256, 4096), 2: (256, 4096)}
WHOLE_TILES = 32  # that a layer gets, about
LARGEST_WHOLE = 1 << 17  # elements of one, as long as there are not too many
WHOLE_PARTIALS = 3 << 20  # bytes of a layer's partial sums
WHOLE_TERMS = 64  # that a program adds one after the other in fp32: a step has one row, or four that are short
COMBINED = 256  # columns whose partial sums one tile adds up
LONGEST_ROW = 1 << 23  # elements: places within a tile, of up to 128 rows, are 32-bit numbers


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Role:
    """One direction as a kernel sees it. Role 0 needs one slab number per row and chunk; role 1 may need one per
    number, which costs registers, so a layer's direction takes role 0 where it can.

    Attributes:
        stored_x, stored_y: strides (q, r) of the spread and (p, q, r) of the slab in the stored vectors.
        raw_x, raw_y: the same in the workspace, which keeps vectors in the order of memory.
        modulus: classes that an inner tile separates; 0 where every column of a chunk is a class of its own.
        fold, fold_stride, entry_stride: number e of the spread is the sum of columns
            e * entry_stride + f * fold_stride for f < fold.
    """

    direction: int
    axis: int
    inner_first: bool
    stored_x: tuple[int, int]
    stored_y: tuple[int, int, int]
    raw_x: tuple[int, int]
    raw_y: tuple[int, int, int]
    spread_size: int
    slab_size: int
    modulus: int
    fold: int
    fold_stride: int
    entry_stride: int


@dataclass(frozen=True)
class Columns:
    """Some chunks of columns: column col0 + i * step + b, for i < count and b < width, below end."""

    col0: int
    count: int
    step: int
    width: int
    end: int
    slots: tuple[int, int] = (0, 0)  # where an inner tile puts its partial sums, by role

    @property
    def numel(self) -> int:
        last = min(self.width, self.end - self.col0 - (self.count - 1) * self.step)
        return (self.count - 1) * self.width + last


@dataclass(frozen=True)
class ColumnBlock:
    """Columns whose outer product is combined at once, and the column parts of its tiles.

    Attributes:
        entries: first spread number and how many, by role.
        segments: how often role 0's entries come again, R further on (row axis P where chunks are runs of R).
    """

    outer: tuple[Columns, ...]
    entries: tuple[tuple[int, int], tuple[int, int]]
    segments: int


class Geometry:
    """One layer as tiles; depends on its table row and element size alone. So does the order of its sums, but for a
    weight that does not stand at a multiple of 16 bytes, which kernels read number by number.

    Attributes:
        roles: by role, None where the layer has no such direction.
        masks: roles that begin with their inner product, and those that begin with the outer one, as bits.
        whole: a tile takes both products of a block of whole rows, which reads the weight once; there are no groups and
            inner tiles then, and no column parts of outer ones.
        columns: the column blocks.
        groups: runs of them; the inner tiles of a group read just its columns. One group, unless all
            directions begin with their outer product.
        inner: column parts of the inner tiles, by group.
        slots: number of partial slabs, by role.
        row_blocks: (first row, rows).
    """

    def __init__(self, row: LayerRow, itemsize: int, whole: bool = False) -> None:
        """
        Args:
            whole: tiles of whole rows, where rows have the length for it and one direction begins with inner products.
        """
        self.row, self.widest, unit = row, COLS[itemsize], 16 // itemsize
        self.P, self.Q, self.R = row.p, row.q, row.r
        self.L = row.q * row.r
        self.numel = row.p * self.L
        self._assign_roles(row)
        self._choose_scheme(unit)
        inner = sum(1 << e for e, role in enumerate(self.roles) if role and role.inner_first)
        outer = sum(1 << e for e, role in enumerate(self.roles) if role and not role.inner_first)
        self.masks = inner, outer
        self.columns_first, self.mixed = not inner, bool(inner and outer)
        elements = min(max(self.numel // TILES, SMALLEST_TILE), LARGEST_TILE)
        self.flat_tile = ceil_div(elements, FLAT) * FLAT
        rows = self._rows_of_whole_tiles(itemsize) if whole else 0
        self.whole = rows > 0
        if self.whole:
            self._cut_whole(rows)
        else:
            self._cut(elements)

    @property
    def general(self) -> bool:
        """Whether a kernel needs role 1 for it."""
        return self.roles[1] is not None

    def _assign_roles(self, row: LayerRow) -> None:
        made = [self._role(row, d) for d in range(row.directions)]
        simple = [m for m in made if m.axis != 1 or self.R == 1]
        first = next((m for m in simple if m.axis == 0), simple[0] if simple else None)
        rest = [m for m in made if m is not first]
        self.roles: tuple[Role | None, Role | None] = (first, rest[0] if rest else None)
        axes = {m.axis for m in made}
        self.has_r = 2 in axes
        self.has_q = 1 in axes and self.R > 1
        self.permuted = any(m.axis == 0 and m.stored_x != m.raw_x for m in made)

    def _role(self, row: LayerRow, d: int) -> Role:
        out = d == 0
        axis = row.row_axis_out if out else row.row_axis_in
        vu = bool(row.vu_out if out else row.vu_in)
        outer, inner = (row.outer_out, row.inner_out) if out else (row.outer_in, row.inner_in)
        P, Q, R = self.P, self.Q, self.R
        common = {"direction": d, "axis": axis, "inner_first": vu if axis else not vu}
        if axis == 0:
            stored = (outer if Q > 1 else R, inner if R > 1 else 1)  # the stride of a missing axis says nothing
            return Role(
                **common, stored_x=stored, stored_y=(1, 0, 0), raw_x=(R, 1), raw_y=(1, 0, 0), spread_size=self.L,
                slab_size=P, modulus=1, fold=1, fold_stride=0, entry_stride=1,
            )  # fmt: skip
        if axis == 1:
            return Role(
                **common, stored_x=(1, 0), stored_y=(outer, 0, inner), raw_x=(1, 0), raw_y=(R, 0, 1), spread_size=Q,
                slab_size=P * R, modulus=R, fold=R, fold_stride=1, entry_stride=R,
            )  # fmt: skip
        return Role(
            **common, stored_x=(0, 1), stored_y=(outer, inner, 0), raw_x=(0, 1), raw_y=(Q, 1, 0), spread_size=R,
            slab_size=P * Q, modulus=1, fold=Q, fold_stride=R, entry_stride=1,
        )  # fmt: skip

    def _choose_scheme(self, unit: int) -> None:
        """Chunks of whole periods of R where those fit, else chunks within one run of R numbers."""
        whole_rows = self.L % unit == 0
        period = self.R * unit // gcd(self.R, unit) if whole_rows else self.R
        needs_period = self.has_q or self.permuted
        self.runs = self.has_r or (needs_period and period > self.widest)
        self.aligned = whole_rows and not (self.runs and self.R % unit)
        if self.runs:
            self.chunk = min(self.widest, self.R)
        else:
            self.chunk = self.widest // period * period if needs_period else self.widest
        if self.runs and self.has_q:
            self.roles = tuple(
                role and (replace(role, modulus=0) if role.axis == 1 else role) for role in self.roles
            )

    def _rows_of_whole_tiles(self, itemsize: int) -> int:
        """0 where there can be none: rows too short, too long, or so many that sums have too many terms or no room."""
        shortest, longest = WHOLE_ROWS[itemsize]
        alone = self.masks == (1, 0) and self.roles[0].axis == 0
        if not (alone and shortest <= self.L <= longest and self.L * itemsize % 16 == 0):
            return 0
        most = WHOLE_TERMS * (1 if longest // 4 < self.L else 4)
        tiles = WHOLE_PARTIALS // (self.L * max(itemsize, 4))
        least = ceil_div(ceil_div(self.P, tiles), ROWS) * ROWS
        usual = min(self.numel // WHOLE_TILES, LARGEST_WHOLE) // self.L // ROWS * ROWS
        return max(min(usual, most), least) if least <= most else 0

    def _cut_whole(self, rows: int) -> None:
        self.row_blocks = _pieces(self.P, rows)
        cuts = _pieces(self.L, COMBINED)
        self.columns = [ColumnBlock((), ((col0, n), (0, 0)), 1) for col0, n in cuts]
        self.slots = 0, 0

    def _cut(self, elements: int) -> None:
        wide = min(self.L, self.chunk)
        most = GROUP_ROWS if self.widest <= self.L else TALL_ROWS
        T = min(max(elements // max(wide, 1) // ROWS * ROWS, ROWS), most)
        self.row_blocks = _pieces(self.P, T)
        rows = self.row_blocks[0][1]
        chunks = max(1, elements // (rows * wide))
        blocks = self._run_blocks(chunks) if self.runs else self._interval_blocks(chunks)
        per_group = len(blocks)
        if self.columns_first:
            width = sum(c.numel for c in blocks[0].outer)
            per_group = max(1, min(MOST_CHUNKS // max(blocks[0].outer[0].count, 1), GROUP_ELEMENTS // (self.P * width)))
        self.columns = blocks
        self.groups = [blocks[i : i + per_group] for i in range(0, len(blocks), per_group)]
        self._cut_inner(elements)

    def _interval_blocks(self, chunks: int) -> list[ColumnBlock]:
        blocks = []
        for first, n in _pieces(ceil_div(self.L, self.chunk), chunks):
            col0, end = first * self.chunk, min(self.L, (first + n) * self.chunk)
            blocks.append(
                ColumnBlock((Columns(col0, n, self.chunk, self.chunk, end),), self._entries(col0, end - col0), 1)
            )
        return blocks

    def _entries(self, col0: int, n: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Spread numbers of an interval of columns that holds whole periods of R, by role."""
        of = []
        for role in self.roles:
            if role is not None and role.axis == 1:
                of.append((col0 // self.R, ceil_div(n, self.R)))
            else:
                of.append((col0, n))
        return of[0], of[1]

    def _run_blocks(self, chunks: int) -> list[ColumnBlock]:
        Q, R, U = self.Q, self.R, self.chunk
        if self.has_q and self.has_r:  # both sums need all columns
            parts = [Columns(q * R + r, 1, R, w, q * R + R) for q in range(Q) for r, w in _pieces(R, U)]
            of = tuple((0, role.spread_size) if role else (0, 0) for role in self.roles)
            return [ColumnBlock(tuple(parts), of, 1)]
        blocks = []
        if self.has_q:
            for q, n in _pieces(Q, min(chunks, MOST_CHUNKS)):  # inner tiles have the same columns
                parts = tuple(Columns(q * R + r, n, R, w, self.L) for r, w in _pieces(R, U))
                blocks.append(ColumnBlock(parts, self._entries(q * R, n * R), 1))
            return blocks
        for r, w in _pieces(R, U):
            parts = tuple(Columns(q * R + r, n, R, w, self.L) for q, n in _pieces(Q, chunks))
            blocks.append(ColumnBlock(parts, ((r, w), (r, w)), Q if self.roles[0] and self.roles[0].axis == 0 else 1))
        return blocks

    def _cut_inner(self, elements: int) -> None:
        """The column parts of inner tiles, their slots, and the rows of inner tiles in each row block."""
        numbers: tuple[dict, dict] = ({}, {})
        self.inner: list[list[Columns]] = []
        for group in self.groups:
            parts = self._inner_runs(group) if self.runs else self._inner_intervals(group)
            for i, part in enumerate(parts):
                keys = (self._slot_key(role, part) for role in self.roles)
                slots = tuple(known.setdefault(key, len(known)) for known, key in zip(numbers, keys))
                parts[i] = replace(part, slots=slots)
            self.inner.append(parts)
        flat = [part for parts in self.inner for part in parts]
        self.slots = tuple(len(known) if role else 0 for known, role in zip(numbers, self.roles))
        widest = max(part.numel for part in flat)
        self.inner_rows = min(max(elements // widest // ROWS * ROWS, ROWS), self.row_blocks[0][1])

    def _inner_intervals(self, group: Sequence[ColumnBlock]) -> list[Columns]:
        col0, end = group[0].outer[0].col0, group[-1].outer[-1].end
        parts = []
        for first, n in _pieces(ceil_div(end - col0, self.chunk), MOST_CHUNKS):
            begin = col0 + first * self.chunk
            parts.append(Columns(begin, n, self.chunk, self.chunk, min(end, begin + n * self.chunk)))
        return parts

    def _inner_runs(self, group: Sequence[ColumnBlock]) -> list[Columns]:
        if self.has_q:  # every column of a chunk is a class: chunks of one tile have the same r
            return [part for block in group for part in block.outer]
        r0 = group[0].outer[0].col0 % self.R
        last = group[-1].outer[0]
        r1 = last.col0 % self.R + last.width
        parts = []
        for q in range(self.Q):
            for first, n in _pieces(ceil_div(r1 - r0, self.chunk), MOST_CHUNKS):
                begin = r0 + first * self.chunk
                end = min(r1, begin + n * self.chunk)
                parts.append(Columns(q * self.R + begin, n, self.chunk, self.chunk, q * self.R + end))
        return parts

    def _slot_key(self, role: Role | None, part: Columns) -> int:
        """Tiles that give different classes may share a slot; those that add to the same numbers may not."""
        if role is None:
            return 0
        if not self.runs or role.axis == 0:
            return part.col0
        q, r = divmod(part.col0, self.R)
        return q if role.axis == 1 else r

    def inner_row_tiles(self, block: int) -> list[tuple[int, int]]:
        """(first row, rows) of the inner tiles in a row block."""
        first, n = self.row_blocks[block]
        return [(first + i, m) for i, m in _pieces(n, self.inner_rows)]


def _pieces(n: int, most: int) -> list[tuple[int, int]]:
    """n cut into runs of ``most`` and what remains: (begin, length)."""
    return [(i, min(most, n - i)) for i in range(0, n, most)]
