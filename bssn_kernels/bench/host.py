"""Host time of a call: what remains when the layers are so small that arithmetic is nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bssn_kernels import functional
from bssn_kernels.bench.measure import Samples, interleaved
from bssn_kernels.bench.providers import Root, Subject, fused
from bssn_kernels.bench.report import aligned, wrapped
from bssn_kernels.bench.task import Task
from bssn_kernels.plan import LayerSpec

COUNTS = (8, 24, 64, 200)
WIDTH = 4
FLOOR = "floor"
HEADER = ("layers", "what", "us", "us/layer", "over floor")


class Nothing(torch.autograd.Function):
    """n tensors in, n new ones out, and nothing computed: the least that a differentiable call can do."""

    @staticmethod
    def forward(ctx, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(w) for w in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


@dataclass(frozen=True)
class HostRow:
    """Time of one kind of call with ``layers`` layers."""

    layers: int
    what: str
    samples: Samples
    floor: Samples

    @property
    def ratio(self) -> float:
        return self.samples.median / self.floor.median


def measure_host(
    backends: Sequence[str],
    counts: Sequence[int] = COUNTS,
    repeats: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[HostRow]:
    """For each number of layers: the floor, and per backend the functional call and the forward of a fused root.

    The floor is n ``empty_like``, an autograd.Function with n inputs and outputs that computes nothing, and one
    ``_foreach_copy_`` of 2n vectors.
    """
    rows = []
    for n in counts:
        subject = Subject(f"{n} layers", nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(n))))
        native = subject.copy()
        tasks = {FLOOR: floor_task(native)}
        for backend in backends:
            tasks[f"{backend}, functional"] = functional_task(native, backend)
            tasks[f"{backend}, root forward"] = Task(fused(backend).make(subject, "sn"))
        times = interleaved(
            tasks, repeats=repeats, budget_s=2.0, progress=lambda text, n=n: progress(f"host time, {n} layers: {text}")
        )
        rows += [HostRow(n, what, of_what.host, times[FLOOR].host) for what, of_what in times.items()]
    return rows


def floor_task(root: Root) -> Task:
    weights, stored = root.originals(), [v.clone() for of_layer in root.vectors() for v in of_layer]
    new = [v.clone() for v in stored]

    def run() -> object:
        outputs = Nothing.apply(*weights)
        torch._foreach_copy_(stored, new)
        return outputs

    return Task(run)


def functional_task(root: Root, backend: str) -> Task:
    weights, stored = root.originals(), [v.clone() for of_layer in root.vectors() for v in of_layer]
    plan = functional.make_plan([LayerSpec.of(w) for w in weights], backend)

    def run() -> object:
        result = functional.spectral_normalize(weights, stored, plan)
        torch._foreach_copy_(stored, result.vectors)
        return result

    return Task(run)


def host_table(rows: Sequence[HostRow]) -> str:
    """All rows as one text table with its legend."""
    lines: list[tuple[str, ...] | str] = [HEADER]
    above = 0
    for row in rows:
        new = row.layers != above
        if new and above:
            lines.append("")
        above = row.layers
        us = row.samples.median * 1e6
        numbers = (f"{us:.1f}", f"{us / row.layers:.2f}", f"{row.ratio:.2f}x")
        lines.append((str(row.layers) if new else "", row.what, *numbers))
    return "\n".join([*aligned(lines, slice(2, None)), "", *wrapped([LEGEND])])


LEGEND = (
    f"Forward of n layers of {WIDTH} x {WIDTH} weights. {FLOOR}: n empty_like, an autograd.Function with n inputs and"
    " outputs that computes nothing, one _foreach_copy_ of 2n vectors."
)


def host_record(rows: Sequence[HostRow]) -> list[dict]:
    """The rows for JSON, in seconds."""
    return [
        {"layers": row.layers, "what": row.what, "over_floor": row.ratio, **row.samples.record()} for row in rows
    ]
