"""Timing: the one place that looks at a clock, the processor's or a CUDA device's."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from bssn_kernels.bench.memory import MALLOC, Malloc
from bssn_kernels.bench.task import Task, no_collection

Key = TypeVar("Key", bound=Hashable)

MIN_ROUNDS, MAX_ROUNDS = 5, 100
SLOW_S = 0.5
NOISY = 0.25
SCRATCH = 256 * 10**6  # bytes, more than the L2 cache of any GPU


@dataclass(frozen=True)
class Samples:
    """Seconds of every round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third."""
        return self._cut(4)

    @property
    def noisy(self) -> bool:
        """Whether the middle half of the samples is wider than NOISY of the median."""
        first, third = self.quartiles
        return third - first > NOISY * self.median

    def record(self) -> dict[str, Any]:
        """Median, 10 % and 90 % quantiles, and the samples, for JSON."""
        low, high = self._cut(10)
        return {"median": self.median, "p10": low, "p90": high, "samples": [float(f"{s:.5g}") for s in self.seconds]}

    def _cut(self, n: int) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        first, *_, last = statistics.quantiles(self.seconds, n=n, method="inclusive")
        return first, last


class Reading(NamedTuple):
    """Seconds of one call.

    Attributes:
        wall: from an idle device to the end of the work. host: until the host has the call behind it.
        device: of the device alone; ``ahead``: they are that, else the device had to wait for the host.
        spent: by the measuring itself, for choosing the number of rounds.
    """

    wall: float
    host: float
    device: float
    ahead: bool
    spent: float


@dataclass(frozen=True)
class Times:
    """All readings of a task, by clock; on a CPU the three are one. ``behind``: readings that were not ``ahead``."""

    wall: Samples
    host: Samples
    device: Samples
    behind: int = 0

    @classmethod
    def of(cls, readings: list[Reading]) -> Times:
        columns = (Samples([getattr(r, clock) for r in readings]) for clock in ("wall", "host", "device"))
        return cls(*columns, behind=sum(not r.ahead for r in readings))

    def record(self) -> dict[str, Any]:
        if self.wall.seconds == self.device.seconds:
            return {"wall": self.wall.record()}
        clocks = {clock: getattr(self, clock).record() for clock in ("wall", "host", "device")}
        return clocks | {"behind": self.behind}


class CpuClock:
    """The processor's clock, under which a call's time, its device time and its host time are one."""

    def sample(self, task: Task) -> Reading:
        """Seconds of one run. Freeing its result is not timed: that comes later in a real program too."""
        start = time.perf_counter()
        result = task.run()
        elapsed = time.perf_counter() - start
        del result
        task.reset()
        return Reading(elapsed, elapsed, elapsed, True, elapsed)


class CudaClock:
    """CUDA events. ``cold``: the L2 cache is overwritten before every call."""

    SHORTEST, LONGEST = 400_000, 200_000_000  # cycles, the latter about 0.1 s

    def __init__(self, device: torch.device, cold: bool) -> None:
        self.scratch = torch.empty(SCRATCH, dtype=torch.uint8, device=device) if cold else None
        self.cycles: dict[int, int] = {}

    def sample(self, task: Task) -> Reading:
        start = time.perf_counter()
        wall, host = self._wall(task)
        device, ahead = self._device(task)
        return Reading(wall, host, device, ahead, time.perf_counter() - start)

    def _prepare(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        if self.scratch is not None:
            self.scratch.fill_(1)
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def _wall(self, task: Task) -> tuple[float, float]:
        start, end = self._prepare()
        torch.cuda.synchronize()
        start.record()
        before = time.perf_counter()
        result = task.run()
        host = time.perf_counter() - before
        end.record()
        torch.cuda.synchronize()
        del result
        task.reset()
        return start.elapsed_time(end) / 1e3, host

    def _device(self, task: Task) -> tuple[float, bool]:
        """A spinning kernel keeps the device from beginning until the host has issued everything. A call of more
        launches than the queue takes has to wait for the device.
        """
        cycles = self.cycles.get(id(task), self.SHORTEST)
        while True:
            start, end = self._prepare()
            torch.cuda._sleep(cycles)
            start.record()
            result = task.run()
            end.record()
            ahead = not start.query()
            torch.cuda.synchronize()
            del result
            task.reset()
            if ahead or cycles >= self.LONGEST:
                self.cycles[id(task)] = cycles
                return start.elapsed_time(end) / 1e3, ahead
            cycles *= 4


def clock_of(device: torch.device, cold: bool = False) -> CpuClock | CudaClock:
    return CudaClock(device, cold) if device.type == "cuda" else CpuClock()


def interleaved(
    tasks: Mapping[Key, Task],
    *,
    clock: CpuClock | CudaClock | None = None,
    repeats: int | None = None,
    budget_s: float = 10.0,
    progress: Callable[[str], None] = lambda text: None,
    failed: Callable[[Key, Exception], None] | None = None,
) -> dict[Key, Times]:
    """Time all tasks in rounds, each round in another order, so that a slow minute of the machine hits all alike.

    Args:
        clock: None takes the processor's.
        repeats: number of rounds; None takes as many as fit ``budget_s``, from 5 to 100. Tasks of half a second
            and more take part in every other round.
        failed: is told of a task that raises, which is then left out; without it the error is raised.
    """
    MALLOC.map_from(Malloc.USUAL)
    clock = clock or CpuClock()
    costs: dict[Key, float] = {}
    readings: dict[Key, list[Reading]] = {key: [] for key in tasks}
    order = list(tasks)

    def attempt(key: Key, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:
            if failed is None:
                raise
            order.remove(key)
            readings.pop(key)
            costs.pop(key, None)
            failed(key, error)

    for key in tasks:
        attempt(key, lambda key=key: costs.update({key: cost(clock, tasks[key])}))
    rounds = repeats or min(max(int(budget_s / max(sum(costs.values()), 1e-9)), MIN_ROUNDS), MAX_ROUNDS)
    shuffle = random.Random(0).shuffle
    with no_collection():
        for i in range(rounds):
            progress(f"round {i + 1} of {rounds}")
            shuffle(order)
            for key in list(order):
                if costs[key] < SLOW_S or i % 2 == 0:
                    attempt(key, lambda key=key: readings[key].append(clock.sample(tasks[key])))
            if i % 10 == 9:
                gc.collect()
    return {key: Times.of(of_key) for key, of_key in readings.items()}


def cost(clock: CpuClock | CudaClock, task: Task) -> float:
    """Seconds that a sample takes, roughly. A quick one is taken again, as a first run pays for what is done once."""
    first = clock.sample(task).spent
    return first if first > 0.1 else min(first, clock.sample(task).spent)
