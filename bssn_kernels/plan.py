"""LayerSpec and GroupPlan: the tables that describe a group of layers of one device and dtype."""

from __future__ import annotations

import contextlib
import struct
from collections import namedtuple
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from bssn_kernels.algebra import direction_weights, row_axes
from bssn_kernels.variants import Semantics, Variant, resolve_semantics
from bssn_kernels.views import DenseView, dense_view

# Per-layer numbers at the end of `saved`, in accumulation dtype. slope_* are dm/dsigma of a direction (times the
# factor that an eps leaves), start_* is 1 / |first product| and residual_* sigma: the gradient through the iteration.
SCALARS = (
    "sigma",
    "sigma_out",
    "sigma_in",
    "multiplier",
    "slope_out",
    "slope_in",
    "slope_gain",
    "start_out",
    "start_in",
    "residual_out",
    "residual_in",
)

# Columns of the layer table, eight bytes each: integers, then float64 seen as int64. csrc/tables.h has the same list.
_DIRECTION_FIELDS = ("row_axis", "vu", "rows", "cols", "outer", "inner", "start_offset")
INTEGER_FIELDS = (
    "axis",
    "p",
    "q",
    "r",
    "directions",
    "has_gain",
    "norm_adds",
    "through",
    "vector_offset",
    "scalar_offset",
    *(f"{name}_out" for name in _DIRECTION_FIELDS),
    *(f"{name}_in" for name in _DIRECTION_FIELDS),
)
FLOAT_FIELDS = ("eps", "weight_out", "weight_in", "floor", "gain")

