"""Where the fields of the tables stand (see _tables.py), as constants of the kernels.

Each file names the fields that it reads. They are globals there, and not attributes of this module, because Triton
keeps compiled kernels by their source and the values of such globals.
"""

from __future__ import annotations

import triton.language as tl

from bssn_kernels.backends import _tables as names
from bssn_kernels.backends._geometry import FLAT as FLAT_STEP
from bssn_kernels.plan import SCALARS


def at(fields, *names):
    """Where these fields stand in a record; a single one not as a list."""
    found = [tl.constexpr(fields.index(name)) for name in names]
    return found if len(found) > 1 else found[0]


INNER, OUTER, VECTORS, SCALE, DOT, UPDATE, ROWS_WHOLE, COMBINE = (
    tl.constexpr(getattr(names, kind))
    for kind in ("INNER", "OUTER", "VECTORS", "SCALE", "DOT", "UPDATE", "ROWS", "COMBINE")
)
STORED, RAW, SCALED, SAVED = (tl.constexpr(source) for source in (names.STORED, names.RAW, names.SCALED, names.SAVED))

TILE_WIDTH, BLOCK_WIDTH, VECTOR_WIDTH = (
    tl.constexpr(len(fields)) for fields in (names.TILE_FIELDS, names.BLOCK_FIELDS, names.VECTOR_FIELDS)
)
LAYER_WIDTH = tl.constexpr(len(names.LAYER_FIELDS) + 2 * len(names.ROLE_FIELDS))
ROLES_AT, ROLE_WIDTH = tl.constexpr(len(names.LAYER_FIELDS)), tl.constexpr(len(names.ROLE_FIELDS))
ADDRESS_WIDTH, FLOAT_WIDTH = tl.constexpr(len(names.ADDRESSES)), tl.constexpr(5)
RESULT_WIDTH, N_SCALARS = tl.constexpr(len(names.RESULTS)), tl.constexpr(len(SCALARS))
FLAT = tl.constexpr(FLAT_STEP)
COUNTER = tl.constexpr(8)  # counters are 32 bytes apart, or those who poll one slow those who raise its neighbour

# Whether a size is a multiple of 16 changes nothing in a kernel, and must not make another one.
SIZES = ["n_tiles", "n_programs", "n_counters"]
