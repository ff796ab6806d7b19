"""Memory for large results on the CPU, used again by the next call of the same plan.

The C library gives freed memory back to the system, a large block at once and the end of its heap soon, and touching
pages for the first time costs several times what the arithmetic costs. So a plan keeps the blocks it handed out and
uses one again once nobody else refers to its storage. They go when the plan goes, or when several calls in a row had
no use for them. ``BSSN_CPU_REUSE=0`` turns it off.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes; smaller blocks stay in the heap of the C library, and are quicker to get there
IDLE_CALLS = 16  # a training step of a GAN makes four to six calls

# References to a storage, from C++ and Python together; private to torch, so do without where it is missing.
_use_count = getattr(torch._C, "_storage_Use_Count", None)
_lock = threading.Lock()


def _after_fork() -> None:
    """Another thread of the parent may have held it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass
class _Block:
    storage: torch.UntypedStorage
    last_call: int


class Pool:
    """The blocks of one plan."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[_Block]] = {}
        self._call = 0

    def next_call(self) -> None:
        """Count a call, and let go of what the last ones did not use."""
        self._call += 1
        for size, blocks in list(self._blocks.items()):
            self._blocks[size] = [b for b in blocks if self._call - b.last_call <= IDLE_CALLS]

    def empty_like(self, tensor: Tensor, dtype: torch.dtype, on_fresh: Callable[[int, int], None]) -> Tensor:
        """An uninitialized tensor with shape and strides of a dense one.

        ``on_fresh(address, bytes)`` is called for memory that was never touched.
        """
        size = tensor.numel() * dtype.itemsize
        for block in self._blocks.get(size, ()):
            storage = block.storage
            if _use_count(storage._cdata) == 1 and storage.nbytes() == size and not storage.is_shared():
                block.last_call = self._call
                return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, tensor.shape, tensor.stride())
        fresh = torch.empty_like(tensor, dtype=dtype)
        on_fresh(fresh.data_ptr(), size)
        self._blocks.setdefault(size, []).append(_Block(fresh.untyped_storage(), self._call))
        return fresh

    def nbytes(self) -> int:
        """Bytes kept, in use or not."""
        return sum(size * len(blocks) for size, blocks in self._blocks.items())


def empty_like(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Uninitialized tensors like the given ones, which have one dtype. ``map`` takes two thirds of a loop's time."""
    if dtype == tensors[0].dtype:
        return list(map(torch.empty_like, tensors))
    return [torch.empty_like(t, dtype=dtype) for t in tensors]


def allocate(
    owner: Tensor, like: Sequence[Tensor], dtype: torch.dtype, on_fresh: Callable[[int, int], None]
) -> list[Tensor]:
    """Uninitialized tensors like the given ones, from the pool of the plan, which lives as an attribute
    of its layer table, ``owner``.
    """
    smallest = SMALLEST // dtype.itemsize
    large = [t.numel() >= smallest for t in like]
    if not any(large) or _use_count is None or os.environ.get("BSSN_CPU_REUSE") == "0":
        return empty_like(like, dtype)
    with _lock:
        pool = owner.__dict__.setdefault("pool", Pool())
        pool.next_call()
        return [
            pool.empty_like(t, dtype, on_fresh) if big else torch.empty_like(t, dtype=dtype)
            for t, big in zip(like, large)
        ]
