"""Time spectral normalization on a GPU: ours, torch's in all its forms, and the copies that nothing can beat.

    python benchmarks/gpu.py --json gpu.json

Every case (workload, dtype, memory format) runs in a process of its own, the most telling first, so that a kernel that
kills its device or never ends costs one case. What a provider computes is compared with float64 before it is timed. The
exit code is 1 if a provider or a case failed; missed targets are results, not failures.

``--device cpu`` runs the same code with the clock of the CPU, without graphs, compilation and counts, for tests.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as spectral_norm_hook

import bssn_kernels
from bssn_kernels import backends, functional
from bssn_kernels.bench import positive
from bssn_kernels.bench.host import floor_task
from bssn_kernels.bench.measure import Task, no_collection
from bssn_kernels.bench.providers import Root, Subject, make_fused
from bssn_kernels.bench.report import aligned, machine, wrapped
from bssn_kernels.bench.verify import TOLERANCE, TOLERANCES, norm, relative, worst
from bssn_kernels.bench.workloads import WORKLOADS, UsageError
from bssn_kernels.plan import LayerSpec, layer_rows
from bssn_kernels.variants import resolve_variant
from bssn_kernels.views import matrix

FORMAT = "bssn_kernels gpu 1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MB = 10**6
LARGE = 100 * MB
SCRATCH = 256 * MB
MIN_ROUNDS, MAX_ROUNDS = 5, 50
SECONDS = 6.0
WARM_UPS = 3
# Of a case, and of one provider's preparation; a provider that compiles takes minutes.
CASE_S, STEP_S, COMPILED_CASE_S, COMPILED_STEP_S = 150.0, 60.0, 400.0, 150.0
LEAST_S = 25.0  # a case is not begun with less
RETRIES = 4


@dataclass(frozen=True)
class Case:
    """What is measured together; ``compiled`` says whether torch.compile takes part."""

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


class OnDevice(Subject):
    """A Subject, which has to be built on the CPU, whose copies are on a device."""

    def __init__(self, name: str, model: nn.Module, learnable_gain: bool, device: torch.device) -> None:
        super().__init__(name, model, learnable_gain)
        self.device = device

    def copy(self) -> Root:
        return Root(copy.deepcopy(self.native).to(self.device), self.sites)


class Sources:
    """What providers are made from: the same weights under torch's parametrization and its hook, and gradients."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.workload = WORKLOADS[case.workload]
        self.subject = OnDevice(case.workload, self._build(), self.workload.learnable_gain, device)
        generator = torch.Generator(device).manual_seed(0)
        self.grads = [torch.empty_like(w, device=device).normal_(generator=generator) for w in self.subject.weights]

    def _build(self) -> nn.Module:
        model = self.workload.build(DTYPES[self.case.dtype])
        return model.to(memory_format=torch.channels_last) if self.case.channels_last else model

    @cached_property
    def hooked(self) -> OnDevice:
        """Under torch's old hook."""
        model = self._build()
        for module in list(model.modules()):
            if isinstance(getattr(module, "weight", None), nn.Parameter):
                spectral_norm_hook(module)
        return OnDevice(self.case.workload, model, False, self.device)


class Runner:
    """A root with what is timed of it. ``begin`` comes before every call."""

    def __init__(
        self, root: nn.Module, grads: Sequence[Tensor], call: Callable | None = None, begin: Callable = lambda: None
    ) -> None:
        self.root, self.grads, self.call, self.begin = root, list(grads), call or root, begin
        self.leaves = [p for p in root.parameters() if p.requires_grad]

    def forward(self) -> list[Tensor]:
        self.begin()
        return self.call()

    def both(self) -> list[Tensor]:
        """Forward, and the gradient of every weight."""
        outs = self.forward()
        torch.autograd.backward(outs, self.grads)
        return outs

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def tasks(self) -> dict[str, Task]:
        return {"forward": Task(self.forward), "both": Task(self.both, self.clear)}

    def backward_task(self) -> Task:
        """The backward alone, again and again over one graph."""
        outs = self.forward()
        return Task(lambda: torch.autograd.grad(outs, self.leaves, self.grads, retain_graph=True))


class GraphRunner(Runner):
    """Replays of CUDA graphs of a runner's calls, whose results stay where they are."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.root, runner.grads)
        # Nodes of the autograd graph belong to the stream of their forward: all of them have to be the capture's.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                runner.both()
                runner.clear()
            runner.forward()
        torch.cuda.synchronize()
        self.graphs: dict[str, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        for what in ("forward", "both"):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                outs = getattr(runner, what)()
            self.graphs[what] = graph, outs

    def forward(self) -> list[Tensor]:
        return self._replay("forward")

    def both(self) -> list[Tensor]:
        return self._replay("both")

    def _replay(self, what: str) -> list[Tensor]:
        graph, outs = self.graphs[what]
        graph.replay()
        return outs

    def clear(self) -> None:
        """The gradients are the graph's."""


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
    all_variants = tuple(bssn_kernels.variants())

    def native(form: str) -> Make:
        return lambda s, variant: Runner((s.hooked if form == "hook" else s.subject).copy(), s.grads)

    def composed(s: Sources, variant: str) -> Runner:
        return Runner(Foreach(s.subject.copy(), variant), s.grads)

    def ours(backend: str) -> Make:
        return lambda s, variant: Runner(make_fused(backend, s.subject, variant), s.grads)

    def graphed(make: Make) -> Make:
        return lambda s, variant: GraphRunner(make(s, variant))

    def compiled(make: Make, mode: str) -> Make:
        return lambda s, variant: compile_runner(make(s, variant), mode)

    found = [Provider(form, ("sn",), native(form)) for form in ("parametrization", "hook")]
    found.append(Provider("foreach", ("sn", "bssn"), composed))
    if device.type == "cuda":
        found += [Provider(f"{p.name} graph", p.variants, graphed(p.make), graph=True) for p in found[:2]]
        if case.compiled:
            for mode in ("default", "reduce-overhead"):
                found += [
                    Provider(f"{form} {mode}", ("sn",), compiled(native(form), mode), compiled=True)
                    for form in ("parametrization", "hook")
                ]
    for backend in asked or backends.natural(device.type):
        found.append(Provider(backend, all_variants, ours(backend), backend))
        if device.type == "cuda" and backend != "reference":
            found.append(Provider(f"{backend} graph", all_variants, graphed(ours(backend)), backend, graph=True))
    return found


