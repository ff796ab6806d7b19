"""Who normalizes on a device: torch's forms, the composition and ours, each eager, as a CUDA graph, or compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as spectral_norm_hook

from benchmarks.gpu import WARM_UPS
from benchmarks.gpu.cases import Case
from benchmarks.gpu.composed import Foreach
from bssn_kernels import backends
from bssn_kernels.bench import DTYPES
from bssn_kernels.bench.measure import Task
from bssn_kernels.bench.providers import Root, Subject, make_fused
from bssn_kernels.bench.session import tasks_of
from bssn_kernels.bench.workloads import WORKLOADS
from bssn_kernels.variants import variants


class OnDevice(Subject):
    """A Subject, which has to be built on the CPU, whose copies are on a device."""

    def __init__(self, name: str, model: nn.Module, device: torch.device, learnable_gain: bool = False) -> None:
        super().__init__(name, model, learnable_gain)
        self.device = device

    def copy(self) -> Root:
        return Root(copy.deepcopy(self.native).to(self.device), self.sites)


class Sources:
    """What providers are made from: the same weights under torch's parametrization and its hook, and gradients."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.workload = WORKLOADS[case.workload]
        self.subject = OnDevice(case.workload, self._build(), device, self.workload.learnable_gain)
        generator = torch.Generator(device).manual_seed(0)
        self.grads = [torch.empty_like(w, device=device).normal_(generator=generator) for w in self.subject.weights]

    def _build(self) -> nn.Module:
        model = self.workload.build(DTYPES[self.case.dtype])
        return model.to(memory_format=torch.channels_last) if self.case.channels_last else model

    @cached_property
    def hooked(self) -> OnDevice:
        model = self._build()
        for module in list(model.modules()):
            if isinstance(getattr(module, "weight", None), nn.Parameter):
                spectral_norm_hook(module)
        return OnDevice(self.case.workload, model, self.device)


@dataclass(frozen=True)
class Runner:
    """A root, the gradients of its results, and what is timed of it: "forward" and "both", with the backward."""

    root: nn.Module
    grads: list[Tensor]
    tasks: dict[str, Task]

    @classmethod
    def of(cls, root: nn.Module, grads: list[Tensor]) -> Runner:
        return cls(root, grads, dict(zip(("forward", "both"), tasks_of(root, grads))))

    @property
    def leaves(self) -> list[Tensor]:
        return [p for p in self.root.parameters() if p.requires_grad]

    def backward_task(self) -> Task:
        """The backward alone, again and again over one graph."""
        outs, leaves = self.tasks["forward"].run(), self.leaves
        return Task(lambda: torch.autograd.grad(outs, leaves, self.grads, retain_graph=True))


def captured(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """The same as replays of CUDA graphs, whose results, gradients too, stay where they are."""
    # Nodes of the autograd graph belong to the stream of their forward: all of them have to be the capture's.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            for task in tasks.values():
                task.run()
                task.reset()
    torch.cuda.synchronize()
    return {what: _capture(task, stream) for what, task in tasks.items()}


def _capture(task: Task, stream: torch.cuda.Stream) -> Task:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = task.run()

    kept = results, task  # the graph reads and writes the memory of all that the task holds

    def replay() -> object:
        graph.replay()
        return kept[0]

    return Task(replay)


class Compiled(nn.Module):
    """A root's forward under torch.compile."""

    def __init__(self, root: nn.Module, mode: str) -> None:
        super().__init__()
        import torch._dynamo as dynamo

        # Every root is one more compilation of one and the same forward, and none of them may fall back to eager.
        for name in ("recompile_limit", "cache_size_limit"):
            if hasattr(dynamo.config, name):
                setattr(dynamo.config, name, 64)
        self.compiled = torch.compile(root, mode=mode)

    def forward(self) -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled()


Make = Callable[[Sources, str], Runner]


@dataclass(frozen=True)
class Provider:
    """One way to normalize.

    Args:
        variants: what it can do; torch's forms know SN alone and are the baseline of all.
        backend: the name of ours, empty for others.
        graph, compiled: runs as a CUDA graph; under torch.compile.
    """

    name: str
    variants: tuple[str, ...]
    make: Make
    backend: str = ""
    graph: bool = False
    compiled: bool = False


def providers_of(device: torch.device, case: Case, asked: Sequence[str] | None = None) -> list[Provider]:
    """All that can run: torch's forms, the composition, and ours (``asked``, or those made for the device)."""

    def native(form: str) -> Make:
        return lambda s, variant: Runner.of((s.hooked if form == "hook" else s.subject).copy(), s.grads)

    def composed(s: Sources, variant: str) -> Runner:
        return Runner.of(Foreach(s.subject.copy(), variant), s.grads)

    def ours(backend: str) -> Make:
        return lambda s, variant: Runner.of(make_fused(backend, s.subject, variant), s.grads)

    def graphed(p: Provider) -> Provider:
        def make(s: Sources, variant: str) -> Runner:
            runner = p.make(s, variant)
            return Runner(runner.root, runner.grads, captured(runner.tasks))

        return Provider(f"{p.name} graph", p.variants, make, p.backend, graph=True)

    def compiled(p: Provider, mode: str) -> Provider:
        def make(s: Sources, variant: str) -> Runner:
            runner = p.make(s, variant)
            return Runner(runner.root, runner.grads, Runner.of(Compiled(runner.root, mode), runner.grads).tasks)

        return Provider(f"{p.name} {mode}", p.variants, make, compiled=True)

    natives = [Provider(form, ("sn",), native(form)) for form in ("parametrization", "hook")]
    mine = [Provider(b, tuple(variants()), ours(b), b) for b in asked or backends.natural(device.type)]
    found = [*natives, Provider("foreach", ("sn", "bssn"), composed)]
    if device.type == "cuda":
        found += map(graphed, natives)
        if case.compiled:
            found += [compiled(p, mode) for mode in ("default", "reduce-overhead") for p in natives]
    for p in mine:
        found += [p, graphed(p)] if device.type == "cuda" and p.backend != "reference" else [p]
    return found
