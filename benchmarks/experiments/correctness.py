"""Experiments about results: right on small groups, and the same bits whatever else the device does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks import MB, WARM_UPS
from benchmarks.experiments.groups import Group, Rows, Setting, attempt
from bssn_kernels import functional
from bssn_kernels.bench.verify import TOLERANCE, norm, relative, worst
from bssn_kernels.plan import LayerSpec
from bssn_kernels.variants import resolve_variant


def small(setting: Setting) -> Rows:
    """Three small groups, forward and backward, against float64: what compute-sanitizer watches."""
    conv, linear, transposed = ((24, 20, 3, 3), 0), ((130, 40), 0), ((10, 24, 4, 4), 1)
    groups = {
        "torch, bssn": ("torch", [conv, linear, transposed], False, 1),
        "paper, bssn, channels_last": ("paper", [conv, transposed, linear], True, 1),
        "torch_hook, bssn, k = 2": ("torch_hook", [linear, conv, ((19,), 0)], False, 2),
    }
    for name, (semantics, layers, channels_last, iterations) in groups.items():
        generator = torch.Generator().manual_seed(0)
        rule = {"variant": resolve_variant("bssn"), "semantics": semantics}

        def normal(shape: Sequence[int]) -> Tensor:
            return torch.empty(shape, dtype=torch.float64).normal_(generator=generator)  # noqa: B023

        def results(of: Sequence[Sequence[Tensor]], backend: str) -> list[Tensor]:
            """W_bar, new vectors, sigmas and dW."""
            weights, vectors, grads = of
            weights = [w.detach().requires_grad_() for w in weights]
            plan = functional.make_plan(specs_of(weights), backend)
            found = functional.spectral_normalize(weights, vectors, plan, iterations)  # noqa: B023
            grad_weights = torch.autograd.grad(found.weights, weights, grads)
            return [*(w.detach() for w in found.weights), *found.vectors, *found.sigmas, *grad_weights]

        def specs_of(weights: Sequence[Tensor]) -> list[LayerSpec]:
            named = enumerate(zip(weights, layers))  # noqa: B023
            return [LayerSpec.of(w, name=str(i), axis=axis, **rule) for i, (w, (_, axis)) in named]  # noqa: B023

        weights = [normal(shape) for shape, _ in layers]
        if channels_last:
            weights = [w.to(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
        grads = [normal(w.shape) for w in weights]
        shapes = [shape for spec in specs_of(weights) for shape in spec.vector_shapes]
        exact = weights, [nn.functional.normalize(normal(shape), dim=0) for shape in shapes], grads
        truth = results(exact, "reference")
        found = results([[t.to(setting.device, torch.float32) for t in of] for of in exact], setting.backend)
        errors = [(relative(norm(f.cpu().double() - t), norm(t)), "") for f, t in zip(found, truth)]
        row = {"group": name, "largest error": worst(errors)[0]}
        if not row["largest error"] <= TOLERANCE:
            row["failed"] = f"wrong numbers: off by {row['largest error']:.1e} (limit {TOLERANCE:.0e})"
        yield row


class Watch:
    """Counts, on the device, the calls whose results are not those of the first, bit for bit."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.outs = group.call().weights
        self.expected = self.bits(self.call())
        self.different = torch.zeros((), dtype=torch.int64, device=group.setting.device)

    def call(self) -> list[Tensor]:
        """Forward, and the backward of the first forward."""
        result = self.group.forward()
        grads = torch.autograd.grad(self.outs, self.group.weights, self.group.grads, retain_graph=True)
        return [*result.weights, result.saved, *grads]

    @staticmethod
    def bits(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.detach().reshape(-1) for t in tensors]).view(torch.int32)

    def check(self, tensors: Sequence[Tensor] | None = None) -> None:
        """Of one call more, or of what a call gave."""
        self.different += (self.bits(self.call() if tensors is None else tensors) != self.expected).any()


def stability(setting: Setting) -> Rows:
    """Calls of one group give the same bits: alone, beside a long kernel, on two streams, from a graph beside eager.

    Fresh memory is filled with NaN before each launch, else what a launch leaves unwritten would be what the one before
    it wrote.
    """
    for workload in setting.stable:
        group = Group(setting, workload, "bssn")
        # A set that is much larger than the first has fewer calls, to take no longer.
        n = max(10, setting.forwards // max(1, group.nbytes // (20 * MB)))
        with nan_filled():
            watch = Watch(group)
            for part in (alone, beside_products, on_two_streams, graph_beside_eager)[: None if setting.cuda else 1]:
                start = time.perf_counter()
                watch.different.zero_()
                row = {"group": workload, "part": part.__name__.replace("_", " "), "calls": n}
                row |= attempt(lambda: part(watch, n) or {"different": int(watch.different)})  # noqa: B023
                if row.get("different"):
                    row["failed"] = f"{row['different']} of the calls gave other bits"
                yield row | {"seconds": time.perf_counter() - start}


@contextlib.contextmanager
def nan_filled() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def alone(watch: Watch, n: int) -> None:
    for _ in range(n):
        watch.check()


def beside_products(watch: Watch, n: int) -> None:
    """A second stream multiplies large matrices all the time."""
    other, done = torch.cuda.Stream(), torch.cuda.Event()
    a = torch.randn(4096, 4096, device=watch.different.device)
    out = torch.empty_like(a)
    other.wait_stream(torch.cuda.current_stream())
    for i in range(n):
        if i == 0 or done.query():
            with torch.cuda.stream(other):
                for _ in range(8):
                    torch.mm(a, a, out=out)
                done.record()
        watch.check()
    torch.cuda.synchronize()


def on_two_streams(watch: Watch, n: int) -> None:
    """Calls of one plan on two streams at once."""
    beside(watch, n, lambda second, stream: second.check)


def graph_beside_eager(watch: Watch, n: int) -> None:
    """A graph of the call is replayed on a second stream, beside eager calls."""

    def captured(second: Watch, stream: torch.cuda.Stream) -> Callable[[], None]:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                second.call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            tensors = second.call()
        return lambda: (graph.replay(), second.check(tensors))

    beside(watch, n, captured)


def beside(watch: Watch, n: int, make: Callable[[Watch, torch.cuda.Stream], Callable[[], object]]) -> None:
    """Checks of a watch and, on a second stream, what is made for a second watch, by turns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Of this stream, as a backward runs on the stream of its forward, with leaves of its own: the first one.s
        # belong to the other stream, which a capture must not touch.
        second = Watch(watch.group.again())
    run = make(second, stream)
    for _ in range(n // 2):
        with torch.cuda.stream(stream):
            run()
        watch.check()
    torch.cuda.synchronize()
    watch.different += second.different + (second.expected != watch.expected).any()
