"""A weight of any shape and memory format, read as a matrix."""

import itertools
import math

import pytest
import torch
import truth
from zoo import LAYERS, SMALL, lay_out, layouts

from bssn_kernels.views import DenseView, dense_view, fold, matrix, other_channel_axis

DENSE = [
    (name, layout, both)
    for name in SMALL
    for layout in layouts(LAYERS[name][0])
    for both in (False, True)
    if not (both and len(LAYERS[name][0]) < 2)  # a vector has one direction
]


def numbered(shape: tuple[int, ...], layout: str = "contiguous") -> torch.Tensor:
    return lay_out(torch.arange(math.prod(shape)).view(shape), layout)


@pytest.mark.parametrize("shape", [(5,), (3, 4), (3, 4, 5), (3, 4, 5, 2), (3, 4, 5, 2, 6)])
def test_matrix_and_fold(shape):
    weight = numbered(shape)
    for axis in range(len(shape)):
        m = matrix(weight, axis)
        assert torch.equal(m, truth.as_matrix(weight, axis))
        assert torch.equal(fold(m, shape, axis), weight)


def test_contiguous_weights_are_not_copied():
    weight = torch.randn(4, 5, 3, 3)
    assert matrix(weight, 0).data_ptr() == weight.data_ptr()


def test_other_channel_axis():
    assert other_channel_axis(0) == 1 and other_channel_axis(1) == 0


@pytest.mark.parametrize("name, layout, both", DENSE)
def test_dense_view(name, layout, both):
    """Walk through memory as the kernels do: every element is the one that the matrix has there."""
    shape, axis = LAYERS[name]
    axes = (axis, 1 - axis) if both else (axis,)
    weight = numbered(shape, layout)
    memory = weight.as_strided((weight.numel(),), (1,))
    view = dense_view(shape, weight.stride(), axes)
    assert isinstance(view, DenseView), view
    assert math.prod(view.extents) == weight.numel() and len(view.extents) == 3
    for row_axis, direction in zip(axes, view.directions):
        m = matrix(weight, row_axis)
        assert (direction.rows, direction.cols) == m.shape
        outer, inner = (k for k in range(3) if k != direction.row_axis)
        rebuilt = torch.full_like(m, -1)
        index = torch.tensor(list(itertools.product(*map(range, view.extents))))
        columns = index[:, outer] * direction.outer_stride + index[:, inner] * direction.inner_stride
        rebuilt[index[:, direction.row_axis], columns] = memory
        assert torch.equal(rebuilt, m)


@pytest.mark.parametrize(
    "shape, stride, reason",
    [
        ((4, 6), (12, 2), "not dense"),
        ((4, 6), (0, 1), "not dense"),
        ((4, 6), (1, 1), "not dense"),
        ((3, 4, 5, 6), (1, 3, 12, 60), "does not merge into three physical axes"),
    ],
)
def test_reasons_why_there_is_no_view(shape, stride, reason):
    found = dense_view(shape, stride, (0, 1))
    assert isinstance(found, str) and reason in found and str(shape) in found and str(stride) in found


def test_axes_of_length_one_may_have_any_stride():
    """torch keeps odd strides there, as in the weight of a 1x1 convolution in channels_last."""
    assert dense_view((4, 6, 1, 1), (6, 1, 999, 7), (0, 1)) == dense_view((4, 6, 1, 1), (6, 1, 1, 1), (0, 1))
