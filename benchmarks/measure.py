"""One case: all its rows prepared, verified, inspected, and timed together."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks import LARGE, WARM_UPS
from benchmarks.child import Say, apart
from benchmarks.providers import providers_of
from benchmarks.report import progress, table
from benchmarks.targets import ratios_of, targets_of
from benchmarks.verify import DeviceLost, alive
from benchmarks.workloads import Case
from bssn_kernels.bench.host import floor_task
from bssn_kernels.bench.measure import clock_of
from bssn_kernels.bench.memory import meter_of
from bssn_kernels.bench.providers import Root, Subject
from bssn_kernels.bench.session import CLONE, Measured, Row, Session, clone_task, told
from bssn_kernels.bench.task import Task

# Of what is done between two notes; a provider that compiles takes minutes.
STEP_S, COMPILED_STEP_S = 60.0, 150.0


def streams(weights: Sequence[Tensor]) -> dict[str, Task]:
    """What bounds a call: one copy of the weights, and three streams of as many numbers."""
    weights = [w.detach() for w in weights]
    targets = [torch.empty_like(w) for w in weights]
    flat = torch.cat([w.flatten() for w in weights])
    grad, out = torch.randn_like(flat), torch.empty_like(flat)
    return {
        "copy": Task(lambda: torch._foreach_copy_(targets, weights)),
        "three_stream": Task(lambda: torch.add(grad, flat, out=out)),
    }


def launches_of(task: Task) -> dict[str, Any]:
    """What one call launches, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        result = task.run()
        torch.cuda.synchronize()
    del result
    task.reset()
    on_device = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    if not on_device:
        raise RuntimeError("the profiler saw nothing on the device")
    memory = [name for name in on_device if name.startswith(("Memcpy", "Memset"))]
    names = {name[:160]: n for name, n in Counter(on_device).most_common()}
    return {"kernels": len(on_device) - len(memory), "memory": len(memory), "names": names}


