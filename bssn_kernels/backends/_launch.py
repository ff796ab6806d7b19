"""What a GPU backend keeps for a plan on a device: schedules, addresses of its tensors, counters.

Nothing here is done in the steady state: schedules are uploaded when a call is new, addresses when a tensor moved,
and never while a graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count

import torch
from torch import Tensor

from bssn_kernels.backends._geometry import LONGEST_ROW, Geometry
from bssn_kernels.backends._order import Machine
from bssn_kernels.backends._schedule import BackwardSchedule, ForwardSchedule, Schedule
from bssn_kernels.backends._tables import ADDRESSES
from bssn_kernels.plan import FLOATS, LayerSpec, layer_rows

KEPT = 32  # launches of a plan at least, and tables of addresses
COUNTER_STRIDE = 8  # int32 numbers: counters are 32 bytes apart
SPARE_COUNTERS = 2
OF_PEAK = 0.9  # of the bandwidth that a memory's clock and width promise; what an H200 gives
WARM_UP = "run it once on the same tensors and in the same mode before torch.cuda.graph"


def alike(tensors: Sequence[Tensor], accum: torch.dtype) -> Sequence[Tensor]:
    """Contiguous tensors of one dtype: as they are, or in accumulation dtype."""
    if not tensors or (len({x.dtype for x in tensors}) == 1 and all(map(Tensor.is_contiguous, tensors))):
        return tensors
    return [x.to(accum).contiguous() for x in tensors]


def layer_reason(spec: LayerSpec, device: str) -> str:
    """Why no kernel for GPUs can take a layer, whose tensors it expects on this type of device; or nothing."""
    if spec.device.type != device:
        return f"is on {spec.device}, expected {device}"
    if spec.dtype not in FLOATS:
        return f"is of {spec.dtype}, expected one of {list(FLOATS)}"
    if isinstance(spec.view, str):
        return f": {spec.view}"
    if spec.view.extents[1] * spec.view.extents[2] > LONGEST_ROW:
        return f"has rows of more than {LONGEST_ROW} elements in memory"
    return ""


class on:
    """Makes a device current; gives its current stream, or None for a device without."""

    def __init__(self, device: torch.device) -> None:
        self.guard = torch.cuda.device(device) if device.type == "cuda" else None
        self.device = device

    def __enter__(self) -> torch.cuda.Stream | None:
        if self.guard is None:
            return None
        self.guard.__enter__()
        return torch.cuda.current_stream(self.device)

    def __exit__(self, *error) -> None:
        if self.guard is not None:
            self.guard.__exit__(*error)


def capturing(stream: torch.cuda.Stream | None) -> bool:
    return stream is not None and torch.cuda.is_current_stream_capturing()


def machine_of(device: torch.device, programs: int) -> Machine:
    """What tiles are put in order for; numbers that a device does not tell are an H200's, as for a model of one."""
    usual = Machine()
    if device.type != "cuda":
        return usual
    told = torch.cuda.get_device_properties(device)
    transfers = 2e3 * getattr(told, "memory_clock_rate", 0)  # in a second and bit of width: two for each clock, of kHz
    bytes_per_us = OF_PEAK * transfers * getattr(told, "memory_bus_width", 0) / 8e6
    return Machine(programs, bytes_per_us or usual.bytes_per_us, getattr(told, "L2_cache_size", 0) or usual.l2)


class Counters:
    """Zeroed counters, which every launch leaves as it found them: one set per device and stream, and for captured
    graphs, whose replays may run beside anything, one that nobody else uses.
    """

    def __init__(self) -> None:
        self._of_stream: dict[tuple, Tensor] = {}

    def get(self, n: int, device: torch.device, stream: torch.cuda.Stream | None) -> Tensor:
        key = device, stream and stream.cuda_stream
        found = self._of_stream.get(key)
        if found is None or found.numel() < n:
            found = self._of_stream[key] = torch.zeros(max(n, 4096), dtype=torch.int32, device=device)
        return found

    def forget(self) -> None:
        """After a launch that failed: they may be in any state."""
        self._of_stream.clear()


counters_of = Counters()

# What captured graphs read: tables, addresses and counters. A graph may outlive the plan and cannot say when it ends,
# so they are kept for ever; a few hundred KB for each capture.
captured: list[object] = []
_calls = count()


