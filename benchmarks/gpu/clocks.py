"""Clocks for tasks on a device, and rounds of samples."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from benchmarks.gpu import MB
from bssn_kernels.bench.measure import Task, no_collection, sample

Key = TypeVar("Key", bound=Hashable)
SCRATCH = 256 * MB
MIN_ROUNDS, MAX_ROUNDS = 5, 50


class CpuClock:
    """The processor's clock, under which a call's time, its device time and its host time are one."""

    def wall(self, task: Task) -> tuple[float, float]:
        seconds = sample(task)
        return seconds, seconds

    def device(self, task: Task) -> tuple[float, bool]:
        return sample(task), True


class CudaClock:
    """CUDA events. ``cold``: the L2 cache is overwritten before every call."""

    SHORTEST, LONGEST = 400_000, 200_000_000  # cycles, the latter about 0.1 s

    def __init__(self, device: torch.device, cold: bool) -> None:
        self.scratch = torch.empty(SCRATCH, dtype=torch.uint8, device=device) if cold else None
        self.cycles: dict[int, int] = {}

    def _prepare(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        if self.scratch is not None:
            self.scratch.fill_(1)
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def wall(self, task: Task) -> tuple[float, float]:
        """Seconds from an idle device to the end of the work, and seconds until the host has the call behind it."""
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

    def device(self, task: Task) -> tuple[float, bool]:
        """Seconds of the device alone, and whether they are that: a spinning kernel keeps the device from beginning
        until the host has issued everything. A call of more launches than the queue takes has to wait for the device.
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


@dataclass
class Times:
    """Seconds of every round, by clock; ``behind``: device samples in which the device had to wait for the host."""

    wall: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    behind: int = 0

    def median(self, clock: str) -> float:
        return statistics.median(getattr(self, clock))

    def record(self) -> dict[str, Any]:
        return {clock: of_samples(getattr(self, clock)) for clock in ("wall", "host", "device")} | {
            "behind": self.behind
        }


def of_samples(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, 10 % and 90 % quantiles, and the samples."""
    low = high = seconds[0]
    if len(seconds) > 1:
        low, *_, high = statistics.quantiles(seconds, n=10, method="inclusive")
    samples = [float(f"{s:.5g}") for s in seconds]
    return {"median": statistics.median(seconds), "p10": low, "p90": high, "samples": samples}


def rounds(
    tasks: Mapping[Key, Task],
    clock: CpuClock | CudaClock,
    repeats: int | None = None,
    budget_s: float = 0.0,
    failed: Callable[[Key, Exception], None] | None = None,
) -> dict[Key, Times]:
    """Rounds over all tasks, each in another order, so that a slow moment of the machine hits all alike.

    Args:
        repeats: None takes as many rounds as fit ``budget_s``, from MIN_ROUNDS to MAX_ROUNDS.
        failed: is told of a task that raises, which is then left out; without it the error is raised.
    """
    order = list(tasks)
    times = {key: Times() for key in order}

    def one_round(keep: bool) -> None:
        for key in list(order):
            try:
                wall, host = clock.wall(tasks[key])
                device, ahead = clock.device(tasks[key])
            except Exception as error:
                if failed is None:
                    raise
                order.remove(key)
                failed(key, error)
                continue
            if keep:
                of_key = times[key]
                of_key.wall.append(wall)
                of_key.host.append(host)
                of_key.device.append(device)
                of_key.behind += not ahead

    one_round(keep=False)
    start = time.perf_counter()
    one_round(keep=False)
    cost = time.perf_counter() - start
    shuffle = random.Random(0).shuffle
    with no_collection():
        for i in range(repeats or min(max(int(budget_s / max(cost, 1e-9)), MIN_ROUNDS), MAX_ROUNDS)):
            shuffle(order)
            one_round(keep=True)
            if i % 10 == 9:
                gc.collect()
    return times