class Bench(Session):
    """A session of the suite: with what bounds a call, launches, and an end where the device is lost.

    Args:
        alone: the backward is also timed by itself, over a kept graph.
    """

    def __init__(self, subject: Subject, alone: bool = False) -> None:
        device = subject.device
        self.cuda, self.alone = device.type == "cuda", alone
        super().__init__(subject, meter=meter_of(device), clock=clock_of(device, cold=subject.nbytes < LARGE))

    def add_bounds(self) -> None:
        """Rows of the copy, the clone, three streams, and of the least that a differentiable call takes of the host."""
        if self.cuda:
            with contextlib.suppress(RuntimeError):  # the profiler's first time is not like others
                launches_of(Task(lambda: torch.ones(1, device=self.subject.device)))
        root = self.subject.copy()
        bounds = streams(root.originals())
        self.add_bound("copy", {"forward": bounds["copy"]})
        self.add_bound("three_stream", {"backward": bounds["three_stream"]})
        self.add_bound(CLONE, {"forward": clone_task(self.subject)})
        self.add_bound("floor", {"forward": floor_task(root)})

    def inspect(self, row: Row, root: Root) -> None:
        """Warm tasks, their launches and memory; what only describes them is noted where it fails."""
        eager = not (row.graph or row.compiled)
        if self.alone and eager:
            with self._noted(row, "backward alone"):
                outs, leaves = row.tasks["forward"].run(), [p for p in root.parameters() if p.requires_grad]
                alone = Task(lambda: torch.autograd.grad(outs, leaves, self.grads, retain_graph=True))
                alone.run()
                row.tasks["backward"] = alone
        if not self.cuda:
            return
        for _ in range(WARM_UPS):
            for task in row.tasks.values():
                task.run()
                task.reset()
        if eager:  # the memory of others is set aside beforehand
            with self._noted(row, "memory"):
                self.take_memory(row)
        for what, task in row.tasks.items():
            with self._noted(row, what):
                row.launches[what] = launches_of(task)

    @contextlib.contextmanager
    def _noted(self, row: Row, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not alive(self.subject.device):
                raise
            row.notes.append(f"{what}: {told(error)}")

    def refuse(self, row: Row, text: str, error: Exception) -> None:
        super().refuse(row, text, error)
        if not alive(self.subject.device):
            raise DeviceLost(row.label) from error


class Measurement:
    """The record of one case.

    Args:
        args: of the command line.
        without: labels of rows to leave out.
        say: told of the record so far whenever something new begins.
    """

    def __init__(self, case: Case, args: argparse.Namespace, without: Sequence[str], say: Say) -> None:
        self.case, self.args, self.without, self.say = case, args, without, say
        self.measured = Measured(case.workload, 0, 0, [])

    def note(self, text: str, seconds: float = STEP_S) -> None:
        self.say(self.record(at=text, failed=f"ended at {text!r}"), seconds)
        progress(f"{self.case.name}: {text}")

    def run(self) -> Measured:
        """Prepare, verify and time all rows.

        Raises:
            DeviceLost: nothing can be measured any more.
        """
        self.note("building")
        args, device = self.args, torch.device(self.args.device)
        subject = self.case.subject(device)
        bench = Bench(subject, args.alone or device.type == "cuda")
        self.measured = Measured(self.case.workload, len(subject.sites), subject.nbytes, bench.rows)
        bench.add_bounds()
        for variant in args.variant:
            for provider in providers_of(device, self.case, args.backend):
                wanted = not args.provider or provider.name in args.provider
                label = f"{provider.name} {variant}"
                if wanted and label not in self.without and variant in (provider.variants or (variant,)):
                    self.note(label, COMPILED_STEP_S if provider.compiled else STEP_S)
                    bench.add(provider, variant)
        self.note("rounds", 120 + 4 * args.seconds)
        bench.time(args.repeats, args.seconds)
        l2 = torch.cuda.get_device_properties(device).L2_cache_size if bench.cuda else 0
        limits = {"fits_l2": max(w.nbytes for w in subject.weights) <= l2, "exact": self.case.dtype == "float32"}
        limits["exact"] &= not self.case.autocast
        for row in bench.rows:
            row.ratios = ratios_of(row, self.measured, device.type)
            row.targets = targets_of(row, self.measured, device.type, **limits)
        return self.measured

    def record(self, **more: Any) -> dict[str, Any]:
        """Everything for the JSON file."""
        sizes = {"layers": self.measured.layers, "bytes": self.measured.nbytes}
        head = {"kind": "case", "case": asdict(self.case), **sizes, **bandwidths(self.measured)}
        moved = {"forward": 2 * self.measured.nbytes, "backward": 3 * self.measured.nbytes}
        rows = [row.record() | ({"must_move": moved} if row.ratios else {}) for row in self.measured.rows]
        return head | {"rows": rows} | more


def bandwidths(measured: Measured) -> dict[str, float]:
    """Bytes per second of the copy and the three streams of the same rounds."""
    found = {}
    for name, what, passes in (("copy", "forward", 2), ("three_stream", "backward", 3)):
        row = measured.row(name)
        if row is not None:
            found[f"{name}_bandwidth"] = passes * measured.nbytes / row.median(what, "device")
    return found


def provider_names(cases: Sequence[Case], args: argparse.Namespace) -> list[str]:
    """What ``--provider`` takes for these cases."""
    device = torch.device(args.device)
    found = [p.name for case in cases for p in providers_of(device, case, args.backend)]
    return list(dict.fromkeys(found))


def measure(case: Case, args: argparse.Namespace, without: Sequence[str], say: Say) -> dict[str, Any]:
    """The record of one case, measured in this process."""
    start = time.perf_counter()
    measurement = Measurement(case, args, without, say)
    outcome = {}
    try:
        print(table(case.name, measurement.run()), flush=True)
    except DeviceLost as error:
        outcome = {"failed": f"the device was lost at {str(error)!r}", "at": str(error)}
    except Exception as error:
        outcome = {"failed": told(error)}
    return measurement.record(seconds=time.perf_counter() - start, **outcome)


def run_child(case: Case, args: argparse.Namespace, without: Sequence[str], seconds: float) -> dict[str, Any]:
    """The same from a process of its own; whatever becomes of it, a record comes back."""
    return apart(measure, (case, args, without), {"kind": "case", "case": asdict(case), "rows": []}, seconds)
