"""Registry and selection. A backend answers with a list of reasons why it cannot run, not with a boolean."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bssn_kernels.backends.cpu import CpuBackend
from bssn_kernels.backends.cuda import CudaBackend
from bssn_kernels.backends.reference import ReferenceBackend
from bssn_kernels.backends.triton import TritonBackend
from bssn_kernels.plan import LayerSpec


class Backend(Protocol):
    """What every backend offers; ``normalize`` and ``normalize_backward`` have the meaning of the ops.

    One may have a ``store`` too, a shorter way to do what :func:`ops.store` does.
    """

    name: str
    devices: tuple[str, ...] | None  # types of device for which it is chosen without being named; None: any

    def unsupported(self, specs: Sequence[LayerSpec] | None = None) -> list[str]:
        """Reasons why it cannot run on any device of this machine (no argument), or not these layers."""

    def tables(self, specs: Sequence[LayerSpec]) -> list[Tensor]:
        """What it adds to the layer table."""

    def normalize(
        self,
        weights: Sequence[Tensor],
        vectors: Sequence[Tensor],
        gains: Sequence[Tensor],
        tables: Sequence[Tensor],
        iterations: Sequence[int],
        saved_numel: int,
        output_dtype: torch.dtype | None,
    ) -> tuple[list[Tensor], Tensor]: ...

    def normalize_backward(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor],
        saved: Tensor,
        tables: Sequence[Tensor],
        layers: Sequence[int],
    ) -> tuple[list[Tensor], Tensor]: ...


# In order of preference. A later backend is added here and nowhere else.
_BACKENDS: dict[str, Backend] = {b.name: b for b in (CpuBackend(), CudaBackend(), TritonBackend(), ReferenceBackend())}
_warned: set[str] = set()


def names() -> list[str]:
    """Names that ``backend`` arguments take."""
    return list(_BACKENDS)


def get(name: str) -> Backend:
    """The backend of this name.

    Raises:
        ValueError: unknown name.
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend: expected None or one of {names()}, got {name!r}")
    return _BACKENDS[name]


def check_name(name: str | None) -> None:
    """Refuse at once what can run on no device of this machine.

    Raises:
        ValueError: unknown name.
        RuntimeError: known, but it cannot run here; the message gives the reasons.
    """
    if name is not None and (reasons := get(name).unsupported()):
        raise RuntimeError(f"backend {name!r} cannot run on this machine: {'; '.join(reasons)}")


def natural(device: str) -> list[str]:
    """Names of the backends that may be chosen for this type of device and can run on this machine."""
    fit = (b for b in _BACKENDS.values() if b.devices is None or device in b.devices)
    return [backend.name for backend in fit if not backend.unsupported()]


def report() -> list[tuple[str, list[str]]]:
    """Each backend and the reasons why it cannot run on this machine (none: it can)."""
    return [(name, backend.unsupported()) for name, backend in _BACKENDS.items()]


def select(specs: Sequence[LayerSpec], name: str | None = None) -> tuple[Backend, list[str]]:
    """The backend for a group of layers, and why better ones were passed over.

    Without a name the first that can run is taken. Where that is the reference although a fused backend is made for
    the device, a warning says so once, and ``BSSN_STRICT=1`` makes it an error.

    Raises:
        ValueError: unknown name.
        RuntimeError: the named backend cannot take these layers, with its reasons and the layer; or strict.
    """
    if name is not None:
        backend = get(name)
        if reasons := backend.unsupported(specs):
            raise RuntimeError(f"backend {name!r} cannot take this group: {'; '.join(reasons)}")
        return backend, []
    passed: list[str] = []
    device = specs[0].device.type
    for backend in _BACKENDS.values():
        if backend.devices is not None and device not in backend.devices:
            passed.append(f"{backend.name}: made for {' and '.join(backend.devices)}, and the layers are on {device}")
            continue
        reasons = backend.unsupported(specs)
        if not reasons:
            if backend.name == "reference" and not specs[0].dtype.is_complex:  # complex weights take the composed path
                _note_fallback(passed)
            return backend, passed
        passed.append(f"{backend.name}: {'; '.join(reasons)}")
    raise AssertionError("the reference backend takes everything")


def _note_fallback(passed: list[str]) -> None:
    message = "bssn_kernels falls back to the slow reference backend (" + " | ".join(passed) + ")"
    if os.environ.get("BSSN_STRICT") == "1":
        raise RuntimeError(message + "; BSSN_STRICT=1 forbids it")
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)
