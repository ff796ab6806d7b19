"""The Triton backend: one launch for all layers of a group, on any NVIDIA GPU from sm_75 on, without a compiler.

With ``TRITON_INTERPRET=1`` it runs on CPU tensors, slowly, which is how its logic is tested without a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bssn_kernels.backends._launch import (
    WARM_UP,
    Launch,
    Made,
    State,
    alike,
    capturing,
    counters_of,
    layer_reason,
    on,
)
from bssn_kernels.backends._memory import empty_like
from bssn_kernels.backends._schedule import Schedule
from bssn_kernels.backends._triton_settings import Config, config_of, settings_of
from bssn_kernels.plan import LayerSpec, accumulation_dtype

OLDEST = (3, 3)  # the first Triton that takes a tuple of tensors as an argument
OLDEST_DEVICE = (7, 5)
TUPLE = 8  # tuples of tensors have a multiple of this length, so that groups of like size share a kernel
STORE = ("store",)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


INTERPRETED_PROGRAMS = 2  # the interpreter runs one program after the other
_interpreter_lock = threading.Lock()


@cache
def _kernels() -> Any:
    return importlib.import_module("bssn_kernels.backends._triton_kernels")


@cache
def _installed() -> tuple[tuple[int, ...], str]:
    """Version of Triton, or the reason why it cannot be used."""
    if importlib.util.find_spec("triton") is None:
        return (), "Triton is not installed (it comes with the CUDA builds of torch)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return OLDEST, ""  # a build without metadata, as some distributions make
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        return numbers, f"Triton {version} is too old, expected {OLDEST[0]}.{OLDEST[1]} or newer"
    return numbers, ""


def _interpreter_reason() -> str:
    """Up to Triton 3.6 the interpreter cannot loop to a loaded number under NumPy 2.4 and later."""
    try:
        numpy = importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:
        return "TRITON_INTERPRET=1 needs NumPy, which is not installed"
    if _installed()[0] <= (3, 6) and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        return f"Triton's interpreter of this version needs NumPy below 2.4, got {numpy}"
    return ""


class TritonBackend:
    """Triton kernels; see _triton_kernels."""

    name = "triton"
    devices = ("cuda",)

    def unsupported(self, specs: Sequence[LayerSpec] | None = None) -> list[str]:
        """Reasons: no Triton, no device that it knows; another device, a dtype or memory layout it does not know."""
        reasons = [_installed()[1]] if _installed()[1] else []
        if interpreting():
            reasons += filter(None, [_interpreter_reason()])
        elif torch.version.hip:
            reasons.append("it was made for NVIDIA GPUs, and this torch is built for AMD's")
        elif not torch.cuda.is_available():
            reasons.append("no CUDA device (TRITON_INTERPRET=1 interprets the kernels on the CPU, for tests)")
        for spec in specs or ():
            if reason := self._layer_reason(spec):
                reasons.append(f"layer {spec.name!r} {reason}")
        return reasons

    @staticmethod
    def _layer_reason(spec: LayerSpec) -> str:
        if reason := layer_reason(spec, "cpu" if interpreting() else "cuda"):
            return reason
        if spec.device.type == "cuda":
            capability = capability_of(spec.device)
            if capability < OLDEST_DEVICE or (spec.dtype == torch.bfloat16 and capability < (8, 0)):
                return f"is of {spec.dtype} on a device of compute capability {capability}, which is too old"
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
            mixed = bool(vectors) and vectors[0].dtype != accum
            programs = partial(_resident, True, device, mixed=mixed)
            whole_rows = state.whole_rows(weights, iterations)
            launch = state.forward(tuple(iterations), dtype.itemsize, device, programs, whole_rows)
            addresses = state.addresses(("forward",), weights, vectors, gains, stream)
            saved = torch.empty(saved_numel, dtype=accum, device=device)
            outs = empty_like(weights, output_dtype or dtype)
            vector_anchor = state.anchor(vectors[0].dtype if vectors else accum, device)
            _run(
                True,
                launch,
                stream,
                (
                    launch.tables["vectors"], launch.tables["floats"], addresses.table, state.anchor(dtype, device),
                    vector_anchor, state.anchor(gains[0].dtype if gains else accum, device), _tuple(outs), saved,
                ),
                dtype,
                accum,
                (vectors[0].dtype if vectors else accum, gains[0].dtype if gains else accum, outs[0].dtype),
                mixed,
            )  # fmt: skip
            saved.__dict__["made"] = Made(launch, addresses, stream)
        return outs, saved

    def store(self, vectors: Sequence[Tensor], saved: Tensor, tables: Sequence[Tensor]) -> bool:
        """See ``ops.store``."""
        dtype, device = saved.dtype, saved.device
        with on(device) as stream:
            made = Made.of(saved, vectors, stream)
            if made is None or (STORE not in made.launch.ready and capturing(stream)):
                return False
            parts = made.launch.tables["stores"]
            arguments = parts, made.addresses.table, State.anchor(dtype, device), saved

            def prepare() -> Prepared:
                return Prepared(_kernels().store_kernel, len(parts), {"BLOCK": 1024}, {"enable_fp_fusion": False})

            _start("storing the vectors", made.launch, STORE, stream, dtype, arguments, prepare)
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
        dtype, device = weights[0].dtype, weights[0].device
        state, key = State.of(tables[0]), tuple(layers)
        grads = [g if g.data_ptr() % 16 == 0 else torch.empty_like(g).copy_(g) for g in grads]
        with on(device) as stream:
            launch = state.backward(key, dtype.itemsize, device, partial(_resident, False, device))
            addresses = state.addresses(("backward", key), weights, (), (), stream)
            grad_weights = empty_like(weights, dtype)
            grad_gains = torch.empty(len(layers), dtype=saved.dtype, device=device)
            _run(
                False,
                launch,
                stream,
                (addresses.table, state.anchor(dtype, device), _tuple(grads), _tuple(grad_weights), saved, grad_gains),
                dtype,
                saved.dtype,
                (grads[0].dtype, saved.data_ptr() % 16),
            )
        return grad_weights, grad_gains


def _tuple(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Filled up to a multiple of TUPLE with the last one."""
    return (*tensors, *[tensors[-1]] * (-len(tensors) % TUPLE))


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Of a device; for the interpreter one that has everything."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _config(forward: bool, device: torch.device, schedule: Schedule, mixed: bool = False) -> Config:
    """Settings of a schedule's kernel."""
    through = not forward and schedule.through
    return config_of(capability_of(device), forward or through, schedule.general, mixed or through, schedule.itemsize)


