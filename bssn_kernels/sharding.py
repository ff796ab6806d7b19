"""Weights that FSDP holds in pieces, and puts together only for the modules that it wraps."""

from __future__ import annotations

import sys

from torch import Tensor, nn


def in_pieces(weight: Tensor) -> bool:
    """Whether this process has a piece of it (a DTensor), as outside of the forward of its FSDP module."""
    module = sys.modules.get("torch.distributed.tensor")  # who has one has imported it
    return module is not None and isinstance(weight, module.DTensor)


def wraps(module: nn.Module) -> bool:
    """Whether FSDP wraps this very module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    names = ("FSDPModule", "FullyShardedDataParallel")
    return isinstance(module, tuple(getattr(fsdp, name) for name in names if hasattr(fsdp, name)))


def modules_of_nested_fsdp(root: nn.Module) -> set[nn.Module]:
    """What FSDP wraps below the root. Its weights are whole in the forward of the wrapped module, not when the root's
    begins, and FSDP frees them again after that module's backward, when the root's node has not read them yet.
    """
    return {inner for module in root.modules() if module is not root and wraps(module) for inner in module.modules()}