@dataclass
class Launch:
    """A schedule with its tables on the device.

    Attributes:
        layers: for errors: how many, some of their names, the largest shape.
        spares: zeroed counters for graphs; each serves one captured launch for ever.
        used: number of the last call.
        streams: where it ran; the allocator knows of them, so that tables outlive what still reads them.
        ready: what a backend compiled for it, by what it was compiled for.
    """

    schedule: Schedule
    layers: str
    tables: dict[str, Tensor]
    spares: list[Tensor]
    streams: set[int]
    used: int = 0
    ready: dict[tuple, tuple] = field(default_factory=dict)

    @classmethod
    def make(cls, schedule: Schedule, layers: str, device: torch.device) -> Launch:
        names = ("tiles", "blocks", "layers", "vectors", "floats", "stores")
        tables = {name: getattr(schedule, name).to(device) for name in names}
        n = schedule.n_counters * COUNTER_STRIDE
        spares = []
        if device.type == "cuda":
            spares = [torch.zeros(n, dtype=torch.int32, device=device) for _ in range(SPARE_COUNTERS)]
        return cls(schedule, layers, tables, spares, set())

    def buffers(
        self, accum: torch.dtype, device: torch.device, stream: torch.cuda.Stream | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a launch works in: numbers in accumulation dtype and in float64, counters."""
        work = torch.empty(max(self.schedule.workspace, 16), dtype=accum, device=device)
        doubles = torch.empty(max(self.schedule.doubles, 16), dtype=torch.float64, device=device)
        return work, doubles, self.counters(device, stream)

    def failed(self, what: str, dtype: torch.dtype, device: torch.device, error: Exception | str) -> RuntimeError:
        """The error of a launch in words; its counters are in no known state."""
        counters_of.forget()
        n = len(self.schedule.geometries)
        return RuntimeError(f"{what} of {n} layers ({self.layers}) of {dtype} on {device}: {error}")

    def counters(self, device: torch.device, stream: torch.cuda.Stream | None) -> Tensor:
        n = self.schedule.n_counters * COUNTER_STRIDE
        if not capturing(stream):
            if stream is not None and stream.cuda_stream not in self.streams:
                self.streams.add(stream.cuda_stream)
                for table in self.tables.values():
                    table.record_stream(stream)
            return counters_of.get(n, device, stream)
        own = self.spares.pop() if self.spares else torch.zeros(n, dtype=torch.int32, device=device)
        captured.append(own)
        return own


@dataclass
class Addresses:
    """Where the tensors of a group stand, on the device.

    Attributes:
        vectors: the same of the vectors, for the host.
    """

    table: Tensor
    stream: torch.cuda.Stream | None
    uploaded: torch.cuda.Event | None
    vectors: tuple[int, ...] = ()


class Made:
    """What stores the vectors of a forward: it hangs on `saved`, and everything in it is on the device already.

    A copy of `saved`, and what is read from a file, have none.
    """

    def __init__(self, launch: Launch, addresses: Addresses, stream: torch.cuda.Stream | None) -> None:
        self.launch, self.addresses, self.stream = launch, addresses, stream

    def __reduce__(self) -> tuple:
        return type(None), ()

    @staticmethod
    def of(saved: Tensor, vectors: Sequence[Tensor], stream: torch.cuda.Stream | None) -> Made | None:
        """None where the forward read others, copies in accumulation dtype or ones that moved since; where they are of
        another dtype than `saved`, or another stream is the current one.
        """
        made = saved.__dict__.get("made")
        if made is None or made.stream != stream or vectors[0].dtype != saved.dtype:
            return None
        return made if made.addresses.vectors == tuple(map(Tensor.data_ptr, vectors)) else None


class State:
    """What the backend keeps for a plan: launches and address tables. It lives as an attribute of the plan's layer
    table and goes with it.
    """

    def __init__(self, table: Tensor) -> None:
        self.rows = layer_rows(table)
        self.names: Sequence[str] = table.__dict__.get("layer_names", ())
        self.kept = max(KEPT, 2 * len(self.rows))  # each layer may have a backward of its own
        self._may_be_whole: list[bool] = []
        self._launches: dict[tuple, Launch] = {}
        self._addresses: dict[tuple, Addresses] = {}

    @classmethod
    def of(cls, table: Tensor) -> State:
        state = table.__dict__.get("launches")
        if state is None:
            state = table.__dict__["launches"] = cls(table)
        return state

    @staticmethod
    @cache
    def anchor(dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of this type at a multiple of 16 bytes, from which distances are counted."""
        return torch.zeros(64, dtype=dtype, device=device)

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy of the plan makes its own

    def whole_rows(self, weights: Sequence[Tensor], iterations: Sequence[int]) -> tuple[bool, ...]:
        """The layers that have tiles of whole rows, for kernels that know them: where rows have the length for it and
        the weight stands at a multiple of 16 bytes.
        """
        if not self._may_be_whole:
            itemsize = weights[0].dtype.itemsize
            self._may_be_whole = [Geometry(row, itemsize, whole=True).whole for row in self.rows]
        each = zip(self._may_be_whole, iterations, weights)
        return tuple(may and n > 0 and w.data_ptr() % 16 == 0 for may, n, w in each)

    def forward(
        self,
        iterations: tuple[int, ...],
        itemsize: int,
        device: torch.device,
        programs: Callable[[Schedule], int],
        whole_rows: tuple[bool, ...] = (),
    ) -> Launch:
        def machine(schedule: Schedule) -> Machine:
            return machine_of(device, programs(schedule))

        def make() -> Schedule:
            return ForwardSchedule(self.rows, iterations, itemsize, machine, whole_rows)

        return self._launch(("forward", iterations, whole_rows, device), make, range(len(self.rows)), device)

    def backward(
        self, layers: tuple[int, ...], itemsize: int, device: torch.device, programs: Callable[[Schedule], int]
    ) -> Launch:
        def make() -> Schedule:
            return BackwardSchedule(self.rows, layers, itemsize, lambda s: machine_of(device, programs(s)))

        return self._launch(("backward", layers, device), make, layers, device)

    def _described(self, layers: Sequence[int]) -> str:
        """Some layers in words."""
        names = [repr(self.names[i]) for i in layers[:3] if i < len(self.names)]
        more = [f"{len(layers) - len(names)} more"] if len(names) < len(layers) else []
        row = max((self.rows[i] for i in layers), key=lambda row: row.p * row.q * row.r)
        return f"{', '.join(names + more)}; the largest {row.p} x {row.q} x {row.r} in memory"

    def _launch(
        self, key: tuple, make: Callable[[], Schedule], layers: Sequence[int], device: torch.device
    ) -> Launch:
        now = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        found = self._launches.get(key)
        if found is None:
            if now:
                raise RuntimeError(f"this {key[0]} was never run before the capture: {WARM_UP}")
            if len(self._launches) >= self.kept:
                oldest = min(self._launches.items(), key=lambda item: item[1].used)
                self._launches.pop(oldest[0], None)
            found = self._launches[key] = Launch.make(make(), self._described(layers), device)
        found.used = next(_calls)
        if now:
            captured.append(found)
        return found

    def addresses(
        self,
        kind: tuple,
        weights: Sequence[Tensor],
        vectors: Sequence[Tensor],
        gains: Sequence[Tensor],
        stream: torch.cuda.Stream | None,
        absolute: bool = False,
    ) -> Addresses:
        """The address table of these tensors; a new one only where a tensor moved.

        Args:
            absolute: addresses as such; otherwise distances from the anchors, in elements.
        """
        # Distances are in elements, so the same memory read as another dtype is another table.
        dtypes = (*(x.dtype for x in vectors[:1]), *(x.dtype for x in gains[:1]))
        of_vectors = tuple(map(Tensor.data_ptr, vectors))
        key = kind, dtypes, (*map(Tensor.data_ptr, weights), *of_vectors, *map(Tensor.data_ptr, gains))
        found, now = self._addresses.pop(key, None), capturing(stream)
        if found is None:
            if now:
                raise RuntimeError(f"weights, vectors or gains moved before the capture: {WARM_UP}")
            place = Tensor.data_ptr if absolute else self._distance
            found = self._upload(self._places(place, weights, vectors, gains), weights[0].device, stream)
            found.vectors = of_vectors
            if len(self._addresses) >= self.kept:
                self._addresses.pop(next(iter(self._addresses)))
        self._addresses[key] = found  # the last one used goes last
        if now:
            captured.append(found)
        elif stream is not None and found.stream != stream:
            stream.wait_event(found.uploaded)
            found.table.record_stream(stream)
        return found

    def _places(
        self,
        place: Callable[[Tensor], int],
        weights: Sequence[Tensor],
        vectors: Sequence[Tensor],
        gains: Sequence[Tensor],
    ) -> Tensor:
        table = [[0] * len(ADDRESSES) for _ in weights]
        for k, weight in enumerate(weights):
            table[k][0] = place(weight)
        if vectors:
            given, owned = iter(vectors), iter(gains)
            for k, row in enumerate(self.rows):
                stored = [place(next(given)) for _ in range(2 * row.directions)]
                for e, direction in enumerate(ForwardSchedule.directions(row, weights[k].element_size())):
                    if direction is not None:
                        d, spread_is_v = direction
                        u, v = stored[2 * d : 2 * d + 2]
                        table[k][1 + 2 * e : 3 + 2 * e] = (v, u) if spread_is_v else (u, v)
                if row.has_gain:
                    table[k][ADDRESSES.index("gain")] = place(next(owned))
        return torch.tensor(table, dtype=torch.int64, device="cpu")

    def _distance(self, tensor: Tensor) -> int:
        return (tensor.data_ptr() - self.anchor(tensor.dtype, tensor.device).data_ptr()) // tensor.element_size()

    @staticmethod
    def _upload(table: Tensor, device: torch.device, stream: torch.cuda.Stream | None) -> Addresses:
        if stream is None:
            return Addresses(table, None, None)
        on_device = table.pin_memory().to(device, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
        return Addresses(on_device, stream, event)