def compile_runner(runner: Runner, mode: str) -> Runner:
    """A runner under torch.compile."""
    import torch._dynamo as dynamo

    # Every root is one more compilation of one and the same forward, and none of them may fall back to eager.
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(dynamo.config, name):
            setattr(dynamo.config, name, 64)
    call = torch.compile(runner.root, mode=mode)
    return Runner(runner.root, runner.grads, call, torch.compiler.cudagraph_mark_step_begin)


class Side:
    """One direction of a weight for a composition: its matrix is a view where the rows come first in memory."""

    def __init__(self, weight: Tensor, axis: int, order: str, share: float, u: Tensor, v: Tensor) -> None:
        in_memory = sorted(range(weight.ndim), key=lambda i: (-weight.stride(i), -weight.shape[i]))
        rest = [i for i in range(weight.ndim) if i != axis]
        self.axes = [axis, *(in_memory[1:] if in_memory[0] == axis else rest)]
        self.order, self.share = order, share
        self.shape = [weight.shape[i] for i in self.axes]
        self._to_memory = [rest.index(i) for i in self.axes[1:]]
        self._logical = [weight.shape[i] for i in rest]
        self.u = u.detach().clone()
        self.v = v.detach().view(self._logical).permute(self._to_memory).reshape(-1).clone()

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.permute(self.axes).reshape(self.shape[0], -1)

    def add_outer(self, weight: Tensor, u: Tensor, v: Tensor) -> None:
        """``weight += u v^T``."""
        target = weight.permute(self.axes)
        if target.is_contiguous():
            target.view(self.shape[0], -1).addr_(u, v)
        else:
            target.add_(torch.outer(u, v).view(self.shape))

    def logical(self, v: Tensor) -> Tensor:
        """A column vector in the order in which everybody else has it."""
        back = [self._to_memory.index(i) for i in range(len(self._to_memory))]
        return v.view(self.shape[1:]).permute(back).reshape(-1)


class Foreach(nn.Module):
    """The same arithmetic by torch's own operations, as few as we could make them.

    Vectors are kept in the order of memory, products are chained without a norm between, sigma is the last norm, and
    all that has a ``_foreach`` form takes all layers at once.
    """

    def __init__(self, root: Root, variant: str) -> None:
        super().__init__()
        self.sites, self.variant = root.sites, resolve_variant(variant)
        self.weights = nn.ParameterList(root.originals())
        self.eps = root.sites[0].eps
        self.layers: list[list[Side]] = []
        for site, weight, (u, v) in zip(root.sites, self.weights, root.vectors()):
            two = weight.ndim > 2 and self.variant.into != 0
            shares = (self.variant.out, self.variant.into) if two else (self.variant.out + self.variant.into,)
            sides = [Side(weight, site.axis, "uv", shares[0], u, v)]
            if two:
                m = matrix(weight.detach(), 1 - site.axis)
                u, v = (nn.functional.normalize(torch.randn_like(x), dim=0) for x in (m[:, 0], m[0]))
                sides.append(Side(weight, 1 - site.axis, "vu", shares[1], u, v))
            self.layers.append(sides)
        self.sides = [(k, side) for k, sides in enumerate(self.layers) for side in sides]

    def originals(self) -> list[Tensor]:
        return list(self.weights)

    def vectors(self) -> list[list[Tensor]]:
        return [[x for side in sides for x in (side.u, side.logical(side.v))] for sides in self.layers]

    def forward(self) -> list[Tensor]:
        return list(Composition.apply(self, *self.weights))


