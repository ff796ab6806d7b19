"""How a weight of any shape and memory format is read as a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor


def matrix(weight: Tensor, axis: int) -> Tensor:
    """The matrix whose rows are ``axis`` and whose columns are all other axes in logical order.

    Args:
        weight: (s_0, ..., s_n), at least one axis; a vector becomes (s_0, 1).
        axis: 0 <= axis < weight.ndim.

    Returns:
        (s_axis, product of the others): a view where strides allow, else a copy.
    """
    if weight.ndim == 1:
        return weight.unsqueeze(1)
    return weight.movedim(axis, 0).flatten(1)


def fold(columns: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """The inverse of :func:`matrix`: (rows, cols) back to ``shape``."""
    if len(shape) == 1:
        return columns.squeeze(1)
    rest = [n for i, n in enumerate(shape) if i != axis]
    return columns.reshape(shape[axis], *rest).movedim(0, axis)


def other_channel_axis(axis: int) -> int:
    """The axis that is the row axis of the in-direction, given that of the out-direction."""
    return 1 if axis == 0 else 0


@dataclass(frozen=True)
class MatrixView:
    """One direction of a weight, in the physical order of its memory.

    A dense weight is an array [P, Q, R] in memory order. The rows of this direction are one of the three axes; its
    columns are the other two, and ``outer_stride``, ``inner_stride`` say where their elements stand in the
    logical column vector: element (x, y) of the two remaining physical axes, in physical order, is column
    ``x * outer_stride + y * inner_stride``.

    Attributes:
        row_axis: 0, 1 or 2, for P, Q or R.
        rows, cols: sizes of the matrix.
    """

    row_axis: int
    rows: int
    cols: int
    outer_stride: int
    inner_stride: int


@dataclass(frozen=True)
class DenseView:
    """A weight as a dense array [P, Q, R] in memory order, with its directions."""

    extents: tuple[int, int, int]
    directions: tuple[MatrixView, ...]


def dense_view(shape: tuple[int, ...], stride: tuple[int, ...], row_axes: tuple[int, ...]) -> DenseView | str:
    """Merge the axes of a weight into at most three physical ones, keeping every row axis apart.

    Args:
        shape, stride: of the weight, in elements.
        row_axes: logical row axis of each direction.

    Returns:
        The view, or the reason (a sentence) why there is none: the weight has gaps or overlaps, or its memory order
        scatters the axes so that more than three remain.
    """
    axes = [i for i in sorted(range(len(shape)), key=lambda i: (-stride[i], -shape[i])) if shape[i] != 1]
    expected = 1
    for i in reversed(axes):
        if stride[i] != expected:
            return f"shape {tuple(shape)} with strides {tuple(stride)} is not dense (gaps or overlaps)"
        expected *= shape[i]

    merged: list[list[int]] = []  # runs of logical axes that are one physical axis and keep their logical order
    for i in axes:
        previous = merged[-1] if merged else None
        apart = i in row_axes or not previous or previous[-1] in row_axes
        if not apart and _adjacent(previous[-1], i, shape, row_axes):
            previous.append(i)
        else:
            merged.append([i])
    for axis in row_axes:  # a row axis of length 1 has no place in memory: give it one
        if shape[axis] == 1:
            merged.insert(0, [axis])
    if len(merged) > 3:
        return f"shape {tuple(shape)} with strides {tuple(stride)} does not merge into three physical axes"
    merged += [[]] * (3 - len(merged))
    extents = tuple(prod(shape[i] for i in run) for run in merged)
    return DenseView(extents, tuple(_direction(merged, extents, shape, axis) for axis in row_axes))


def _adjacent(left: int, right: int, shape: tuple[int, ...], row_axes: tuple[int, ...]) -> bool:
    """Whether ``right`` follows ``left`` in the logical column order of every direction."""
    between = range(left + 1, right)
    return left < right and all(shape[i] == 1 or (i in row_axes and len(row_axes) == 1) for i in between)


def _direction(merged: list[list[int]], extents: tuple[int, ...], shape: tuple[int, ...], axis: int) -> MatrixView:
    row_axis = next(k for k, run in enumerate(merged) if axis in run)
    strides = []
    for k, run in enumerate(merged):
        if k != row_axis:
            later = run[-1] if run else len(shape)
            strides.append(prod(n for i, n in enumerate(shape) if i > later and i != axis))
    cols = prod(n for i, n in enumerate(shape) if i != axis)
    return MatrixView(row_axis, shape[axis], cols, strides[0], strides[1])
