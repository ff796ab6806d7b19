"""What experiments are made of: how much of everything, and groups of weights with all that a call takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import MB
from bssn_kernels import functional
from bssn_kernels.backends._order import L2_SHARE
from bssn_kernels.bench.measure import clock_of, interleaved
from bssn_kernels.bench.session import told
from bssn_kernels.bench.task import Task
from bssn_kernels.bench.workloads import WORKLOADS
from bssn_kernels.variants import resolve_variant

Rows = Iterator[dict[str, Any]]  # a value that is a dict holds samples, which the table leaves out


@dataclass(frozen=True)
class Setting:
    """Where and how much; the defaults are those of a GPU.

    Attributes:
        samples: of each time. forwards: that must give the same bits. numel: numbers of a stream.
        counts: of layers. stages, whole_stages, programs, sums, shares: what is tried, the last two in microseconds and
            of L2.
    """

    device: torch.device = torch.device("cuda")
    backend: str = "triton"
    samples: int = 20
    forwards: int = 10_000
    numel: int = 350 * MB // 4
    workloads: tuple[str, ...] = ("biggan128", "paper_resnet", "vit_b", "sngan32")
    headline: str = "biggan128"
    stable: tuple[str, ...] = ("sngan32", "paper_resnet")
    counts: tuple[int, ...] = (1, 8, 24, 49, 100, 240, 500)
    stages: tuple[int, ...] = (2, 3, 4, 5, 6)
    whole_stages: tuple[int, ...] = (2, 3, 4)
    programs: tuple[int, ...] = (2, 3, 4)
    sums: tuple[int, ...] = (6, 10, 15, 20)
    shares: tuple[float, ...] = (0.4, L2_SHARE, 1.0)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def samples_of(self, tasks: Mapping[str, Task], which: str = "device", cold: bool = False) -> dict[str, dict]:
        """Seconds of all tasks by one of the clocks, in interleaved rounds."""
        times = interleaved(tasks, clock=clock_of(self.device, cold), repeats=self.samples)
        return {name: getattr(of_task, which).record() for name, of_task in times.items()}


class Group:
    """Weights of a workload with all that a functional call takes."""

    def __init__(self, setting: Setting, workload: str, variant: str, channels_last: bool = False) -> None:
        self.setting, self.variant = setting, variant
        layers, device = WORKLOADS[workload].layers, setting.device
        generator = torch.Generator(device).manual_seed(0)
        self.weights: list[Tensor] = []
        for layer in layers:
            last = channels_last and len(layer.shape) == 4
            memory_format = torch.channels_last if last else torch.contiguous_format
            w = torch.empty(layer.shape, device=device, memory_format=memory_format)
            self.weights.append(w.normal_(0, 0.02, generator=generator).requires_grad_())
        self.grads = [torch.empty_like(w).normal_(generator=generator) for w in self.weights]
        self.nbytes = sum(w.nbytes for w in self.weights)
        self.axes = [int(layer.kind == "deconv") for layer in layers]
        self.make_plan()
        self.vectors = [
            nn.functional.normalize(torch.empty(n, device=device).normal_(generator=generator), dim=0)
            for n in self.plan.sizes
        ]

    def make_plan(self) -> None:
        """A new one, for settings that a schedule is made with."""
        rule = {"variant": resolve_variant(self.variant), "axes": self.axes, "backend": self.setting.backend}
        self.plan = functional.plan_for(self.weights, **rule)

    def again(self) -> Group:
        """The same memory and plan, with leaves of its own."""
        group = copy(self)
        group.weights = [w.detach().requires_grad_() for w in self.weights]
        return group

    def call(self) -> functional.Normalized:
        return functional.spectral_normalize(self.weights, self.vectors, self.plan)

    @torch.no_grad()
    def forward(self) -> functional.Normalized:
        return self.call()

    def tasks(self) -> dict[str, Task]:
        """Forward, and backward over a kept graph."""
        outs = self.call().weights
        backward = Task(lambda: torch.autograd.grad(outs, self.weights, self.grads, retain_graph=True))
        return {"forward": Task(self.forward), "backward": backward}


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The columns of a row, or why there are none; not where the device is gone, which ends the experiment."""
    try:
        return run()
    except Exception as error:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {"failed": told(error)}
