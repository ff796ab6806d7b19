"""The Triton backend: one launch for all layers of a group, on any NVIDIA GPU from sm_75 on, without a compiler.

With ``TRITON_INTERPRET=1`` it runs on CPU tensors, slowly, which is how its logic is tested without a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bssn_kernels.backends._geometry import COLS, ROWS, WHOLE_ROWS
from bssn_kernels.backends._launch import Launch, State, alike, counters_of, layer_reason, on
from bssn_kernels.backends._schedule import Schedule
from bssn_kernels.plan import LayerSpec, accumulation_dtype

OLDEST = (3, 3)  # the first Triton that takes a tuple of tensors as an argument
OLDEST_DEVICE = (7, 5)
TUPLE = 8  # tuples of tensors have a multiple of this length, so that groups of like size share a kernel


@dataclass(frozen=True)
class Config:
    """Launch settings of one kind of kernel on one kind of device.

    Attributes:
        registers: most per thread; programs: per SM, as many as those registers let reside. More would only wait.
        stages: of the loads of the products, through cp.async: all but one of them are on their way, 8 KiB each, 4 in
            half precision.
        whole_stages: the same of whole rows, 16 KiB each, 8 in half precision.
        step: bytes that the scale pass reads at once, and twice as many as the backward's flat passes do.
        warps: per program. 4 warps read a block of 8 x 256 numbers in four 16-byte accesses per thread.
    """

    registers: int
    programs: int
    stages: int
    whole_stages: int = 3
    step: int = 16384
    warps: int = 4


# By whether a kernel has products in two directions or in float64. Registers are the smallest bound under which
# Triton 3.9 spills nothing on sm_80, sm_90 and sm_100 (3.6 spills some), the 65,536 of an SM shared among programs of
# 128 threads. Stages: an SM of an H200 takes 33 KB from HBM in a microsecond and 45 from L2, which is about how long
# a read is on its way, and about half of the programs stream at once; they have 128 KB on their way, of whole rows
# too, and with two directions, which have no registers for more, 72, or 36 in half precision. Measured there, while
# HBM gave every read: one direction with three stages and steps of 8 KiB (64 KB) ran at the speed of a copy, and
# longer steps changed nothing (benchmarks/results/gpu_h200_tuning.jsonl); two directions had 24 KB, and took twice as
# long as one. tests/test_triton_compiled.py checks registers, memory and bytes.
HOPPER = {
    False: Config(registers=128, programs=4, stages=5),
    True: Config(registers=168, programs=3, stages=4),
}
# Less bandwidth; less shared memory too, 164 KiB of an SM and then 100; no cp.async.
AMPERE = {False: replace(HOPPER[False], stages=4), True: replace(HOPPER[True], stages=3)}
ADA = {False: replace(HOPPER[False], stages=3, whole_stages=2), True: replace(HOPPER[True], stages=3, whole_stages=2)}
TURING = {key: replace(config, stages=1, whole_stages=1) for key, config in HOPPER.items()}
ADA_DEVICES = ((8, 6), (8, 9), (12, 0), (12, 1))


def family_of(capability: tuple[int, int]) -> dict[bool, Config]:
    """The settings of devices of some compute capability."""
    if capability in ADA_DEVICES:
        return ADA
    return HOPPER if capability >= (9, 0) else AMPERE if capability >= (8, 0) else TURING


def config_of(capability: tuple[int, int], products: bool, general: bool, more: bool, itemsize: int) -> Config:
    """Launch settings of a kernel on a device of some compute capability.

    Args:
        products: it has products: forward, and backward through the iteration.
        general: it has two directions.
        more: something else that takes registers: vectors of another dtype, or the gradient through the iteration. Two
            directions in float64 take as many, and one in half precision.
        itemsize: of the weights. In half precision a stage has half the bytes.
    """
    large = products and (general or itemsize == 8)
    more = more or (products and itemsize == (8 if general else 2))
    return _adapted(family_of(capability)[large], large, more, itemsize == 2)


@cache
def _adapted(config: Config, large: bool, more: bool, half: bool) -> Config:
    if more and large:
        config = replace(config, registers=255, programs=2)
    elif more:  # a program less, with a stage more
        config = replace(config, registers=168, programs=3, stages=config.stages + (config.stages > 1))
    if half and config.stages > 1:
        config = replace(config, stages=config.stages if large else 2 * config.stages - 1)
        config = replace(config, whole_stages=2 * config.whole_stages - 1)
    return config


def settings_of(config: Config, forward: bool, itemsize: int) -> tuple[dict[str, int], dict[str, Any]]:
    """What a kernel is compiled with: its constants, and the compiler's options."""
    block = config.step // (1 if forward else 2) // itemsize
    constants = {"ROWS": ROWS, "COLS": COLS[itemsize], "STAGES": config.stages, "BLOCK": block}
    if forward:
        constants |= {"WHOLE": WHOLE_ROWS[itemsize][1], "WHOLE_STAGES": config.whole_stages}
    return constants, {"num_warps": config.warps, "maxnreg": config.registers, "enable_fp_fusion": False}


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
    """Triton kernels; see _triton_kernels.py."""

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
            outs = [torch.empty_like(w, dtype=output_dtype or dtype) for w in weights]
            vector_anchor = state.anchor(vectors[0].dtype if vectors else accum, device)
            _run(
                True,
                launch,
                stream,
                (
                    launch.tables["vectors"], launch.tables["floats"], addresses, state.anchor(dtype, device),
                    vector_anchor, state.anchor(gains[0].dtype if gains else accum, device), _tuple(outs), saved,
                ),
                accum,
                mixed,
            )  # fmt: skip
        return outs, saved

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
            grad_weights = [torch.empty_like(w) for w in weights]
            grad_gains = torch.empty(len(layers), dtype=saved.dtype, device=device)
            _run(
                False,
                launch,
                stream,
                (addresses, state.anchor(dtype, device), _tuple(grads), _tuple(grad_weights), saved, grad_gains),
                saved.dtype,
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


def _run(
    forward: bool,
    launch: Launch,
    stream: torch.cuda.Stream | None,
    arguments: Sequence,
    accum: torch.dtype,
    mixed: bool = False,
) -> None:
    """One launch of all tiles, on the current stream."""
    schedule, tables, device = launch.schedule, launch.tables, launch.tables["tiles"].device
    kernel = _kernels().forward_kernel if forward else _kernels().backward_kernel
    config = _config(forward, device, schedule, mixed)
    programs = _programs(device, config)
    if stream is not None:
        programs = min(programs, len(schedule.tiles))
    full = (
        *(tables["tiles"], tables["blocks"], tables["layers"], *arguments, *launch.buffers(accum, device, stream)),
        *(len(schedule.tiles), programs, schedule.n_counters),
    )
    constants, options = settings_of(config, forward, schedule.itemsize)
    constants |= {"GENERAL": schedule.general} | ({"MIXED": mixed} if forward else {"THROUGH": schedule.through})
    if stream is not None:
        kernel[(programs,)](*full, **constants, **options)
        return
    with _interpreter_lock:
        try:
            kernel[(programs,)](*full, **constants)
        except BaseException:
            counters_of.forget()
            raise
