"""What the modules compiled from csrc have in common on the Python side."""

from __future__ import annotations

import importlib

import torch

# As enum DType of csrc/tables.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def build_reason(part: str) -> str:
    """Why ``_cpu`` or ``_cuda`` was not built, or nothing where the build says that it was."""
    try:
        info = importlib.import_module("bssn_kernels._build_info")
    except ImportError:
        return f"bssn_kernels._{part} was never built (install the package with pip)"
    reason = getattr(info, f"{part.upper()}_REASON", "the build that is installed knew of no such part")
    return reason and f"bssn_kernels._{part} was not built: {reason}"