LayerRow = namedtuple("LayerRow", INTEGER_FIELDS + FLOAT_FIELDS)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of products, sums and state for a weight dtype."""
    if dtype in (torch.float64, torch.complex128):
        return torch.promote_types(dtype, torch.float64)
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is normalized, and where its weight stands.

    Args:
        name: for errors and reports.
        shape, stride: of the weight, in elements.
        axis: row axis of the out-direction: 0, or 1 for transposed convolutions; never negative.
        gain: whether a learnable gain of one element is passed for this layer.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    axis: int
    variant: Variant
    semantics: Semantics
    eps: float
    gain: bool

    @classmethod
    def of(
        cls,
        weight: Tensor,
        *,
        name: str = "",
        axis: int = 0,
        variant: Variant = Variant(),
        semantics: Semantics | str = "torch",
        eps: float = 1e-12,
        gain: bool = False,
    ) -> LayerSpec:
        """The spec of a weight as it stands."""
        semantics = resolve_semantics(semantics)
        axis = axis + weight.ndim if axis < 0 else axis
        return cls(name, *_sizes(weight), weight.dtype, weight.device, axis, variant, semantics, float(eps), gain)

    @property
    def directions(self) -> int:
        """2 where there are two channel axes and kernel positions and the variant uses the in-direction, else 1."""
        return 2 if len(self.shape) >= 3 and self.variant.into != 0 else 1

    @property
    def stores_vectors(self) -> bool:
        """False for vectors under order uv, which are divided by their exact norm (torch keeps no state for them)."""
        return len(self.shape) > 1 or self.semantics.order == "vu"

    @property
    def matrix_shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, cols) of each direction."""
        n = prod(self.shape)
        axes = row_axes(len(self.shape), self.axis, self.directions)
        return tuple((self.shape[a], n // self.shape[a] if self.shape[a] else 0) for a in axes)

    @property
    def vector_shapes(self) -> tuple[tuple[int], ...]:
        """Shapes of the vectors to be stored: u, v of the out-direction, then of the in-direction."""
        if not self.stores_vectors:
            return ()
        return tuple((n,) for shape in self.matrix_shapes for n in shape)

    @cached_property
    def view(self) -> DenseView | str:
        """The weight in memory order, or the reason why the kernels cannot read it."""
        return dense_view(self.shape, self.stride, row_axes(len(self.shape), self.axis, self.directions))

    @property
    def start_sizes(self) -> tuple[int, ...]:
        """Length of what the last iteration of each direction started from, where the gradient needs it."""
        if self.semantics.gradient != "through" or not self.stores_vectors:
            return ()
        return tuple(shape[self.semantics.order_of(d) == "uv"] for d, shape in enumerate(self.matrix_shapes))


def _sizes(weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides, in plain numbers: while ``torch.jit.trace`` follows, torch makes tensors of them."""
    if torch._C._get_tracing_state() is None:
        return tuple(weight.shape), tuple(weight.stride())
    with untraced():
        return tuple(weight.shape), tuple(weight.stride())


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Hidden from the ``torch.jit.trace`` that may be active."""
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(tracing)


class Layout:
    """Where everything stands in `saved`, the flat tensor that one fused call returns as its state.

    First all vectors in the order of the op's ``vectors``; then len(SCALARS) numbers per layer; then the start
    vectors of the layers that differentiate through the iteration.
    """

    def __init__(self, specs: Sequence[LayerSpec]) -> None:
        self.sizes = [n for spec in specs for shape in spec.matrix_shapes for n in shape]
        self.vectors_numel = sum(self.sizes)
        self.scalars_numel = len(specs) * len(SCALARS)
        self.numel = self.vectors_numel + self.scalars_numel + sum(sum(spec.start_sizes) for spec in specs)
        self._all_sizes = [*self.sizes, self.numel - self.vectors_numel]
        self.start_sizes = [spec.start_sizes for spec in specs]
        self.first_vector: list[int] = []
        index = 0
        for spec in specs:
            self.first_vector.append(index)
            index += 2 * spec.directions

    def vectors(self, saved: Tensor) -> list[Tensor]:
        """Views of the vectors of all layers, in the op's order."""
        # The unsafe split makes no tracked views, which costs half as much; `saved` never takes part in autograd.
        return list(torch.unsafe_split_with_sizes(saved, self._all_sizes)[:-1])

    def scalars(self, saved: Tensor) -> Tensor:
        """(layers, len(SCALARS)), a view."""
        return saved[self.vectors_numel : self.vectors_numel + self.scalars_numel].view(-1, len(SCALARS))

    def starts(self, saved: Tensor, i: int) -> tuple[Tensor, ...]:
        """Start vectors of layer i, views; none where the gradient does not need them."""
        offset = self.vectors_numel + self.scalars_numel + sum(map(sum, self.start_sizes[:i]))
        return saved[offset : offset + sum(self.start_sizes[i])].split(self.start_sizes[i])


def layer_table(specs: Sequence[LayerSpec], layout: Layout) -> Tensor:
    """The layer table: int64 (layers, fields), on the CPU; a layer without a dense view has p = 0."""
    integers, floats = [], []
    vector_offset, start_offset = 0, layout.vectors_numel + layout.scalars_numel
    for i, spec in enumerate(specs):
        view = spec.view
        extents, directions = (view.extents, view.directions) if isinstance(view, DenseView) else ((0, 0, 0), ())
        through = bool(spec.start_sizes)
        row = [spec.axis, *extents, spec.directions, spec.gain, spec.semantics.norm == "add", through, vector_offset]
        row.append(layout.vectors_numel + i * len(SCALARS))
        for d in range(2):
            if d >= spec.directions:
                row += [0] * 7
                continue
            vu = spec.stores_vectors and spec.semantics.order_of(d) == "vu"
            place = (directions[d].outer_stride, directions[d].inner_stride) if directions else (0, 0)
            row += [directions[d].row_axis if directions else 0, vu, *spec.matrix_shapes[d], *place, start_offset]
            start_offset += spec.start_sizes[d] if through else 0
        vector_offset += sum(sum(shape) for shape in spec.matrix_shapes)
        shares = (*direction_weights(spec.variant, spec.directions), 0.0)[:2]
        floats.append([spec.eps, *shares, spec.variant.floor, spec.variant.gain])
        integers.append([int(x) for x in row])
    bits = [list(struct.unpack(f"={len(row)}q", struct.pack(f"={len(row)}d", *row))) for row in floats]
    return torch.tensor([i + f for i, f in zip(integers, bits)], dtype=torch.int64, device="cpu")


def layer_rows(table: Tensor) -> list[LayerRow]:
    """Read a layer table back."""
    n = len(INTEGER_FIELDS)
    floats = table[:, n:].contiguous().view(torch.float64).tolist()
    return [LayerRow(*i, *f) for i, f in zip(table[:, :n].tolist(), floats)]


class GroupPlan:
    """What a fused call needs to know of a group of layers, built once and valid while the weights look the same.

    Made by ``functional.make_plan``. The tables cross the op boundary as tensors.

    Attributes:
        specs: one per layer.
        backend: who computes; ``why`` says why others were passed over.
        layout: where things stand in `saved`.
        tables: the layer table, then what the backend adds.
        sizes: elements of each stored vector, flat.
        gains: number of learnable gains.
        stateless: indices of the layers that keep no vectors.
    """

    def __init__(self, specs: Sequence[LayerSpec], backend, why: Sequence[str] = ()) -> None:
        self.specs = tuple(specs)
        self.backend = backend
        self.why = tuple(why)
        self.layout = Layout(self.specs)
        self.tables = [layer_table(self.specs, self.layout), *backend.tables(self.specs)]
        self.tables[0].__dict__["layer_names"] = [spec.name for spec in self.specs]  # for errors of a launch
        self.sizes = [n for spec in self.specs for (n,) in spec.vector_shapes]
        self.gains = sum(spec.gain for spec in self.specs)
        self.dtype, self.device = self.specs[0].dtype, self.specs[0].device
        self.accumulation_dtype = accumulation_dtype(self.dtype)
        self._identity = [(spec.shape, spec.stride) for spec in self.specs]
        self.stateless = [i for i, spec in enumerate(self.specs) if not spec.stores_vectors]
        self._ones = {self.accumulation_dtype: self._make_ones(self.accumulation_dtype)}

    def matches(self, weights: Sequence[Tensor]) -> bool:
        """Whether the weights still have the shapes, strides, dtype and device that the tables were built for."""
        dtype, device = self.dtype, self.device
        return len(weights) == len(self._identity) and all(
            w.shape == shape and w.stride() == stride and w.dtype is dtype and w.device == device
            for w, (shape, stride) in zip(weights, self._identity)
        )

    def fits(self, vectors: Sequence[Tensor]) -> bool:
        """Whether stored vectors, flat, have the sizes of this plan."""
        return list(map(Tensor.numel, vectors)) == self.sizes

    def check_sizes(self, vectors: Sequence[Tensor]) -> None:
        """Refuse stored vectors that do not fit, which a kernel would read and write past their end."""
        if self.fits(vectors):
            return
        shapes = [(spec.name, shape) for spec in self.specs for shape in spec.vector_shapes]
        for x, (name, shape) in zip(vectors, shapes, strict=True):
            if tuple(x.shape) != shape:
                raise ValueError(f"layer {name!r}: expected a vector {shape} to be stored, got {tuple(x.shape)}")

    def op_vectors(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The op's vectors: the stored ones, and ones for layers that keep none."""
        if not self.stateless:
            return list(vectors)
        dtype = vectors[0].dtype if vectors else self.accumulation_dtype
        given, ones, result = iter(vectors), iter(self._ones_of(dtype)), []
        for spec in self.specs:
            if spec.stores_vectors:
                result += [next(given) for _ in range(2 * spec.directions)]
            else:
                result += next(ones).split([spec.shape[0], 1])
        return result

    def _ones_of(self, dtype: torch.dtype) -> list[Tensor]:
        """What layers without stored vectors start from, in the dtype of the others; made once, so that a backend sees
        the same memory each time.
        """
        if dtype in self._ones:
            return self._ones[dtype]
        ones = self._make_ones(dtype)
        if not (torch.compiler.is_compiling() or is_in_torch_dispatch_mode()):  # theirs would be of their kind
            self._ones[dtype] = ones
        return ones

    def _make_ones(self, dtype: torch.dtype) -> list[Tensor]:
        sizes = [self.specs[i].shape[0] + 1 for i in self.stateless]
        return [torch.ones(n, dtype=dtype, device=self.device) for n in sizes]

    def op_iterations(self, iterations: Sequence[int]) -> list[int]:
        """Iterations per layer; layers that keep no vectors always take their one exact step."""
        result = list(iterations)
        for i in self.stateless:
            result[i] = 1
        return result

    def vectors_of(self, saved: Tensor) -> list[Tensor]:
        """The new vectors, in the order and shapes in which they are stored (views of `saved`)."""
        vectors = self.layout.vectors(saved)
        if not self.stateless:
            return vectors
        first = self.layout.first_vector
        return [
            vectors[first[i] + k]
            for i, spec in enumerate(self.specs)
            if spec.stores_vectors
            for k in range(2 * spec.directions)
        ]

    def sigmas_of(self, saved: Tensor, directions: bool = False) -> list[Tensor]:
        """The mean sigma of each layer, 0-dimensional, or (directions,) numbers each."""
        scalars = self.layout.scalars(saved)
        if directions:
            return [scalars[i, 1 : 1 + spec.directions] for i, spec in enumerate(self.specs)]
        return list(scalars[:, 0].unbind())

    def multipliers_of(self, saved: Tensor) -> list[Tensor]:
        """The multiplier of each layer, 0-dimensional."""
        return list(self.layout.scalars(saved)[:, SCALARS.index("multiplier")].unbind())
