"""The tables that a GPU kernel works by: names of their columns, kinds of tiles, places in buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What a tile does. ROWS: both products of whole rows; COMBINE: nothing but to complete its block.
INNER, OUTER, VECTORS, SCALE, DOT, UPDATE, ROWS, COMBINE = range(8)
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
    *("p", "l", "r", "numel", "aligned", "scalars", "has_gain", "norm_adds", "through", "iterated"),
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


def record(names: Sequence[str], **fields: int) -> list[int]:
    assert fields.keys() <= set(names), fields.keys() - set(names)
    return [int(fields.get(name, 0)) for name in names]


def table(rows: Sequence[Sequence[int]], names: Sequence[str], dtype: torch.dtype) -> Tensor:
    return torch.tensor(rows, dtype=dtype, device="cpu").reshape(-1, len(names))


