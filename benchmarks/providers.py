"""Who normalizes: torch's forms, the compositions and ours, each eager, as a CUDA graph, or compiled."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as spectral_norm_hook

from benchmarks import WARM_UPS
from benchmarks.authors import Authors
from benchmarks.composed import Foreach
from benchmarks.workloads import Case
from bssn_kernels import backends
from bssn_kernels.bench import DTYPES
from bssn_kernels.bench.providers import Provider, Root, Subject, fused, make_native, strip, tasks_of
from bssn_kernels.bench.task import Task

TOO_ROUGH = "its gradient through the iteration is off by more than 5 % where all is computed in half precision"
NEEDS_CUDA = "CUDA graphs need a CUDA device"


def make_hook(subject: Subject, variant: str) -> Root:
    """torch's old hook on the same weights, whatever the form of the subject."""
    root = subject.copy()
    for site in root.sites:
        module = root.model.get_submodule(site.module)
        if site.form != "hook":
            strip(module, site)
            settings = {"n_power_iterations": site.n_power_iterations, "eps": site.eps, "dim": site.axis}
            spectral_norm_hook(module, site.tensor, **settings)
    return Root(root.model, [replace(site, form="hook", semantics="torch_hook") for site in root.sites])


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


def compiled_call(root: nn.Module, mode: str) -> Callable[[], list[Tensor]]:
    """A root's forward under torch.compile."""
    import torch._dynamo as dynamo

    # Every root is one more compilation of one and the same forward, and none of them may fall back to eager.
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(dynamo.config, name):
            setattr(dynamo.config, name, 64)
    compiled = torch.compile(root, mode=mode)

    def call() -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled()

    return call


def autocast_call(call: Callable[[], list[Tensor]], device: torch.device) -> Callable[[], list[Tensor]]:
    def under() -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            return call()

    return under


def why_not_compiled(device: torch.device, mode: str, case: Case) -> str:
    """Why torch.compile takes no part, if so."""
    if not case.compiled:
        return "compiles for minutes: takes part in a few cases, and with --compiled"
    if device.type == "cuda":
        return "" if backends.get("triton").unsupported() == [] else "torch.compile needs Triton on a GPU"
    if mode == "reduce-overhead":
        return f"this mode is the default one with CUDA graphs, and {NEEDS_CUDA}"
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return "" if any(c and shutil.which(c) for c in compilers) else "torch.compile needs a C++ compiler on the CPU"


def why_not_backend(name: str, device: torch.device) -> str:
    """Why one of our backends takes no part without being asked for, if so."""
    if name in backends.natural(device.type):
        return ""
    backend = backends.get(name)
    made_for = f"made for {' and '.join(backend.devices)}, and the weights are on {device.type}"
    return "; ".join(backend.unsupported()) or made_for


def providers_of(device: torch.device, case: Case, asked: Sequence[str] | None = None) -> list[Provider]:
    """All of them; those that cannot run here say why.

    Args:
        asked: names of backends of ours; None takes all that the registry has.
    """
    natives = [Provider("parametrization", ("sn",), make_native), Provider("hook", ("sn",), make_hook)]
    ours = [
        replace(fused(name), left_out="" if asked else why_not_backend(name, device))
        for name in asked or backends.names()
    ]
    found = [
        *natives,
        Provider("foreach", ("sn", "bsn", "ssn", "bssn", "capped"), lambda s, variant: Foreach(s.copy(), variant)),
        Provider(
            "authors",
            ("sn", "bsn", "ssn", "bssn"),
            lambda s, variant: Authors(s.copy(), variant),
            left_out=TOO_ROUGH if DTYPES[case.dtype].itemsize < 4 else "",
        ),
    ]
    if case.autocast:
        # Eager alone: what is captured or compiled has its own ways with autocast.
        return [replace(p, tasks=_autocast(device)) for p in (*found, *ours)]
    found += [_graphed(p, device) for p in natives]
    for mode in ("default", "reduce-overhead"):
        found += [_compiled(p, mode, why_not_compiled(device, mode, case)) for p in natives]
    for p in ours:
        found += [p, _graphed(p, device)] if device.type == "cuda" and p.name != "reference" else [p]
    return found


def _autocast(device: torch.device) -> Callable[[Root, Sequence[Tensor]], dict[str, Task]]:
    return lambda root, grads: tasks_of(root, grads, autocast_call(root, device))


def _graphed(p: Provider, device: torch.device) -> Provider:
    why = p.left_out or ("" if device.type == "cuda" else NEEDS_CUDA)

    def made(root: Root, grads: Sequence[Tensor]) -> dict[str, Task]:
        return captured(p.tasks(root, grads))

    return replace(p, name=f"{p.name} graph", tasks=made, graph=True, left_out=why)


def _compiled(p: Provider, mode: str, why: str) -> Provider:
    def made(root: Root, grads: Sequence[Tensor]) -> dict[str, Task]:
        return tasks_of(root, grads, compiled_call(root, mode))

    return replace(p, name=f"{p.name} {mode}", tasks=made, compiled=True, left_out=why)
