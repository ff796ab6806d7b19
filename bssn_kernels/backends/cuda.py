"""The CUDA backend: csrc/cuda, one launch for all layers of a group, compiled when the package is installed.

With ``BSSN_CUDA_MODEL=FILE`` the same code, compiled for a model of a device, runs on CPU tensors: that is how its
logic is tested without a GPU (tests/cuda_model).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

from bssn_kernels.backends import _tables
from bssn_kernels.backends._compiled import DTYPE_CODES, build_reason
from bssn_kernels.backends._geometry import FLAT, MOST_CHUNKS
from bssn_kernels.backends._launch import COUNTER_STRIDE, Launch, Made, State, alike, layer_reason, on
from bssn_kernels.backends._memory import empty_like
from bssn_kernels.backends._schedule import Schedule
from bssn_kernels.plan import SCALARS, LayerSpec, accumulation_dtype


def modelling() -> bool:
    """Whether a model on the CPU stands in for the device."""
    return bool(os.environ.get("BSSN_CUDA_MODEL"))


@cache
def _load() -> tuple[ModuleType | None, str]:
    """The compiled module, or the reason why there is none."""
    file = os.environ.get("BSSN_CUDA_MODEL")
    try:
        if file:
            # Under a name of its own: pybind11 gives a second module of the same name out as the first.
            spec = importlib.util.spec_from_file_location(f"{file.replace('.', '_')}._cuda", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module("bssn_kernels._cuda")
    except (ImportError, AttributeError) as error:
        return None, build_reason("cuda") or f"bssn_kernels._cuda does not load: {error}"
    expected = {
        "tile": _tables.TILE_FIELDS, "block": _tables.BLOCK_FIELDS, "layer": _tables.LAYER_FIELDS,
        "role": _tables.ROLE_FIELDS, "vector": _tables.VECTOR_FIELDS, "address": _tables.ADDRESSES, "scalar": SCALARS,
    }  # fmt: skip
    found = {name: tuple(fields) for name, fields in module.fields().items()}
    numbers = module.COUNTER_STRIDE, module.FLAT, module.MOST_CHUNKS
    if found != expected or numbers != (COUNTER_STRIDE, FLAT, MOST_CHUNKS):
        return None, "bssn_kernels._cuda was built from other sources: install the package again"
    return module, ""


@cache
def _device_reason(index: int) -> str:
    """Why this device cannot run the compiled code, or nothing."""
    with torch.cuda.device(index):
        torch.cuda.current_stream(index)  # torch makes the device ready
        missing = _load()[0].missing_code(index)
    if not missing:
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    return f"a device of compute capability {major}.{minor}, for which the build has no code ({missing})"


def _resident(forward: bool, dtype: torch.dtype, device: torch.device, schedule: Schedule) -> int:
    """How many programs of a schedule's kernel run at once on a device."""
    return _resident_of(forward, DTYPE_CODES[dtype], schedule.general, device.index or 0)


@cache
def _resident_of(forward: bool, dtype_code: int, general: bool, index: int) -> int:
    return _load()[0].resident_programs(forward, dtype_code, general, index)


