"""Where the time of a set goes: the kernel, the memory, autograd, and the Python around them.

Every part is timed exclusively, by a stopwatch around its functions, which adds about 0.3 us each time that it is hit;
the whole is timed without it as well.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.workloads import Case
from bssn_kernels import backends, functional, ops
from bssn_kernels.backends import cpu
from bssn_kernels.bench.measure import MAX_ROUNDS, interleaved
from bssn_kernels.bench.providers import fused, tasks_of
from bssn_kernels.bench.report import aligned
from bssn_kernels.bench.task import no_collection
from bssn_kernels.run import Run

REST = "hooks, frame, reads"


class Stopwatch:
    """Seconds by name, each without those of the parts that run inside of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = [0.0]

    def around(self, name: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                self.seconds[name] += elapsed - self.inner.pop()
                self.inner[-1] += elapsed

        return timed


@contextmanager
def watched(watch: Stopwatch, name: str) -> Iterator[None]:
    """The stopwatch stands around the parts of the fused call and of its backward."""
    backend = backends.get(name)
    places: list[tuple[Any, str, str]] = [
        (backend, "normalize", "results, addresses"),
        (backend, "normalize_backward", "results, addresses"),
        (functional, "attach", "autograd: node"),
        (Run, "store", "store vectors"),
        (torch.autograd, "backward", "autograd: engine"),
        (ops.Attach, "backward", "node's backward"),
    ]
    if hasattr(torch.autograd, "_make_grads"):  # which a network does not call: its gradients come from the layer above
        places.append((torch.autograd, "_make_grads", "check of given gradients"))
    if name == "cpu":
        module = cpu._load()[0]
        places += [(module, "forward", "kernel"), (module, "backward", "kernel")]
    with ExitStack() as stack:
        for owner, attribute, part in places:
            timed = watch.around(part, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, staticmethod(timed) if owner is ops.Attach else timed))
        yield


def measure_breakdown(
    workload: str, device: torch.device, variant: str = "sn", backend: str = "cpu", repeats: int | None = None
) -> dict[str, Any]:
    """The record of one set: medians of each part's seconds a call, of forward and of forward with backward."""
    subject = Case(workload).subject(device)
    tasks = tasks_of(fused(backend).make(subject, variant), subject.grads())
    record: dict[str, Any] = {"kind": "breakdown", "name": f"breakdown of {workload}", "workload": workload}
    record |= {"backend": backend, "variant": variant, "layers": len(subject.sites), "rows": []}
    whole = interleaved(tasks, repeats=repeats or MAX_ROUNDS)
    for what, task in tasks.items():
        rounds: list[dict[str, float]] = []
        with no_collection():
            for _ in range(repeats or MAX_ROUNDS):
                watch = Stopwatch()
                with watched(watch, backend):
                    result = watch.around(REST, task.run)()
                del result
                task.reset()
                rounds.append(watch.seconds)
        parts = {part: statistics.median(one[part] for one in rounds) for part in rounds[0]}
        times = {"wall": {"median": whole[what].wall.median}}
        record["rows"].append({"provider": backend, "what": what, "times": {what: times}, "parts": parts})
    return record


def breakdown_table(record: dict[str, Any]) -> str:
    names = list(dict.fromkeys(part for row in record["rows"] for part in row["parts"]))
    lines: list[tuple[str, ...] | str] = [("us a call", "forward", "forward + backward")]
    for name in [*names, "whole, without the stopwatch"]:
        values = [
            row["parts"].get(name) if name in names else row["times"][row["what"]]["wall"]["median"]
            for row in record["rows"]
        ]
        lines.append((name, *("" if value is None else f"{value * 1e6:.0f}" for value in values)))
    head = f"{record['name']}, {record['layers']} layers, {record['backend']} {record['variant']}"
    return "\n".join([head, "", *aligned(lines, slice(1, None)), ""])