class Composition(torch.autograd.Function):
    """Forward and backward of :class:`Foreach`."""

    @staticmethod
    def forward(ctx, module: Foreach, *weights: Tensor) -> tuple[Tensor, ...]:
        firsts, seconds = [], []
        for k, side in module.sides:
            m = side.matrix(weights[k])
            by_rows = side.order == "uv"
            firsts.append(torch.mv(m, side.v) if by_rows else torch.mv(m.t(), side.u))
            seconds.append(torch.mv(m.t(), firsts[-1]) if by_rows else torch.mv(m, firsts[-1]))
        first_norms, second_norms = torch._foreach_norm(firsts), torch._foreach_norm(seconds)
        sigmas = torch.stack(second_norms) / torch.stack(first_norms)
        norms = torch._foreach_clamp_min([*first_norms, *second_norms], module.eps)
        new = torch._foreach_div([*firsts, *seconds], norms)
        n = len(module.sides)
        stored = [(side.u, side.v) if side.order == "uv" else (side.v, side.u) for _, side in module.sides]
        torch._foreach_copy_([x for x, _ in stored] + [y for _, y in stored], new)
        means = [torch.zeros_like(sigmas[0])] * len(weights)
        for (k, side), s in zip(module.sides, sigmas.unbind()):
            means[k] = means[k] + side.share * s
        mean = torch.stack(means)
        if module.variant.floor:
            mean = mean.clamp_min(module.variant.floor)
        multipliers = module.variant.gain / mean
        ctx.module, ctx.weights, ctx.multipliers, ctx.mean = module, weights, multipliers, mean
        ctx.pairs = [
            (new[i], new[n + i]) if side.order == "uv" else (new[n + i], new[i])
            for i, (_, side) in enumerate(module.sides)
        ]
        return tuple(torch._foreach_mul(weights, list(multipliers.unbind())))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        module = ctx.module
        out = [sides[0] for sides in module.layers]
        inner = [torch.dot(s.matrix(g).flatten(), s.matrix(w).flatten()) for s, g, w in zip(out, grads, ctx.weights)]
        slopes = (torch.stack(inner) * (-module.variant.gain) / ctx.mean.square()).unbind()
        grad_weights = torch._foreach_mul(grads, list(ctx.multipliers.unbind()))
        scaled = torch._foreach_mul([u for u, _ in ctx.pairs], [slopes[k] * side.share for k, side in module.sides])
        for (k, side), u, (_, v) in zip(module.sides, scaled, ctx.pairs):
            side.add_outer(grad_weights[k], u, v)
        return (None, *grad_weights)


class CpuClock:
    """The processor's clock, under which a call's time, its device time and its host time are one."""

    def wall(self, task: Task) -> tuple[float, float]:
        start = time.perf_counter()
        result = task.run()
        seconds = time.perf_counter() - start
        del result
        task.reset()
        return seconds, seconds

    def device(self, task: Task) -> tuple[float, bool]:
        return self.wall(task)[0], True


class CudaClock:
    """CUDA events. ``cold``: the L2 cache is overwritten before every call."""

    LONGEST = 200_000_000  # cycles, about 0.1 s

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
        cycles, key = self.cycles.get(id(task), 400_000), id(task)
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
                self.cycles[key] = cycles
                return start.elapsed_time(end) / 1e3, ahead
            cycles *= 4


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
        clocks = {clock: of_samples(getattr(self, clock)) for clock in ("wall", "host", "device")}
        return clocks | {"behind": self.behind}