class CudaBackend:
    """CUDA kernels; see csrc/cuda."""

    name = "cuda"
    devices = ("cuda",)

    def unsupported(self, specs: Sequence[LayerSpec] | None = None) -> list[str]:
        """Reasons: not built; no device, or one it has no code for; a dtype or memory layout it does not know."""
        module, reason = _load()
        reasons = [] if module else [reason]
        if not modelling():
            if torch.version.hip:
                reasons.append("it was made for NVIDIA GPUs, and this torch is built for AMD's")
            elif not torch.cuda.is_available():
                reasons.append("no CUDA device")
        for spec in specs or ():
            if reason := self._layer_reason(spec, usable=not reasons):
                reasons.append(f"layer {spec.name!r} {reason}")
        return reasons

    @staticmethod
    def _layer_reason(spec: LayerSpec, usable: bool) -> str:
        if reason := layer_reason(spec, "cpu" if modelling() else "cuda"):
            return reason
        if usable and spec.device.type == "cuda":
            index = spec.device.index
            reason = _device_reason(torch.cuda.current_device() if index is None else index)
            return reason and f"is on {reason}"
        return ""

    def tables(self, specs: Sequence[LayerSpec]) -> list[Tensor]:
        """Nothing beside the layer table: schedules depend on the iterations and are made when they are known."""
        return []

    def normalize(
        self,
        weights: Sequence[Tensor],
        vectors: Sequence[Tensor],
        gains: Sequence[Tensor],
        tables: Sequence[Tensor],
        iterations: Sequence[int],
        saved_numel: int,
        output_dtype: torch.dtype | None,
    ) -> tuple[list[Tensor], Tensor]:
        """See ``ops.normalize``."""
        dtype, device = weights[0].dtype, weights[0].device
        accum = accumulation_dtype(dtype)
        state = State.of(tables[0])
        vectors, gains = alike(vectors, accum), alike(gains, accum)
        with on(device) as stream:
            launch = state.forward(tuple(iterations), dtype.itemsize, device, partial(_resident, True, dtype, device))
            addresses = state.addresses(("forward",), weights, vectors, gains, stream, absolute=True)
            saved = torch.empty(saved_numel, dtype=accum, device=device)
            outs = empty_like(weights, output_dtype or dtype)
            dtypes = [
                DTYPE_CODES[x] for x in (
                    dtype, output_dtype or dtype, vectors[0].dtype if vectors else accum,
                    gains[0].dtype if gains else accum,
                )
            ]  # fmt: skip
            _run(True, launch, addresses.table, saved, None, dtypes, dtype, outs, stream)
            saved.__dict__["made"] = Made(launch, addresses, stream)
        return outs, saved

    def store(self, vectors: Sequence[Tensor], saved: Tensor, tables: Sequence[Tensor]) -> bool:
        """See ``ops.store``."""
        dtype, device = saved.dtype, saved.device
        with on(device) as stream:
            made = Made.of(saved, vectors, stream)
            if made is None:
                return False
            parts, addresses = made.launch.tables["stores"], made.addresses.table
            try:
                _load()[0].store(
                    parts.data_ptr(),
                    len(parts),
                    addresses.data_ptr(),
                    saved.data_ptr(),
                    dtype == torch.float64,
                    device.index or 0,
                    stream.cuda_stream if stream else 0,
                )
            except RuntimeError as error:
                raise made.launch.failed("storing the vectors", dtype, device, error) from error
        return True

    def normalize_backward(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor],
        saved: Tensor,
        tables: Sequence[Tensor],
        layers: Sequence[int],
    ) -> tuple[list[Tensor], Tensor]:
        """See ``ops.normalize_backward``."""
        dtype, device, accum = weights[0].dtype, weights[0].device, saved.dtype
        state, key = State.of(tables[0]), tuple(layers)
        grads = [g if g.data_ptr() % 16 == 0 else torch.empty_like(g).copy_(g) for g in grads]
        with on(device) as stream:
            launch = state.backward(key, dtype.itemsize, device, partial(_resident, False, dtype, device))
            addresses = state.addresses(("backward", key), weights, (), (), stream, absolute=True)
            grad_weights = empty_like(weights, dtype)
            grad_gains = torch.empty(len(layers), dtype=accum, device=device)
            dtypes = [DTYPE_CODES[x] for x in (dtype, grads[0].dtype, accum, accum)]
            tensors = [*grads, *grad_weights]
            _run(False, launch, addresses.table, saved, grad_gains, dtypes, dtype, tensors, stream)
        return grad_weights, grad_gains


def _run(
    forward: bool,
    launch: Launch,
    addresses: Tensor,
    saved: Tensor,
    grad_gains: Tensor | None,
    dtypes: Sequence[int],
    dtype: torch.dtype,
    tensors: Sequence[Tensor],
    stream: torch.cuda.Stream | None,
) -> None:
    """One launch of all tiles, on the current stream."""
    module, schedule, tables, device = _load()[0], launch.schedule, launch.tables, saved.device
    programs = min(_resident(forward, dtype, device, schedule), len(schedule.tiles))
    table = torch.empty(len(tensors), dtype=torch.int64, device=device) if len(tensors) > module.TENSORS else None
    names = ("tiles", "blocks", "layers", "vectors", "floats")
    buffers = (saved, *launch.buffers(saved.dtype, device, stream), grad_gains)
    try:
        (module.forward if forward else module.backward)(
            [*(tables[name].data_ptr() for name in names), addresses.data_ptr()],
            [0 if x is None else x.data_ptr() for x in buffers],
            [len(schedule.tiles), programs, schedule.n_counters],
            dtypes,
            schedule.general,
            [x.data_ptr() for x in tensors],
            0 if table is None else table.data_ptr(),
            device.index or 0,
            stream.cuda_stream if stream else 0,
        )
    except RuntimeError as error:
        raise launch.failed("forward" if forward else "backward", dtype, device, error) from error
