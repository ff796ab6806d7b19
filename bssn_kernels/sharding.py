"""Weights that FSDP holds in pieces, and puts together only for the modules that it wraps."""

from __future__ import annotations

import sys

from torch import Tensor, nn


def in_pieces(weight: Tensor) -> bool:
    """Whether this process has a piece of it (a DTensor), as outside of the forward of its FSDP module."""
    module = sys.modules.get("torch.distributed.tensor")  # who has one has imported it
    return module is not None and isinstance(weight, module.DTensor)


def modules_of_nested_fsdp(root: nn.Module) -> set[nn.Module]:
    """What FSDP wraps below the root. Its weights are whole in the forward of the wrapped module, not when the root's
    begins, and gradients that arrive after its backward are lost.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    names = ("FSDPModule", "FullyShardedDataParallel")
    kinds = tuple(getattr(fsdp, name) for name in names if hasattr(fsdp, name))
    if not kinds:
        return set()
    return {inner for m in root.modules() if m is not root and isinstance(m, kinds) for inner in m.modules()}
