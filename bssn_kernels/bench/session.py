"""One model, all its providers: prepared, verified, timed together, measured for memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bssn_kernels.bench.measure import MemoryMeter, Samples, Task, interleaved
from bssn_kernels.bench.providers import Provider, Root, Subject
from bssn_kernels.bench.verify import Errors, compare

CLONE = "clone"


@dataclass
class Row:
    """What is known of one provider and variant on one subject.

    Attributes:
        nbytes: of all weights.
        variant: empty for the clone.
        forward, both: times of a forward and of a forward with backward.
        extra_forward, extra_both: peak bytes beyond the results; None where not measured.
        kept: bytes that stay taken between calls.
        refused: why it was not timed.
    """

    workload: str
    layers: int
    nbytes: int
    variant: str
    provider: str
    errors: Errors | None = None
    forward: Samples | None = None
    both: Samples | None = None
    extra_forward: int | None = None
    extra_both: int | None = None
    kept: int | None = None
    refused: str = ""


def measure_subject(
    subject: Subject,
    providers: Sequence[Provider],
    variants: Sequence[str],
    *,
    meter: MemoryMeter,
    repeats: int | None = None,
    budget_s: float = 10.0,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Rows of the clone of all weights, then of every provider for every variant that it can do.

    A provider that raises or whose numbers are wrong gets a row that says so, and no times.
    """
    generator = torch.Generator().manual_seed(0)
    grads = [torch.empty_like(w).normal_(generator=generator) for w in subject.weights]
    rows: list[Row] = []
    tasks: dict[tuple[int, str], Task] = {}

    def new_row(variant: str, provider: str) -> Row:
        rows.append(Row(subject.name, len(subject.sites), subject.nbytes, variant, provider))
        return rows[-1]

    def take_memory(row: Row, of_row: Sequence[Task]) -> None:
        if (memory := meter.measure(of_row)) is not None:
            gradients = sum({w.data_ptr(): w.nbytes for w in subject.weights}.values())
            extra = [peak - subject.nbytes - i * gradients for i, peak in enumerate(memory.peaks)]
            row.extra_forward, row.extra_both = [*extra, None][:2]
            row.kept = memory.kept

    clone = new_row("", CLONE)
    tasks[id(clone), "forward"] = Task(lambda: [w.clone() for w in subject.weights])
    take_memory(clone, [tasks[id(clone), "forward"]])
    for variant in variants:
        for provider in providers:
            if provider.variants is not None and variant not in provider.variants:
                continue
            row = new_row(variant, provider.name)
            progress(f"{provider.name} {variant}: comparing with float64")
            try:
                root = provider.make(subject, variant)
                of_row = tasks_of(root, grads)
                take_memory(row, of_row)
                row.errors = compare(root, variant, grads)
                row.refused = row.errors.refusal(subject.weights[0].dtype)
            except Exception as error:
                row.refused = f"failed: {type(error).__name__}: {error}"
            if not row.refused:
                tasks[id(row), "forward"], tasks[id(row), "both"] = of_row

    times = interleaved(tasks, repeats=repeats, budget_s=budget_s, progress=progress)
    for row in rows:
        row.forward, row.both = times.get((id(row), "forward")), times.get((id(row), "both"))
    return rows


def warm_up(providers: Sequence[Provider], variants: Sequence[str]) -> None:
    """Run every provider on a small model: what a process does once, as loading code, is no memory of a workload."""
    layers = [nn.Conv2d(32, 64, 3), nn.Linear(256, 64), nn.ConvTranspose2d(32, 16, 3), nn.Embedding(64, 32)]
    subject = Subject("warm-up", nn.Sequential(*layers))
    measure_subject(subject, providers, variants, meter=MemoryMeter(), repeats=1)


def tasks_of(root: Root, grads: Sequence[Tensor]) -> tuple[Task, Task]:
    """Forward alone, and forward with backward from given gradients of every normalized weight."""
    parameters = list(root.parameters())

    def both() -> list[Tensor]:
        outputs = root()
        torch.autograd.backward(outputs, grads)
        return outputs

    return Task(root), Task(both, lambda: clear_grads(parameters))


def clear_grads(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