def of_samples(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, 10 % and 90 % quantiles, and the samples."""
    low = high = seconds[0]
    if len(seconds) > 1:
        deciles = statistics.quantiles(seconds, n=10, method="inclusive")
        low, high = deciles[0], deciles[-1]
    samples = [float(f"{s:.5g}") for s in seconds]
    return {"median": statistics.median(seconds), "p10": low, "p90": high, "samples": samples}


@dataclass
class Row:
    """What is known of one provider and variant, or of a copy (no variant).

    Attributes:
        errors: against float64, see :func:`errors_of`.
        times: by call: "forward", "both" (forward and backward), "backward" (alone, over a kept graph).
        launches: by call: kernels, memory operations and their names.
        extra: by call: bytes at the peak beyond the results.
        traffic: bytes that the plan counts, by call and phase.
        ratios, targets: see :func:`ratios_of` and :func:`targets_of`.
        refused: why it was not timed.
    """

    provider: str
    variant: str = ""
    backend: str = ""
    graph: bool = False
    compiled: bool = False
    errors: dict[str, float] = field(default_factory=dict)
    times: dict[str, Times] = field(default_factory=dict)
    launches: dict[str, dict] = field(default_factory=dict)
    extra: dict[str, int] = field(default_factory=dict)
    traffic: dict[str, dict[str, int]] = field(default_factory=dict)
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
        fields = {name: value for name, value in vars(self).items() if name != "times"}
        return fields | {"times": {what: times.record() for what, times in self.times.items() if times.wall}}


class DeviceLost(Exception):
    """The device answers no more, since the provider that the message names."""


def alive(device: torch.device) -> bool:
    try:
        torch.ones(1, device=device).add_(1)
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def specs_of(root: nn.Module, variant: str, weights: Sequence[Tensor], gain: bool) -> list[LayerSpec]:
    """How a root's weights, or tensors that look like them, are normalized."""
    numbers = resolve_variant(variant)
    return [
        LayerSpec.of(w, name=s.name, axis=s.axis, variant=numbers, semantics=s.semantics, eps=s.eps, gain=gain)
        for s, w in zip(root.sites, weights)
    ]


def gains_of(root: nn.Module) -> list[nn.Parameter]:
    """Learnable gains, in the order of the layers."""
    return [p for name, p in root.named_parameters() if name.split(".")[-1] == "_gain"]


def errors_of(runner: Runner, variant: str) -> dict[str, float]:
    """Run forward and backward once and compare with the reference backend in float64.

    Returns:
        The largest relative error (Frobenius) of a layer's normalized weight; of a gradient, against the norm of m G,
        since it can be small by cancellation; of a sigma and of the gradient of a gain, where there is one.
    """
    root = runner.root
    weights, gains = root.originals(), gains_of(root)
    vectors = [x.detach().double().clone() for of_layer in root.vectors() for x in of_layer]
    runner.clear()
    outs = [out.detach() for out in runner.both()]

    wide = [w.detach().double().requires_grad_() for w in weights]
    wide_gains = [g.detach().double().requires_grad_() for g in gains]
    grads = [g.double() for g in runner.grads]
    plan = functional.make_plan(specs_of(root, variant, wide, bool(gains)), "reference")
    iterations = [site.n_power_iterations for site in root.sites]
    truth = functional.spectral_normalize(wide, vectors, plan, iterations, gains=wide_gains)
    true_grads = torch.autograd.grad(truth.weights, [*wide, *wide_gains], grads)

    names = [site.name for site in root.sites]
    scales = [norm(out) / norm(w) for out, w in zip(truth.weights, wide)]
    found = {
        "weight": [relative(norm(out - t), norm(t)) for out, t in zip(outs, truth.weights)],
        "grad": [relative(norm(grad_of(w) - t), m * norm(g)) for w, t, m, g in zip(weights, true_grads, scales, grads)],
    }
    if gains:
        found["gain"] = [
            relative(norm(grad_of(gain).flatten() - t.flatten()), norm(out) * norm(g))
            for gain, t, out, g in zip(gains, true_grads[len(wide) :], truth.weights, grads)
        ]
    if (group := bssn_kernels.group_of(root)) is not None:
        sigmas = list(group.sigmas().values())
        found["sigma"] = [relative(abs(float(s) - float(t)), float(t)) for s, t in zip(sigmas, truth.sigmas)]
        if len(sigmas) != len(names):
            raise ValueError(f"expected {len(names)} sigmas, got {len(sigmas)}")
    runner.clear()
    return {what: worst(list(zip(errors, names)))[0] for what, errors in found.items()}


def grad_of(leaf: Tensor) -> Tensor:
    return torch.full_like(leaf, float("nan")) if leaf.grad is None else leaf.grad


def refusal(errors: Mapping[str, float], dtype: torch.dtype) -> str:
    """Why these numbers are wrong, or nothing. NaN is wrong."""
    limit = TOLERANCES.get(dtype, TOLERANCE)
    wrong = [f"{what} off by {error:.1e}" for what, error in errors.items() if not error <= limit]
    return f"wrong numbers: {', '.join(wrong)} (limit {limit:.0e})" if wrong else ""


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
    memory = [name for name in on_device if name.startswith(("Memcpy", "Memset"))]
    names = {name[:160]: n for name, n in Counter(on_device).most_common()}
    return {"kernels": len(on_device) - len(memory), "memory": len(memory), "names": names}


def extra_bytes(task: Task, leaves: Sequence[Tensor]) -> int:
    """Bytes that the allocator has given out at the peak of one call, beyond its results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outs = task.run()
    torch.cuda.synchronize()
    results = sum(out.nbytes for out in outs) + sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    peak = torch.cuda.max_memory_allocated() - before
    del outs
    task.reset()
    return peak - results


def counted_bytes(root: nn.Module, variant: str) -> dict[str, dict[str, int]]:
    """What the Triton backend's schedules count, by call and phase."""
    from bssn_kernels.backends._schedule import BackwardSchedule, ForwardSchedule

    weights = root.originals()
    plan = functional.make_plan(specs_of(root, variant, weights, bool(gains_of(root))), "reference")
    rows, itemsize = layer_rows(plan.tables[0]), weights[0].element_size()
    iterations = [site.n_power_iterations for site in root.sites]
    return {
        "forward": ForwardSchedule(rows, iterations, itemsize).traffic,
        "backward": BackwardSchedule(rows, range(len(rows)), itemsize).traffic,
    }


class Measurement:
    """All rows of one case.

    Args:
        note: called with what begins, and the seconds that it may take.
        without: labels of rows to leave out.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        *,
        variants: Sequence[str] = ("sn", "bssn"),
        asked: Sequence[str] | None = None,
        only: Sequence[str] = (),
        without: Sequence[str] = (),
        repeats: int | None = None,
        budget_s: float = SECONDS,
        note: Callable[[str, float], None] = lambda text, seconds: None,
    ) -> None:
        self.case, self.device, self.note = case, device, note
        self.variants, self.asked, self.only, self.without = variants, asked, only, without
        self.repeats, self.budget_s = repeats, budget_s
        self.rows: list[Row] = []
        self.tasks: dict[tuple[int, str], Task] = {}
        self.kept: list[object] = []
        self.rounds = 0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def run(self) -> list[Row]:
        """Prepare, verify and time all rows.

        Raises:
            DeviceLost: nothing can be measured any more.
        """
        self.note("building", STEP_S)
        sources = Sources(self.case, self.device)
        if self.cuda:
            launches_of(Task(lambda: torch.ones(1, device=self.device)))  # the profiler's first time is not like others
        self.layers, self.nbytes = len(sources.subject.sites), sources.subject.nbytes
        self._prepare_copies(sources)
        providers = providers_of(self.device, self.case, self.asked)
        for variant in self.variants:
            for provider in providers:
                wanted = not self.only or provider.name in self.only
                if variant in provider.variants and wanted and f"{provider.name} {variant}" not in self.without:
                    self._prepare(provider, variant, sources)
        self._time()
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size if self.cuda else None
        largest = max(w.nbytes for w in sources.subject.weights)
        for row in self.rows:
            row.ratios = ratios_of(row, self.rows)
            row.targets = targets_of(
                row, self.rows, self.case.workload, self.nbytes, fits_l2=l2 is not None and largest <= l2,
                exact=self.case.dtype == "float32",
            )  # fmt: skip
        return self.rows

    def _prepare_copies(self, sources: Sources) -> None:
        root = sources.subject.copy()
        weights = [w.detach() for w in root.originals()]
        targets = [torch.empty_like(w) for w in weights]
        flat = torch.cat([w.flatten() for w in weights])
        grad, out = torch.randn_like(flat), torch.empty_like(flat)
        copies = {
            ("copy", "forward"): Task(lambda: torch._foreach_copy_(targets, weights)),
            ("three_stream", "backward"): Task(lambda: torch.add(grad, flat, out=out)),
            ("floor", "forward"): floor_task(root),
        }
        for (name, what), task in copies.items():
            self.rows.append(Row(name))
            self.tasks[len(self.rows) - 1, what] = task

    def _prepare(self, provider: Provider, variant: str, sources: Sources) -> None:
        row = Row(provider.name, variant, provider.backend, provider.graph, provider.compiled)
        self.rows.append(row)
        number = len(self.rows) - 1
        self.note(row.label, COMPILED_STEP_S if provider.compiled else STEP_S)
        try:
            runner = provider.make(sources, variant)
            row.errors = errors_of(runner, variant)
            row.refused = refusal(row.errors, DTYPES[self.case.dtype])
            if row.refused:
                return
            if provider.backend == "triton":
                self._count_traffic(row, runner, variant)
            tasks = runner.tasks()
            for _ in range(WARM_UPS):
                for task in tasks.values():
                    task.run()
                    task.reset()
            if not (provider.graph or provider.compiled):
                self._add_backward(row, runner, tasks)
            if self.cuda:
                self._inspect(row, runner, tasks)
        except Exception as error:
            row.refused = told(error)
            if not alive(self.device):
                raise DeviceLost(row.label) from error
            return
        self.kept.append(runner)
        self.tasks |= {(number, what): task for what, task in tasks.items()}

    def _count_traffic(self, row: Row, runner: Runner, variant: str) -> None:
        """The counts serve the eye: where they fail, the times do not."""
        try:
            row.traffic = counted_bytes(runner.root, variant)
        except Exception as error:
            row.notes.append(f"traffic: {told(error)}")

    def _add_backward(self, row: Row, runner: Runner, tasks: dict[str, Task]) -> None:
        try:
            task = runner.backward_task()
            task.run()
            task.run()
            tasks["backward"] = task
        except Exception as error:
            if not alive(self.device):
                raise
            row.notes.append(f"backward alone: {told(error)}")

    def _inspect(self, row: Row, runner: Runner, tasks: Mapping[str, Task]) -> None:
        """Launches and memory, which only describe: what fails here is a note."""
        for what, task in tasks.items():
            try:
                row.launches[what] = launches_of(task)
                if what != "backward" and not (row.graph or row.compiled):  # their memory is set aside beforehand
                    row.extra[what] = extra_bytes(task, runner.leaves)
            except Exception as error:
                if not alive(self.device):
                    raise
                row.notes.append(f"{what}: {told(error)}")

    def _time(self) -> None:
        """Rounds over all tasks, each in another order, so that a slow moment of the machine hits all alike."""
        self.note("rounds", 120 + 4 * self.budget_s)
        clock = CudaClock(self.device, cold=self.nbytes < LARGE) if self.cuda else CpuClock()
        for number, what in self.tasks:
            self.rows[number].times[what] = Times()
        order = list(self.tasks)
        self._round(order, clock, None)
        start = time.perf_counter()
        self._round(order, clock, None)
        cost = time.perf_counter() - start
        self.rounds = self.repeats or min(max(int(self.budget_s / max(cost, 1e-9)), MIN_ROUNDS), MAX_ROUNDS)
        shuffle = random.Random(0).shuffle
        with no_collection():
            for i in range(self.rounds):
                shuffle(order)
                self._round(order, clock, self.rows)
                if i % 10 == 9:
                    gc.collect()

    def _round(self, order: Sequence[tuple[int, str]], clock: CpuClock | CudaClock, rows: list[Row] | None) -> None:
        """One sample of every task; without rows it only warms up."""
        for number, what in order:
            row, task = self.rows[number], self.tasks[number, what]
            if row.refused:
                continue
            try:
                wall, host = clock.wall(task)
                device, ahead = clock.device(task)
            except Exception as error:
                row.refused = f"{what}: {told(error)}"
                if not alive(self.device):
                    raise DeviceLost(row.label) from error
                continue
            if rows is not None:
                times = row.times[what]
                times.wall.append(wall)
                times.host.append(host)
                times.device.append(device)
                times.behind += not ahead

    def record(self, **more: Any) -> dict[str, Any]:
        """Everything for the JSON file."""
        return {
            "case": asdict(self.case),
            "layers": getattr(self, "layers", None),
            "bytes": getattr(self, "nbytes", None),
            "rounds": self.rounds,
            "rows": [row.record() for row in self.rows],
            **more,
        }


def told(error: BaseException) -> str:
    """An exception in one line that fits a table."""
    text = " ".join(str(error).split())
    return f"failed: {type(error).__name__}: {text[:300]}"


def find_row(rows: Sequence[Row], provider: str, variant: str = "") -> Row | None:
    return next((r for r in rows if (r.provider, r.variant) == (provider, variant) and not r.refused), None)


def over(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def ratios_of(row: Row, rows: Sequence[Row]) -> dict[str, float]:
    """What a row's times are in units of others; only what was measured.

    ``*_over_copy`` and ``*_over_three_stream`` are device times (backward: both less forward; backward_alone: over a
    kept graph). ``share_*``: bytes that must move (a read and a write; two reads and a write) over the time, in units
    of the copy's bandwidth. ``counted_share_forward``: the same with all bytes that the plan counts. ``native_over_*``:
    wall time of torch's parametrization, SN, over the row's. ``host_over_floor``: host time of the forward.
    """
    copy_row, three, floor, native = (
        find_row(rows, "copy"), find_row(rows, "three_stream"), find_row(rows, "floor"),
        find_row(rows, "parametrization", "sn"),
    )  # fmt: skip
    if not row.variant or row.refused:
        return {}

    def of(other: Row | None, what: str, clock: str) -> float | None:
        return other.median(what, clock) if other else None

    copied = of(copy_row, "forward", "device")
    forward, backward = row.median("forward", "device"), row.difference("device")
    counted = {what: sum(phases.values()) for what, phases in row.traffic.items()}
    least = sum(phases["written"] for what, phases in row.traffic.items() if what == "forward")
    found = {
        "forward_over_copy": over(forward, copied),
        "backward_over_three_stream": over(backward, of(three, "backward", "device")),
        "backward_alone_over_three_stream": over(row.median("backward", "device"), of(three, "backward", "device")),
        "share_forward": over(copied, forward),
        "share_backward": over(copied and 1.5 * copied, backward),
        "native_over_forward": over(of(native, "forward", "wall"), row.median("forward", "wall")),
        "native_over_both": over(of(native, "both", "wall"), row.median("both", "wall")),
        "host_over_floor": over(row.median("forward", "host"), of(floor, "forward", "host")),
    }
    if counted and least and forward and copied:
        found["counted_share_forward"] = counted["forward"] / (2 * least) * copied / forward
    return {name: value for name, value in found.items() if value is not None}


# DESIGN section 4. Forward over a copy: Triton's limits were set by workload, CUDA's by whether the largest layer fits
# the L2 cache.
TRITON_FORWARD = {"vit_b": 1.25, "paper_resnet": 1.4, "biggan128": 1.5}
BACKWARD = {"triton": 1.3, "cuda": 1.2}
HEADLINES = ("biggan128", "sngan32")


def targets_of(
    row: Row, rows: Sequence[Row], workload: str, nbytes: int, *, fits_l2: bool = False, exact: bool = True
) -> list[dict]:
    """The design's targets for one of our rows, each with what was measured and whether it is met.

    Args:
        fits_l2: the largest layer fits the L2 cache.
        exact: float32 weights, which have a target for errors.
    """
    if row.backend in ("", "reference") or row.refused:
        return []
    found: list[dict] = []

    def most(name: str, value: float | None, limit: float | None) -> None:
        if value is not None and limit is not None:
            found.append({"target": name, "value": value, "limit": limit, "met": value <= limit})

    def least(name: str, value: float | None, limit: float) -> None:
        if value is not None:
            found.append({"target": name, "value": value, "limit": limit, "at_least": True, "met": value >= limit})

    if nbytes >= LARGE:
        limit = {"triton": TRITON_FORWARD.get(workload), "cuda": 1.2 if fits_l2 else 1.3}.get(row.backend)
        most("forward / copy", row.ratios.get("forward_over_copy"), limit)
        most("backward / three-stream", row.ratios.get("backward_over_three_stream"), BACKWARD.get(row.backend))
    if not row.graph:
        launched = {what: counts["kernels"] + counts["memory"] for what, counts in row.launches.items()}
        most("launches, forward", launched.get("forward"), 2)
        most("launches, backward", launched.get("backward"), 1)
        most("host time / floor", row.ratios.get("host_over_floor"), 1.5)
        for what, words in (("forward", "forward"), ("both", "forward + backward")):
            extra = row.extra.get(what)
            most(f"extra memory, {words}, MB", extra and extra / MB, max(0.02 * nbytes, 8 * MB) / MB)
    if exact:
        for what, limit in (("weight", 1e-5), ("grad", 1e-5), ("sigma", 1e-6)):
            most(f"error, {what}", row.errors.get(what), limit)
    if workload in HEADLINES:
        ours = row.median("both", "wall")
        natives = [r for r in rows if r.variant == "sn" and not r.refused and not r.backend and r.provider != "foreach"]
        graphs = [t for r in natives if r.graph and (t := r.median("both", "wall")) is not None]
        compiled = [t for r in natives if r.compiled and (t := r.median("both", "wall")) is not None]
        if not row.graph:
            least("eager parametrization / ours", row.ratios.get("native_over_both"), 10)
        elif workload == "sngan32" and graphs:
            least("native graph / our graph", over(min(graphs), ours), 10)
        if graphs and compiled:
            least("best of native graph and compile / ours", over(min(graphs + compiled), ours), 2)
    return found


HEADER = (
    *("variant", "provider", "f ms", "10-90 %", "f/copy", "b ms", "b/3s", "b alone", "f+b ms", "wall f", "wall f+b"),
    *("native/f", "native/f+b", "host f us", "host f+b", "launches f", "b", "f+b", "extra f", "extra f+b"),
)


def table(measured: Measurement) -> str:
    """All rows of a case, what missed and met the targets, and what is to be said besides."""
    case = measured.case
    lines: list[tuple[str, ...] | str] = [HEADER]
    above = ""
    for row in measured.rows:
        if above != row.variant:
            lines.append("")
            above = row.variant
        lines.append(cells(row))
    size = f"{measured.layers} layers, {measured.nbytes / MB:.1f} MB, {measured.rounds} rounds"
    said = [f"{row.label}: {note}" for row in measured.rows for note in row.notes]
    below = [*target_lines(measured.rows), *said, ""]
    return "\n".join([f"{case.name}: {size}", "", *aligned(lines, slice(2, None)), "", *below])


def cells(row: Row) -> tuple[str, ...]:
    head = (row.variant.upper() or "-", row.provider)
    if row.refused:
        return (*head, row.refused)
    forward, ratios = row.times.get("forward"), row.ratios
    spread = of_samples(forward.device) if forward and forward.device else None

    def launched(what: str) -> str:
        counts = row.launches.get(what, {})
        return "+".join(str(counts[kind]) for kind in ("kernels", "memory") if counts.get(kind))

    def extra(what: str) -> str:
        return f"{row.extra[what] / MB:.1f}" if what in row.extra else ""

    backward = row.median("backward", "device") if not row.variant else row.difference("device")
    return (
        *head,
        milliseconds(row, "forward", "device"),
        f"{spread['p10'] * 1e3:.3f}-{spread['p90'] * 1e3:.3f}" if spread else "",
        times(ratios.get("forward_over_copy")),
        "" if backward is None else f"{backward * 1e3:.3f}",
        times(ratios.get("backward_over_three_stream")),
        milliseconds(row, "backward", "device") if row.variant else "",
        milliseconds(row, "both", "device"),
        milliseconds(row, "forward", "wall"),
        milliseconds(row, "both", "wall"),
        times(ratios.get("native_over_forward")),
        times(ratios.get("native_over_both")),
        microseconds(row, "forward"),
        microseconds(row, "both"),
        launched("forward"),
        launched("backward"),
        launched("both"),
        extra("forward"),
        extra("both"),
    )


def milliseconds(row: Row, what: str, clock: str) -> str:
    value = row.median(what, clock)
    if value is None:
        return ""
    behind = clock == "device" and row.times[what].behind
    return f"{'~' if behind else ''}{value * 1e3:.3f}"


def microseconds(row: Row, what: str) -> str:
    value = row.median(what, "host")
    return "" if value is None else f"{value * 1e6:.0f}"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def target_lines(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        for target in row.targets:
            sign = ">=" if target.get("at_least") else "<="
            numbers = f"{target['value']:>10.3g} {sign} {target['limit']:<8.3g}"
            lines.append(f"  {row.label:<22}{target['target']:<42}{numbers}{'met' if target['met'] else 'MISSED'}")
    return ["targets:", *lines] if lines else []


LEGEND = (
    "f: one forward of a root that reads every normalized weight; f+b: and the gradient of every weight, from given"
    " ones. Medians over interleaved rounds, of the device's time (the host has issued everything before the device"
    " begins; ~ where it could not). wall: from an idle device to the end, host time included. b: f+b less f; b alone:"
    " autograd.grad again and again over one kept graph. Sets under 100 MB find an L2 cache full of other data.",
    "copy: one _foreach_copy_ of all weights; three_stream: torch.add(G, W, out=dW) over as many numbers. native/: wall"
    " time of torch's parametrization, SN, over the row's. host: until the call returns. floor: n empty_like, an empty"
    " autograd.Function, one _foreach_copy_ of the vectors. launches: kernels + copies and fills of memory, by the"
    " profiler. extra: MB at the peak beyond the results; what graphs set aside is not seen.",
)


def summary(records: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """One line per row of ours, every failure, and whether there was none."""
    ratios = ("forward_over_copy", "backward_over_three_stream", "native_over_both")
    lines = [("case", "provider", "f ms", "f/copy", "b/3s", "native/f+b", "targets met", "missed")]
    failures = []
    for record in records:
        name = Case(**record["case"]).name
        if record.get("failed"):
            failures.append(f"{name}: {record['failed']}")
        for row in record.get("rows", ()):
            label, targets = f"{row['provider']} {row['variant']}", row["targets"]
            if row["refused"]:
                failures.append(f"{name}: {label}: {row['refused']}")
            elif row["backend"] not in ("", "reference") and "forward" in row["times"]:
                ms = f"{row['times']['forward']['device']['median'] * 1e3:.3f}"
                missed = [target["target"] for target in targets if not target["met"]]
                met = f"{len(targets) - len(missed)} of {len(targets)}"
                lines.append((name, label, ms, *(times(row["ratios"].get(r)) for r in ratios), met, "; ".join(missed)))
    text = ["summary", *aligned(lines, slice(2, 7))]
    text += ["", "failed:", *(f"  {line}" for line in failures)] if failures else ["", "nothing failed"]
    return "\n".join(text), not failures


def gpu_machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    found = machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "processors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "capability": [properties.major, properties.minor],
            "driver": driver(),
            "cuda": torch.version.cuda,
        }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    return found


def driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else None


def dump(file: Path | None, head: Mapping[str, Any], name: str, records: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object, each record on a line of its own; a file that is read while it is written is never half."""
    if file is None:
        return
    lines = ",\n".join(json.dumps(record) for record in records)
    text = f"{json.dumps(head)[:-1]}, {json.dumps(name)}: [\n{lines}\n]}}\n"
    part = file.with_name(file.name + ".part")
    part.write_text(text)
    part.replace(file)


def watched(text: str, seconds: float, say: Callable[[str], None], armed: bool) -> None:
    """Say what begins; where armed, end this process if it takes longer: a kernel that hangs cannot be interrupted."""
    say(text)
    if armed:
        faulthandler.dump_traceback_later(seconds, exit=True)


def measure(case: Case, args: argparse.Namespace, write: Callable[[dict], None]) -> dict[str, Any]:
    """One case in this process. ``write`` gets what is known whenever something new begins."""
    start = time.perf_counter()

    def note(text: str, seconds: float) -> None:
        write(measured.record(at=text, failed=f"ended at {text!r}"))
        watched(f"{case.name}: {text}", seconds, progress, args.in_process)

    measured = Measurement(
        case,
        torch.device(args.device),
        variants=args.variant,
        asked=args.backend,
        only=args.provider,
        without=args.without,
        repeats=args.repeats,
        budget_s=args.seconds,
        note=note,
    )
    try:
        measured.run()
        outcome = {}
        print(table(measured), flush=True)
    except DeviceLost as error:
        outcome = {"failed": f"the device was lost at {str(error)!r}", "at": str(error)}
    except Exception as error:
        outcome = {"failed": told(error)}
    finally:
        if args.in_process:
            faulthandler.cancel_dump_traceback_later()
    record = measured.record(seconds=time.perf_counter() - start, **outcome)
    write(record)
    return record


def run_child(case: Case, args: argparse.Namespace, without: Sequence[str], seconds: float) -> dict[str, Any]:
    """One case in a process of its own; whatever becomes of it, a record comes back."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.json"
        command = [sys.executable, __file__, "--in-process", "--device", args.device, "--json", str(file)]
        command += ["--workload", case.workload, "--dtype", case.dtype, "--seconds", str(args.seconds)]
        command += ["--channels-last"] * case.channels_last + ["--compiled"] * case.compiled
        command += ["--repeats", str(args.repeats)] if args.repeats else []
        for name, values in (("variant", args.variant), ("backend", args.backend), ("provider", args.provider)):
            command += [f"--{name}", *values] if values else []
        command += [word for label in without for word in ("--without", label)]
        ended = end_of(command, seconds)
        try:
            (record,) = json.loads(file.read_text())["cases"]
        except (OSError, ValueError, KeyError):
            record = {"case": asdict(case), "rows": [], "failed": "nothing was written"}
    if record.get("failed") and ended:
        record["failed"] += f" ({ended})"
    return record


def end_of(command: Sequence[str], seconds: float) -> str:
    """Run a command and say how it ended, if not well."""
    try:
        code = subprocess.run(command, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    return f"exit status {code}" if code else ""


def supervise(
    cases: Sequence[Case], args: argparse.Namespace, write: Callable[[list], None], run: Callable = run_child
) -> list[dict[str, Any]]:
    """All cases, each in a child. A case that a provider broke is run again without that provider."""
    end = time.monotonic() + args.deadline
    records: list[dict[str, Any]] = []
    for case in cases:
        without, broken = list(args.without), []
        for _ in range(1 + RETRIES):
            left = end - time.monotonic()
            if left < LEAST_S:
                record = {"case": asdict(case), "rows": [], "failed": "no time was left"}
                break
            record = run(case, args, without, min(left, COMPILED_CASE_S if case.compiled else CASE_S))
            guilty = record.get("at", "")
            if not record.get("failed") or guilty in ("", "building", "rounds") or guilty in without:
                break
            # What became of it, in place of a row that the next try does not have.
            broken.append(Row(*guilty.rsplit(" ", 1), refused=record["failed"]).record())
            without.append(guilty)
        record["rows"] = [*record["rows"], *broken]
        records.append(record)
        write(records)
    return records


def cases_of(args: argparse.Namespace) -> list[Case]:
    """What was asked for, or all of CASES."""
    if not (args.workload or args.dtype or args.channels_last or args.compiled or args.quick):
        return list(CASES)
    return [
        Case(name, dtype, args.channels_last, args.compiled)
        for name in args.workload or WORKLOADS
        for dtype in args.dtype or ["float32"]
    ]


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--workload", nargs="+", choices=WORKLOADS, metavar="NAME", help="default: a list of telling cases")
    add("--variant", nargs="+", choices=bssn_kernels.variants(), metavar="NAME", default=["sn", "bssn"])
    add("--dtype", nargs="+", choices=DTYPES, metavar="NAME", help="of the weights")
    add("--channels-last", action="store_true", help="weights of convolutions in this memory format")
    add("--compiled", action="store_true", help="torch.compile takes part, which takes minutes")
    add("--backend", nargs="+", choices=backends.names(), metavar="NAME", help="of ours, default: made for the device")
    add("--provider", nargs="+", metavar="NAME", default=[], help="only these, by the name in the table")
    add("--without", action="append", metavar="LABEL", default=[], help="leave out a row, as in 'triton bssn'")
    add("--repeats", type=positive, metavar="N", help=f"timed rounds (default: {MIN_ROUNDS} to {MAX_ROUNDS})")
    add("--seconds", type=float, default=SECONDS, metavar="S", help="time for the rounds of a case")
    add("--deadline", type=float, default=3600.0, metavar="S", help="time for all cases; later ones are left out")
    add("--quick", action="store_true", help="three rounds of each workload")
    add("--json", type=Path, metavar="FILE", help="everything measured, raw samples included, kept up to date")
    add("--in-process", action="store_true", help="no process per case")
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats = args.repeats or 3
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: torch sees no CUDA device here (--device cpu runs the same code, for tests)", file=sys.stderr)
        return 2
    try:
        if args.json is not None and not args.json.parent.is_dir():
            raise UsageError(f"--json: no such folder: {args.json.parent}")
        for name in args.backend or ():
            backends.check_name(name)
    except (UsageError, RuntimeError) as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    asked = {name: value for name, value in vars(args).items() if name != "json"}
    head = {"format": FORMAT, "machine": gpu_machine(torch.device(args.device)), "settings": asked}

    def write(records: list) -> None:
        dump(args.json, head, "cases", records)

    cases = cases_of(args)
    if args.in_process or args.device == "cpu":
        records = []
        for case in cases:
            records.append(measure(case, args, lambda record: write([*records, record])))
    else:
        records = supervise(cases, args, write)
    text, well = summary(records)
    if not args.in_process:
        print("\n".join([*wrapped(LEGEND), "", text]))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
