"""Timing and memory: the one place that looks at a clock."""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)

MIN_ROUNDS, MAX_ROUNDS = 7, 100
SLOW_S = 1.0
NOISY = 0.25


@dataclass(frozen=True)
class Task:
    """``run`` is timed, its result is kept until the clock has stopped, then ``reset`` undoes what it left."""

    run: Callable[[], object]
    reset: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Samples:
    """Seconds of every round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    @property
    def noisy(self) -> bool:
        """Whether the middle half of the samples is wider than NOISY of the median."""
        first, third = self.quartiles
        return third - first > NOISY * self.median


def interleaved(
    tasks: Mapping[Key, Task],
    *,
    repeats: int | None = None,
    budget_s: float = 10.0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[Key, Samples]:
    """Time all tasks in rounds, each round in another order, so that a slow minute of the machine hits all alike.

    Args:
        repeats: number of rounds; None takes as many as fit ``budget_s``, from 7 to 100. Tasks of a second and more
            take part in every other round.
    """
    MALLOC.map_from(Malloc.USUAL)
    order = list(tasks)
    costs = {key: cost(tasks[key]) for key in order}
    rounds = repeats or min(max(int(budget_s / max(sum(costs.values()), 1e-9)), MIN_ROUNDS), MAX_ROUNDS)
    seconds: dict[Key, list[float]] = {key: [] for key in tasks}
    shuffle = random.Random(0).shuffle
    with no_collection():
        for i in range(rounds):
            progress(f"round {i + 1} of {rounds}")
            shuffle(order)
            for key in order:
                if costs[key] < SLOW_S or i % 2 == 0:
                    seconds[key].append(sample(tasks[key]))
    return {key: Samples(of_key) for key, of_key in seconds.items()}


def cost(task: Task) -> float:
    """Seconds that a run takes, roughly. A quick one is run again, as a first run pays for what is done once."""
    first = sample(task)
    return first if first > SLOW_S / 10 else min(first, sample(task))


def sample(task: Task) -> float:
    """Seconds of one run. Freeing its result is not timed: that comes later in a real program too."""
    start = time.perf_counter()
    result = task.run()
    elapsed = time.perf_counter() - start
    del result
    task.reset()
    return elapsed


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage now and not again until the end."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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


def status_bytes(field: str) -> int:
    """A memory field of this process."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields[field].split()[0]) * 1024