def _resident(forward: bool, device: torch.device, schedule: Schedule, mixed: bool = False) -> int:
    """How many programs of a schedule's kernel run at once on a device."""
    return _programs(device, _config(forward, device, schedule, mixed))


def _programs(device: torch.device, config: Config) -> int:
    return _processors(device) * config.programs if device.type == "cuda" else INTERPRETED_PROGRAMS


class Prepared(NamedTuple):
    """What a kernel is launched with beside its arguments: programs, the rest of its parameters by name, options."""

    kernel: Any
    programs: int
    rest: dict[str, int]
    options: dict[str, Any]


def _run(
    forward: bool,
    launch: Launch,
    stream: torch.cuda.Stream | None,
    arguments: Sequence,
    dtype: torch.dtype,
    accum: torch.dtype,
    kinds: tuple,
    mixed: bool = False,
) -> None:
    """One launch of all tiles.

    Args:
        dtype, accum: of the weights, and of sums.
        kinds: see :func:`_start`.
    """
    schedule, tables, device = launch.schedule, launch.tables, launch.tables["tiles"].device

    def prepare() -> Prepared:
        config = _config(forward, device, schedule, mixed)
        constants, options = settings_of(config, forward, schedule.itemsize)
        constants |= {"GENERAL": schedule.general} | ({"MIXED": mixed} if forward else {"THROUGH": schedule.through})
        n, programs = len(schedule.tiles), _programs(device, config)
        if stream is not None:
            programs = min(programs, n)
        sizes = {"n_tiles": n, "n_programs": programs, "n_counters": schedule.n_counters}
        kernel = _kernels().forward_kernel if forward else _kernels().backward_kernel
        return Prepared(kernel, programs, sizes | constants, options)

    given = (tables["tiles"], tables["blocks"], tables["layers"], *arguments, *launch.buffers(accum, device, stream))
    _start("forward" if forward else "backward", launch, kinds, stream, dtype, given, prepare)


def _start(
    what: str,
    launch: Launch,
    kinds: tuple,
    stream: torch.cuda.Stream | None,
    dtype: torch.dtype,
    arguments: Sequence,
    prepare: Callable[[], Prepared],
) -> None:
    """Launch a kernel on the current stream.

    Triton's own way to a compiled kernel looks at every tensor and makes a key of what it found, in each call; for 24
    layers that took up to a third of a forward's host time. What it comes to is kept with the launch instead.

    Args:
        kinds: all that the kernel is compiled for and that may differ between calls of this launch.
    """
    hint = ""
    try:
        if kinds in launch.ready:
            start, rest = launch.ready[kinds]
            start(*arguments, *rest, stream=stream.cuda_stream)
            return
        if capturing(stream):  # a kernel may be loaded already, for another group
            hint = f"; if its kernel is new: {WARM_UP}"
        kernel, programs, named, options = prepare()
        if stream is None:
            _interpret(kernel[(programs,)], *arguments, **named)
            return
        compiled = kernel[(programs,)](*arguments, **named, **options)
        if hasattr(compiled, "result"):  # of Triton's AsyncCompileMode
            compiled = compiled.result()
        if compiled is not None:  # where a hook of Triton's keeps it from compiling
            rest = tuple(named[name] for name in kernel.arg_names[len(arguments) :])
            launch.ready[kinds] = compiled[(programs, 1, 1)], rest
    except Exception as error:  # what Triton's compiler raises is no RuntimeError
        raise launch.failed(what, dtype, launch.tables["tiles"].device, f"{error}{hint}") from error


def _interpret(kernel: Callable[..., None], *arguments, **named) -> None:
    with _interpreter_lock:
        try:
            kernel(*arguments, **named)
        except BaseException:
            counters_of.forget()
            raise
