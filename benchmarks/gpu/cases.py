"""What is measured together, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.clocks import Times
from bssn_kernels.bench.measure import Task


@dataclass(frozen=True)
class Case:
    """A set of weights; ``compiled`` says whether torch.compile takes part."""

    workload: str
    dtype: str = "float32"
    channels_last: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        words = [self.workload, self.dtype, "channels_last" if self.channels_last else "contiguous"]
        return ", ".join([*words, "with torch.compile"] if self.compiled else words)


# The most telling first: a run that ends early has measured these.
CASES = (
    *(Case(name) for name in ("biggan128", "sngan32", "vit_b", "paper_resnet")),
    Case("biggan128", channels_last=True),
    Case("biggan128", "bfloat16"),
    Case("sngan32", compiled=True),
    Case("biggan128", compiled=True),
    Case("paper_resnet", channels_last=True),
    *(Case(name) for name in ("paper_cnn", "stylegan_t", "dcgan_g", "biggan256")),
    Case("vit_b", "bfloat16"),
    Case("sngan32", channels_last=True),
)


@dataclass
class Row:
    """What is known of one provider and variant, or of a copy (no variant).

    Attributes:
        errors: against float64, see ``errors_of``.
        tasks, times: by call: "forward", "both" (forward and backward), "backward" (alone, over a kept graph).
        launches: by call: kernels, memory operations and their names.
        extra: by call: bytes at the peak beyond the results.
        ratios, targets: see ``ratios_of`` and ``targets_of``.
        refused: why it was not timed.
    """

    provider: str
    variant: str = ""
    backend: str = ""
    graph: bool = False
    compiled: bool = False
    errors: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    times: dict[str, Times] = field(default_factory=dict)
    launches: dict[str, dict] = field(default_factory=dict)
    extra: dict[str, int] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    targets: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: str = ""

    @property
    def label(self) -> str:
        return f"{self.provider} {self.variant}".strip()

    def median(self, what: str, clock: str) -> float | None:
        times = self.times.get(what)
        return times.median(clock) if times and times.wall else None

    def difference(self, clock: str) -> float | None:
        """Time of the backward as that of both less that of the forward."""
        both, forward = self.median("both", clock), self.median("forward", clock)
        return None if both is None or forward is None else both - forward

    def record(self) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self).items() if name not in ("tasks", "times")}
        return fields | {"times": {what: times.record() for what, times in self.times.items() if times.wall}}
