"""One case: all its rows prepared, verified, inspected, and timed together."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import LARGE, WARM_UPS
from benchmarks.gpu.cases import Case, Row
from benchmarks.gpu.checks import alive, errors_of, extra_bytes, launches_of, refusal
from benchmarks.gpu.child import Say, apart
from benchmarks.gpu.clocks import clock_of, rounds
from benchmarks.gpu.providers import Provider, Runner, Sources, providers_of
from benchmarks.gpu.report import progress, table, told
from benchmarks.gpu.targets import ratios_of, targets_of
from bssn_kernels.bench import DTYPES
from bssn_kernels.bench.host import floor_task
from bssn_kernels.bench.measure import Task

# Of what is done between two notes; a provider that compiles takes minutes.
STEP_S, COMPILED_STEP_S = 60.0, 150.0


class DeviceLost(Exception):
    """The device answers no more, since the row that the message names."""


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


class Measurement:
    """All rows of one case.

    Args:
        args: of the command line.
        without: labels of rows to leave out.
        say: told of the record so far whenever something new begins.
    """

    def __init__(self, case: Case, args: argparse.Namespace, without: Sequence[str], say: Say) -> None:
        self.case, self.args, self.without, self.say = case, args, without, say
        self.device = torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        self.rows: list[Row] = []
        self.layers = self.nbytes = self.rounds = 0

    def note(self, text: str, seconds: float = STEP_S) -> None:
        self.say(self.record(at=text, failed=f"ended at {text!r}"), seconds)
        progress(f"{self.case.name}: {text}")

    def run(self) -> None:
        """Prepare, verify and time all rows.

        Raises:
            DeviceLost: nothing can be measured any more.
        """
        self.note("building")
        sources = Sources(self.case, self.device)
        subject = sources.subject
        self.layers, self.nbytes = len(subject.sites), subject.nbytes
        if self.cuda:
            with contextlib.suppress(RuntimeError):  # the profiler's first time is not like others
                launches_of(Task(lambda: torch.ones(1, device=self.device)))
        root = subject.copy()
        bounds = streams(root.originals())
        self.rows = [
            Row("copy", tasks={"forward": bounds["copy"]}),
            Row("three_stream", tasks={"backward": bounds["three_stream"]}),
            Row("floor", tasks={"forward": floor_task(root)}),
        ]
        providers = providers_of(self.device, self.case, self.args.backend)
        for variant in self.args.variant:
            for provider in providers:
                wanted = not self.args.provider or provider.name in self.args.provider
                if variant in provider.variants and wanted and f"{provider.name} {variant}" not in self.without:
                    self._prepare(provider, variant, sources)
        self._time()
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size if self.cuda else 0
        fits_l2 = max(w.nbytes for w in subject.weights) <= l2
        for row in self.rows:
            row.ratios = ratios_of(row, self.rows)
            exact = self.case.dtype == "float32"
            row.targets = targets_of(row, self.rows, self.case.workload, self.nbytes, fits_l2=fits_l2, exact=exact)

    def _prepare(self, provider: Provider, variant: str, sources: Sources) -> None:
        row = Row(provider.name, variant, provider.backend, provider.graph, provider.compiled)
        self.rows.append(row)
        self.note(row.label, COMPILED_STEP_S if row.compiled else STEP_S)
        try:
            runner = provider.make(sources, variant)
            row.errors = errors_of(runner, variant)
            row.refused = refusal(row.errors, DTYPES[self.case.dtype])
            if not row.refused:
                row.tasks = self._inspected(row, runner)
        except Exception as error:
            self._refuse(row, told(error), error)

    def _inspected(self, row: Row, runner: Runner) -> dict[str, Task]:
        """The tasks that are timed, warm; what only describes them is noted where it fails."""
        tasks = dict(runner.tasks)
        for _ in range(WARM_UPS):
            for task in tasks.values():
                task.run()
                task.reset()
        eager = not (row.graph or row.compiled)  # the memory of others is set aside beforehand
        if eager:
            with self._noted(row, "backward alone"):
                task = runner.backward_task()
                task.run()
                task.run()
                tasks["backward"] = task
        for what, task in tasks.items() if self.cuda else ():
            with self._noted(row, what):
                row.launches[what] = launches_of(task)
                if eager and what != "backward":
                    row.extra[what] = extra_bytes(task, runner.leaves)
        return tasks

    @contextlib.contextmanager
    def _noted(self, row: Row, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not alive(self.device):
                raise
            row.notes.append(f"{what}: {told(error)}")

    def _refuse(self, row: Row, text: str, error: Exception) -> None:
        row.refused = row.refused or text
        if not alive(self.device):
            raise DeviceLost(row.label) from error

    def _time(self) -> None:
        self.note("rounds", 120 + 4 * self.args.seconds)
        tasks = {(number, what): task for number, row in enumerate(self.rows) for what, task in row.tasks.items()}

        def failed(key: tuple[int, str], error: Exception) -> None:
            number, what = key
            self._refuse(self.rows[number], f"{what}: {told(error)}", error)

        clock = clock_of(self.device, cold=self.nbytes < LARGE)
        for (number, what), times in rounds(tasks, clock, self.args.repeats, self.args.seconds, failed).items():
            self.rows[number].times[what] = times
            self.rounds = max(self.rounds, len(times.wall))

    def record(self, **more: Any) -> dict[str, Any]:
        """Everything for the JSON file."""
        sizes = {"layers": self.layers, "bytes": self.nbytes, "rounds": self.rounds}
        return {"case": asdict(self.case), **sizes, "rows": [row.record() for row in self.rows], **more}


def measure(case: Case, args: argparse.Namespace, without: Sequence[str], say: Say) -> dict[str, Any]:
    """The record of one case, measured in this process."""
    start = time.perf_counter()
    measured = Measurement(case, args, without, say)
    outcome = {}
    try:
        measured.run()
        print(table(case, measured.record(), measured.rows), flush=True)
    except DeviceLost as error:
        outcome = {"failed": f"the device was lost at {str(error)!r}", "at": str(error)}
    except Exception as error:
        outcome = {"failed": told(error)}
    return measured.record(seconds=time.perf_counter() - start, **outcome)


def run_child(case: Case, args: argparse.Namespace, without: Sequence[str], seconds: float) -> dict[str, Any]:
    """The same from a process of its own; whatever becomes of it, a record comes back."""
    return apart(measure, (case, args, without), {"case": asdict(case), "rows": []}, seconds)
