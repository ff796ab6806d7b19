"""One model, all its providers: prepared, verified, measured for memory, and timed together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bssn_kernels.bench.measure import CpuClock, CudaClock, Samples, Times, interleaved
from bssn_kernels.bench.memory import CudaMemoryMeter, MemoryMeter
from bssn_kernels.bench.providers import Provider, Root, Subject
from bssn_kernels.bench.task import Task
from bssn_kernels.bench.verify import Errors, compare

CLONE = "clone"


@dataclass
class Row:
    """What is known of one provider and variant, or of what bounds them (no variant).

    Attributes:
        errors: against float64.
        tasks, times: by call: "forward", "both" (forward and backward), and what else was asked for.
        extra: by call: bytes at the peak beyond the results. kept: bytes that stay taken between calls.
        notes: what could not be found out besides the times.
        refused: why it was not timed: it failed, or computed wrong numbers.
        left_out: why it cannot run here, which is no failure.
    """

    provider: str
    variant: str = ""
    backend: str = ""
    graph: bool = False
    compiled: bool = False
    errors: Errors | None = None
    tasks: dict[str, Task] = field(default_factory=dict)
    times: dict[str, Times] = field(default_factory=dict)
    extra: dict[str, int] = field(default_factory=dict)
    kept: int | None = None
    launches: dict[str, dict] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    targets: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: str = ""
    left_out: str = ""

    @property
    def label(self) -> str:
        return f"{self.provider} {self.variant}".strip()

    def samples(self, what: str, clock: str = "wall") -> Samples | None:
        return getattr(self.times[what], clock) if what in self.times else None

    def median(self, what: str, clock: str = "wall") -> float | None:
        samples = self.samples(what, clock)
        return samples.median if samples else None

    def difference(self, clock: str) -> float | None:
        """Time of the backward as that of both less that of the forward."""
        both, forward = self.median("both", clock), self.median("forward", clock)
        return None if both is None or forward is None else both - forward

    def record(self) -> dict[str, Any]:
        """All of it for JSON, in seconds and bytes, without what is empty."""
        fields = {name: value for name, value in vars(self).items() if value and name not in ("tasks", "times")}
        return fields | {"times": {what: times.record() for what, times in self.times.items()}}


@dataclass
class Measured:
    """All rows of one subject."""

    workload: str
    layers: int
    nbytes: int
    rows: list[Row]

    def row(self, label: str) -> Row | None:
        """The row of "provider variant" that was timed, or None."""
        return next((row for row in self.rows if row.label == label and row.times), None)


class Session:
    """The rows of one subject.

    Args:
        meter: of memory; None measures none.
        clock: None takes the processor's.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        meter: MemoryMeter | CudaMemoryMeter | None = None,
        clock: CpuClock | CudaClock | None = None,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.subject, self.meter, self.clock, self.progress = subject, meter, clock, progress
        self.grads = subject.grads()
        self.rows: list[Row] = []

    def add_bound(self, name: str, tasks: Mapping[str, Task]) -> None:
        """A row of something that is no provider, timed in the same rounds."""
        self.rows.append(Row(name, tasks=dict(tasks)))
        if name == CLONE and self.meter and self.meter.FIRST_CALLS:
            self.take_memory(self.rows[-1])

    def add(self, provider: Provider, variant: str) -> None:
        """A provider's row; where it raises or its numbers are wrong the row says so and will have no times."""
        row = Row(provider.name, variant, provider.backend, provider.graph, provider.compiled)
        self.rows.append(row)
        if provider.variants is not None and variant not in provider.variants:
            raise ValueError(f"{provider.name} knows {provider.variants}, not {variant!r}")
        row.left_out = provider.left_out
        if row.left_out:
            return
        self.progress(f"{row.label}: comparing with float64")
        try:
            root = provider.make(self.subject, variant)
            row.tasks = provider.tasks(root, self.grads)
            if self.meter and self.meter.FIRST_CALLS and not (row.graph or row.compiled):
                self.take_memory(row)
            row.errors = compare(root, variant, self.grads, row.tasks["both"])
            row.refused = row.errors.refusal(self.subject.weights[0].dtype)
            if not row.refused:
                self.inspect(row, root)
        except Exception as error:
            self.refuse(row, told(error), error)
        if row.refused:
            row.tasks = {}

    def add_all(self, providers: Sequence[Provider], variants: Sequence[str]) -> None:
        for variant in variants:
            for provider in providers:
                if provider.variants is None or variant in provider.variants:
                    self.add(provider, variant)

    def time(self, repeats: int | None = None, budget_s: float = 10.0) -> list[Row]:
        """Time all tasks of all rows in interleaved rounds; a task that raises has its row refused."""
        tasks = {(number, what): task for number, row in enumerate(self.rows) for what, task in row.tasks.items()}

        def failed(key: tuple[int, str], error: Exception) -> None:
            self.refuse(self.rows[key[0]], f"{key[1]}: {told(error)}", error)

        settings = {"clock": self.clock, "repeats": repeats, "budget_s": budget_s}
        for (number, what), times in interleaved(tasks, **settings, progress=self.progress, failed=failed).items():
            if not self.rows[number].refused:
                self.rows[number].times[what] = times
        return self.rows

    def inspect(self, row: Row, root: Root) -> None:
        """What else there is to look at before the clock."""

    def refuse(self, row: Row, text: str, error: Exception) -> None:
        row.refused = row.refused or text
        row.times.clear()

    def take_memory(self, row: Row) -> None:
        """Peaks of "forward" and "both" less what the results themselves take."""
        timed = [row.tasks[what] for what in ("forward", "both") if what in row.tasks]
        if self.meter is None or (memory := self.meter.measure(timed)) is None:
            return
        results = sum(w.nbytes for w in self.subject.weights)
        gradients = sum({w.data_ptr(): w.nbytes for w in self.subject.weights}.values())
        for what, peak in zip(("forward", "both"), memory.peaks):
            row.extra[what] = peak - results - gradients * (what == "both")
        row.kept = memory.kept


def clone_task(subject: Subject) -> Task:
    """A fresh copy of all weights."""
    weights = [w.to(subject.device) for w in subject.weights]
    return Task(lambda: [w.clone() for w in weights])


def measure_subject(
    subject: Subject,
    providers: Sequence[Provider],
    variants: Sequence[str],
    *,
    repeats: int | None = None,
    budget_s: float = 10.0,
    **settings: Any,
) -> Measured:
    """Rows of the clone of all weights, then of every provider for every variant that it can do.

    ``settings`` are those of :class:`Session`.
    """
    session = Session(subject, **settings)
    session.add_bound(CLONE, {"forward": clone_task(subject)})
    session.add_all(providers, variants)
    return Measured(subject.name, len(subject.sites), subject.nbytes, session.time(repeats, budget_s))


def warm_up(providers: Sequence[Provider], variants: Sequence[str], device: torch.device | str = "cpu") -> None:
    """Run every provider on a small model: what a process does once, as loading code, is no memory of a workload."""
    layers = [nn.Conv2d(32, 64, 3), nn.Linear(256, 64), nn.ConvTranspose2d(32, 16, 3), nn.Embedding(64, 32)]
    subject = Subject("warm-up", nn.Sequential(*layers), device=device)
    eager = [p for p in providers if not (p.graph or p.compiled or p.left_out)]
    measure_subject(subject, eager, variants, meter=MemoryMeter(), repeats=1)


def told(error: BaseException) -> str:
    """An exception in one line that fits a table."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
