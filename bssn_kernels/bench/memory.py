"""What tasks take of the memory, on the CPU and on a CUDA device, and a malloc that does the same every time."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from bssn_kernels.bench.task import Task, no_collection


class Malloc:
    """glibc's malloc, told from which size on a block is mapped by itself, to be unmapped when it is freed.

    Left alone, glibc moves that size up to that of the largest block freed so far, to 32 MiB at most. The page faults
    of fresh mappings would then make a provider up to twice as slow before that as after, so times would depend on
    what ran earlier. USUAL is where any program ends that frees a tensor of 32 MiB once, as every training does.
    Elsewhere than on glibc nothing is changed.
    """

    USUAL, EXACT = 32 << 20, 64 << 10
    # Names and values of glibc's malloc.h.
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

    def __init__(self) -> None:
        try:
            libc = ctypes.CDLL(None)
            self._mallopt, self._trim = libc.mallopt, libc.malloc_trim
        except (OSError, TypeError, AttributeError):
            self._mallopt = self._trim = lambda *args: None
            self.known = False
        else:
            self.known = True

    def map_from(self, size: int) -> None:
        """Map blocks of this size and more by themselves; keep twice as much free memory at the top of the heap."""
        self._mallopt(self.M_MMAP_THRESHOLD, size)
        self._mallopt(self.M_TRIM_THRESHOLD, 2 * size)

    def give_back(self) -> None:
        """Return all free pages to the system."""
        self._trim(0)


MALLOC = Malloc()


class Memory(NamedTuple):
    """Bytes beyond what was there before the first call: at the peak of each task, and after all of them."""

    peaks: list[int]
    kept: int


class MemoryMeter:
    """Counts the memory that tasks take on the CPU as the operating system sees it.

    Resident pages are counted, not allocations of torch, so scratch memory of compiled code and of BLAS counts too.
    Just before a run, malloc gives all free pages back (else old pages could be used again unseen) and the kernel
    forgets the peak so far. While measuring, every block from 64 KiB on is mapped by itself, else the peak would
    depend on the fragmentation of what malloc keeps. Resolution: some pages per thread, about 0.3 MB with two threads.
    Linux with glibc only.
    """

    METHOD = "growth of the process's resident pages (VmHWM), malloc keeping nothing back"
    FIRST_CALLS = True

    def __init__(self) -> None:
        self.reason = "" if MALLOC.known else "not measured: only with glibc"
        try:
            self._forget_peak()
            status_bytes("VmHWM")
        except (OSError, KeyError) as error:
            self.reason = f"not measured: {error}"

    def measure(self, tasks: Sequence[Task]) -> Memory | None:
        """Memory of tasks that were never run before, so that what they keep for the next run is seen.

        None where ``reason`` says why.
        """
        if self.reason:
            return None
        MALLOC.map_from(Malloc.EXACT)
        try:
            with no_collection():
                before = self._resident()
                peaks = [self._peak(task) - before for task in tasks]
                return Memory(peaks, self._resident() - before)
        finally:
            MALLOC.map_from(Malloc.USUAL)

    def _peak(self, task: Task) -> int:
        self._resident()
        self._forget_peak()
        result = task.run()
        peak = status_bytes("VmHWM")
        del result
        task.reset()
        return peak

    @staticmethod
    def _resident() -> int:
        MALLOC.give_back()
        return status_bytes("VmRSS")

    @staticmethod
    def _forget_peak() -> None:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


class CudaMemoryMeter:
    """Counts what torch's allocator has given out. Of warm tasks: a first call also loads code and makes workspaces."""

    METHOD = "peak of torch's allocator"
    FIRST_CALLS = False
    reason = ""

    def measure(self, tasks: Sequence[Task]) -> Memory:
        """Memory of each task, and what is still given out after all of them."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        peaks = [self._peak(task) - before for task in tasks]
        return Memory(peaks, torch.cuda.memory_allocated() - before)

    @staticmethod
    def _peak(task: Task) -> int:
        torch.cuda.reset_peak_memory_stats()
        result = task.run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del result
        task.reset()
        return peak


def meter_of(device: torch.device) -> MemoryMeter | CudaMemoryMeter:
    return CudaMemoryMeter() if device.type == "cuda" else MemoryMeter()


def status_bytes(field: str) -> int:
    """A memory field of this process."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields[field].split()[0]) * 1024
