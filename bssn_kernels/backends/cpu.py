"""The CPU backend: csrc/cpu, one call for all layers of a group."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from bssn_kernels.backends._compiled import DTYPE_CODES, build_reason
from bssn_kernels.backends._memory import allocate
from bssn_kernels.plan import FLOATS, LayerSpec, accumulation_dtype

_in_forked_child = False


def _note_fork() -> None:
    """A forked child must not enter OpenMP again: the threads of its parent's pool are gone."""
    global _in_forked_child
    _in_forked_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@cache
def _load() -> tuple[ModuleType | None, str]:
    """The compiled module, or the reason why there is none."""
    try:
        return importlib.import_module("bssn_kernels._cpu"), ""
    except ImportError as error:
        return None, build_reason("cpu") or f"bssn_kernels._cpu does not load: {error}"


@cache
def isas() -> list[str]:
    """Instruction sets this build has and this processor knows, the best first; empty without the compiled part."""
    module, _ = _load()
    return module.isas() if module else []


def isa() -> str:
    """The instruction set in use: the best, or what ``BSSN_CPU_ISA`` names.

    Raises:
        RuntimeError: ``BSSN_CPU_ISA`` names one that is not usable here.
    """
    wanted = os.environ.get("BSSN_CPU_ISA")
    if wanted and wanted not in isas():
        raise RuntimeError(f"BSSN_CPU_ISA: expected one of {isas()}, got {wanted!r}")
    return wanted or isas()[0]


def _isa_index() -> int:
    return isas().index(isa()) if "BSSN_CPU_ISA" in os.environ else 0


class CpuBackend:
    """C++ with vectors and threads."""

    name = "cpu"
    devices = ("cpu",)

    def unsupported(self, specs: Sequence[LayerSpec] | None = None) -> list[str]:
        """Reasons: not built; another device; a dtype it does not know; a weight that is not dense."""
        module, reason = _load()
        reasons = [] if module else [reason]
        for spec in specs or ():
            if spec.device.type != "cpu":
                reasons.append(f"layer {spec.name!r} is on {spec.device}, expected cpu")
            elif spec.dtype not in FLOATS:
                reasons.append(f"layer {spec.name!r} is of {spec.dtype}, expected one of {list(FLOATS)}")
            elif isinstance(spec.view, str):
                reasons.append(f"layer {spec.name!r}: {spec.view}")
        return reasons

    def tables(self, specs: Sequence[LayerSpec]) -> list[Tensor]:
        """Nothing beside the layer table."""
        return []

    @staticmethod
    def _empty(table: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        module = _load()[0]
        return allocate(table, weights, dtype, module.advise_huge_pages)

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
        dtype = weights[0].dtype
        accum, out_dtype = accumulation_dtype(dtype), output_dtype or dtype
        saved = torch.empty(saved_numel, dtype=accum, device="cpu")
        outs = self._empty(tables[0], weights, out_dtype)
        if {x.dtype for x in vectors} == {accum} and all(map(Tensor.is_contiguous, vectors)):
            saved.__dict__["stored_at"] = places = _addresses(vectors)
        else:
            vectors = [x.to(accum).contiguous() for x in vectors]
            places = _addresses(vectors)
        gains = [x.to(accum) for x in gains]
        _load()[0].forward(
            _isa_index(),
            tables[0].data_ptr(),
            _addresses(weights),
            places,
            _addresses(gains),
            iterations,
            _addresses(outs),
            saved.data_ptr(),
            DTYPE_CODES[dtype],
            DTYPE_CODES[out_dtype],
            _threads(),
        )
        return outs, saved

    def store(self, vectors: Sequence[Tensor], saved: Tensor, tables: Sequence[Tensor]) -> bool:
        """See ``ops.store``."""
        places = _addresses(vectors)
        if saved.__dict__.get("stored_at") != places:
            return False
        _load()[0].store(tables[0].data_ptr(), saved.data_ptr(), saved.element_size(), places)
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
        grad_weights = self._empty(tables[0], weights, weights[0].dtype)
        grad_gains = torch.empty(len(layers), dtype=saved.dtype, device="cpu")
        _load()[0].backward(
            _isa_index(),
            tables[0].data_ptr(),
            layers,
            _addresses(grads),
            _addresses(weights),
            saved.data_ptr(),
            _addresses(grad_weights),
            grad_gains.data_ptr(),
            DTYPE_CODES[weights[0].dtype],
            DTYPE_CODES[grads[0].dtype],
            _threads(),
        )
        return grad_weights, grad_gains


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _threads() -> int:
    return 1 if _in_forked_child else torch.get_num_threads()
