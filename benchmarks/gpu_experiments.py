"""What to measure first on a new GPU: bandwidths, whole calls, launch settings, the schedule, progress, host time.

    python benchmarks/gpu_experiments.py --json experiments.json
    python benchmarks/gpu_experiments.py settings schedule

Each experiment runs in a process of its own; one that fails or hangs is reported and the rest goes on. The exit code is
1 if one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gpu import MB, CpuClock, CudaClock, OnDevice, dump, end_of, gpu_machine, of_samples, progress, told, watched
from torch import Tensor, nn

from bssn_kernels import backends, functional
from bssn_kernels.bench.host import WIDTH, floor_task, functional_task
from bssn_kernels.bench.measure import Task, no_collection
from bssn_kernels.bench.providers import make_fused
from bssn_kernels.bench.report import aligned
from bssn_kernels.bench.verify import TOLERANCE, norm, relative
from bssn_kernels.bench.workloads import WORKLOADS
from bssn_kernels.plan import LayerSpec
from bssn_kernels.variants import resolve_variant

FORMAT = "bssn_kernels gpu experiments 1"
LEAST_S = 15.0
WARM_UPS = 3


@dataclass(frozen=True)
class Setting:
    """Where and how much; the defaults are those of a GPU.

    Attributes:
        samples: of each time. forwards: that must give the same bits. numel: numbers of a stream.
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

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def clock(self, cold: bool = False) -> CpuClock | CudaClock:
        return CudaClock(self.device, cold) if self.cuda else CpuClock()


Rows = Iterator[dict[str, Any]]  # a value that is a dict holds samples, which the table leaves out


def medians(setting: Setting, tasks: Mapping[str, Task], cold: bool = False) -> dict[str, dict]:
    """Device seconds of all tasks, in interleaved rounds."""
    clock, order = setting.clock(cold), list(tasks)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(WARM_UPS):
        for name in order:
            clock.device(tasks[name])
    shuffle = random.Random(0).shuffle
    with no_collection():
        for _ in range(setting.samples):
            shuffle(order)
            for name in order:
                seconds[name].append(clock.device(tasks[name])[0])
    return {name: of_samples(samples) for name, samples in seconds.items()}


def ms(samples: Mapping[str, Any]) -> float:
    return samples["median"] * 1e3


@dataclass
class Group:
    """Weights of a workload with all that a call takes, and with the streams that bound it."""

    setting: Setting
    workload: str
    variant: str
    channels_last: bool = False
    weights: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        layers, device = WORKLOADS[self.workload].layers, self.setting.device
        generator = torch.Generator(device).manual_seed(0)
        self.weights, self.grads = [], []
        for layer in layers:
            last = self.channels_last and len(layer.shape) == 4
            memory_format = torch.channels_last if last else torch.contiguous_format
            w = torch.empty(layer.shape, device=device, memory_format=memory_format)
            self.weights.append(w.normal_(0, 0.02, generator=generator).requires_grad_())
            self.grads.append(torch.empty_like(w).normal_(generator=generator))
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

    @property
    def nbytes(self) -> int:
        return sum(w.nbytes for w in self.weights)

    @torch.no_grad()
    def forward(self) -> functional.Normalized:
        return functional.spectral_normalize(self.weights, self.vectors, self.plan)

    def tasks(self) -> dict[str, Task]:
        """Forward, and backward over a kept graph."""
        outs = functional.spectral_normalize(self.weights, self.vectors, self.plan).weights
        backward = Task(lambda: torch.autograd.grad(outs, self.weights, self.grads, retain_graph=True))
        return {"forward": Task(self.forward), "backward": backward}

    def streams(self) -> dict[str, Task]:
        """The copy of the weights, and three streams of as many numbers."""
        sources = [w.detach() for w in self.weights]
        targets = [torch.empty_like(w) for w in sources]
        flat = torch.cat([w.flatten() for w in sources])
        grad, out = torch.randn_like(flat), torch.empty_like(flat)
        return {
            "copy": Task(lambda: torch._foreach_copy_(targets, sources)),
            "three_stream": Task(lambda: torch.add(grad, flat, out=out)),
        }


def ratios(times: Mapping[str, dict]) -> dict[str, Any]:
    """Columns of forward and backward, from the medians of tasks and streams."""
    return {
        "forward ms": ms(times["forward"]),
        "/copy": times["forward"]["median"] / times["copy"]["median"],
        "backward ms": ms(times["backward"]),
        "/three_stream": times["backward"]["median"] / times["three_stream"]["median"],
        "samples": dict(times),
    }


def bandwidth(setting: Setting) -> Rows:
    """Copy, read, and three streams, by torch."""
    x = torch.randn(setting.numel, device=setting.device)
    y, out = torch.randn_like(x), torch.empty_like(x)
    group = Group(setting, setting.headline, "sn")
    copies = group.streams()["copy"]
    moved = {"copy": 2 * x.nbytes, "read only (sum)": x.nbytes, "three streams (add)": 3 * x.nbytes}
    moved[f"_foreach_copy_ of {setting.headline}"] = 2 * group.nbytes
    tasks = dict(zip(moved, [Task(lambda: out.copy_(x)), Task(x.sum), Task(lambda: torch.add(x, y, out=out)), copies]))
    for name, samples in medians(setting, tasks).items():
        rate = moved[name] / samples["median"] / 1e12
        yield {"what": name, "MB moved": moved[name] / MB, "ms": ms(samples), "TB/s": rate, "samples": samples}


def whole(setting: Setting) -> Rows:
    """Forward and backward of whole workloads; sets under 100 MB find an L2 cache full of other data."""
    for workload in setting.workloads:
        for channels_last in (False, True):
            for variant in ("sn", "bssn"):
                group = Group(setting, workload, variant, channels_last)
                head = {"workload": workload, "variant": variant, "MB": group.nbytes / MB}
                head["format"] = "channels_last" if channels_last else "contiguous"
                tasks = group.tasks() | group.streams()
                yield head | ratios(medians(setting, tasks, cold=group.nbytes < 100 * MB)) | counted(group)


def counted(group: Group) -> dict[str, float]:
    """MB that the Triton backend's schedules count."""
    from bssn_kernels.backends._schedule import BackwardSchedule, ForwardSchedule
    from bssn_kernels.plan import layer_rows

    rows = layer_rows(group.plan.tables[0])
    forward = ForwardSchedule(rows, [1] * len(rows), 4).traffic
    backward = BackwardSchedule(rows, range(len(rows)), 4).traffic
    return {"counted f MB": sum(forward.values()) / MB, "counted b MB": sum(backward.values()) / MB}


def settings(setting: Setting) -> Rows:
    """Programs per SM and stages of the Triton kernels, on the headline; every other setting as it stands."""
    from bssn_kernels.backends import triton

    for variant, key in (("sn", (False, False)), ("bssn", (True, False))):
        group = Group(setting, setting.headline, variant)
        tasks, streams, first = group.tasks(), group.streams(), group.forward().saved
        usual = triton.AMPERE[key]
        try:
            for stages in (1, 2, 3, 4):
                for programs in (1, 2, 3, 4):
                    config = triton.AMPERE[key] = replace(usual, programs=programs, stages=stages)
                    row = {"variant": variant, "stages": stages, "programs": programs, "registers": config.registers}
                    row["usual"] = config == usual
                    yield row | attempt(lambda: compared(setting, group, tasks, streams, first))  # noqa: B023
        finally:
            triton.AMPERE[key] = usual


def compared(setting: Setting, group: Group, tasks: dict, streams: dict, first: Tensor) -> dict[str, Any]:
    """Times, and whether the state is still the same bit for bit."""
    same = bool(torch.equal(group.forward().saved, first))
    return ratios(medians(setting, tasks | streams)) | {"same bits": same}


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The columns of a row, or why there are none; not where the device is gone, which ends the experiment."""
    try:
        return run()
    except Exception as error:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {"failed": told(error)}


def schedule(setting: Setting) -> Rows:
    """LAG and BUDGET of the Triton backend's schedules, on the headline."""
    homes = schedule_modules()
    usual = {name: getattr(homes[name], name) for name in homes}
    choices = [(lag, budget) for lag in (2, 4, 6, 8, 16) for budget in (16, 24, 32, 40)]
    for variant in ("sn", "bssn"):
        group = Group(setting, setting.headline, variant)
        streams, first = group.streams(), group.forward().saved
        for lag, budget in choices:
            with changed(homes, {"LAG": lag << 20, "BUDGET": budget << 20}):
                group.make_plan()
                row = {"variant": variant, "LAG MiB": lag, "BUDGET MiB": budget}
                row["usual"] = usual == {"LAG": lag << 20, "BUDGET": budget << 20}
                yield row | attempt(lambda: compared(setting, group, group.tasks(), streams, first))  # noqa: B023


def schedule_modules() -> dict[str, Any]:
    """The module that each number of the schedule is a global of."""
    found = {}
    for module in ("_order", "_schedule"):
        with contextlib.suppress(ImportError):
            home = importlib.import_module(f"bssn_kernels.backends.{module}")
            found |= {name: home for name in ("LAG", "BUDGET") if name in vars(home)}
    if len(found) < 2:
        raise RuntimeError(f"expected LAG and BUDGET in the Triton backend's schedule, found {sorted(found)}")
    return found


@contextlib.contextmanager
def changed(homes: Mapping[str, Any], values: Mapping[str, int]) -> Iterator[None]:
    before = {name: getattr(homes[name], name) for name in values}
    try:
        for name, value in values.items():
            setattr(homes[name], name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(homes[name], name, value)


class Watch:
    """Counts, on the device, the calls whose results are not those of the first, bit for bit."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.outs = functional.spectral_normalize(group.weights, group.vectors, group.plan).weights
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

    def check(self, tensors: Sequence[Tensor]) -> None:
        self.different += (self.bits(tensors) != self.expected).any()


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
        watch.check(watch.call())


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
        watch.check(watch.call())
    torch.cuda.synchronize()


def on_two_streams(watch: Watch, n: int) -> None:
    """Calls of one plan on two streams at once."""
    other, second = second_watch(watch)
    for _ in range(n // 2):
        with torch.cuda.stream(other):
            second.check(second.call())
        watch.check(watch.call())
    settle(watch, second)


def graph_beside_eager(watch: Watch, n: int) -> None:
    """A graph of the call is replayed on a second stream, beside eager calls."""
    other, second = second_watch(watch)
    with torch.cuda.stream(other):
        for _ in range(WARM_UPS):
            second.call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=other):
        tensors = second.call()
    for _ in range(n // 2):
        with torch.cuda.stream(other):
            graph.replay()
            second.check(tensors)
        watch.check(watch.call())
    settle(watch, second)


def second_watch(watch: Watch) -> tuple[torch.cuda.Stream, Watch]:
    """A stream and a watch that belongs to it: a backward runs on the stream of its forward."""
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        return other, Watch(watch.group)


def settle(watch: Watch, second: Watch) -> None:
    torch.cuda.synchronize()
    watch.different += second.different + (second.expected != watch.expected).any()


def host(setting: Setting) -> Rows:
    """Host time of calls with n layers so small that arithmetic is nothing, eager and as the replay of a graph."""
    clock = setting.clock()
    for n in setting.counts:
        layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(n)))
        subject = OnDevice(f"{n} layers", layers, False, setting.device)
        native = subject.copy()
        floor = host_seconds(clock, setting, floor_task(native))
        yield {"layers": n, "what": "floor", "us": floor["median"] * 1e6, "samples": floor}
        makers = {
            "functional, forward": lambda: functional_task(native, setting.backend),  # noqa: B023
            "root, forward": lambda: Task(make_fused(setting.backend, subject, "sn")),  # noqa: B023
            "root, forward + backward": lambda: root_task(make_fused(setting.backend, subject, "sn")),  # noqa: B023
        }
        if setting.cuda:
            makers["graph of functional, forward"] = lambda: graph_task(functional_task(native, setting.backend))  # noqa: B023
        for what, make in makers.items():
            row = {"layers": n, "what": what}
            yield row | attempt(lambda: host_columns(host_seconds(clock, setting, make()), floor, n))  # noqa: B023


def host_seconds(clock: CpuClock | CudaClock, setting: Setting, task: Task) -> dict[str, Any]:
    for _ in range(WARM_UPS):
        clock.wall(task)
    with no_collection():
        return of_samples([clock.wall(task)[1] for _ in range(3 * setting.samples)])


def host_columns(samples: Mapping[str, Any], floor: Mapping[str, Any], n: int) -> dict[str, Any]:
    us = samples["median"] * 1e6
    return {"us": us, "us/layer": us / n, "/floor": samples["median"] / floor["median"], "samples": dict(samples)}


def root_task(root: nn.Module) -> Task:
    leaves = list(root.parameters())
    grads = [torch.randn_like(leaf) for leaf in leaves]

    def run() -> list[Tensor]:
        outs = root()
        torch.autograd.backward(outs, grads)
        return outs

    def reset() -> None:
        for leaf in leaves:
            leaf.grad = None

    return Task(run, reset)


def graph_task(task: Task) -> Task:
    """The replay of a graph of the task."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            task.run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        kept = task.run()

    def run() -> object:
        graph.replay()
        return kept

    return Task(run)


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

        def normal(shape: Sequence[int]) -> Tensor:
            return torch.empty(shape, dtype=torch.float64).normal_(generator=generator)  # noqa: B023

        weights = [normal(shape) for shape, _ in layers]
        if channels_last:
            weights = [w.to(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
        grads = [normal(w.shape) for w in weights]
        rule = {"variant": resolve_variant("bssn"), "semantics": semantics}
        specs = [LayerSpec.of(w, axis=axis, **rule) for w, (_, axis) in zip(weights, layers)]
        vectors = [nn.functional.normalize(normal(shape), dim=0) for s in specs for shape in s.vector_shapes]
        truth = results(weights, vectors, grads, layers, rule, "reference", iterations)
        moved = [[t.to(setting.device, torch.float32) for t in of] for of in (weights, vectors, grads)]
        found = results(*moved, layers, rule, setting.backend, iterations)
        errors = [relative(norm(f.cpu().double() - t), norm(t)) for f, t in zip(found, truth)]
        # Not max, which may pass over a NaN.
        row = {"group": name, "largest error": sorted(errors, key=lambda e: (e != e, e))[-1]}
        if not all(error <= TOLERANCE for error in errors):
            row["failed"] = f"wrong numbers: off by {row['largest error']:.1e} (limit {TOLERANCE:.0e})"
        yield row


def results(weights, vectors, grads, layers, rule, backend: str, iterations: int) -> list[Tensor]:
    """W_bar, new vectors, sigmas and dW."""
    weights = [w.detach().requires_grad_() for w in weights]
    specs = [LayerSpec.of(w, name=str(i), axis=layers[i][1], **rule) for i, w in enumerate(weights)]
    found = functional.spectral_normalize(weights, vectors, functional.make_plan(specs, backend), iterations)
    grad_weights = torch.autograd.grad(found.weights, weights, grads)
    return [*(w.detach() for w in found.weights), *found.vectors, *found.sigmas, *grad_weights]


# The most telling first, each with the seconds that it may take.
EXPERIMENTS: dict[str, tuple[Callable[[Setting], Rows], float]] = {
    "small": (small, 60),
    "bandwidth": (bandwidth, 60),
    "whole": (whole, 120),
    "stability": (stability, 150),
    "settings": (settings, 200),
    "schedule": (schedule, 120),
    "host": (host, 120),
}


def measure(name: str, setting: Setting, write: Callable[[dict], None], armed: bool = False) -> dict[str, Any]:
    """One experiment in this process; ``write`` gets what is known after every row."""
    run, limit = EXPERIMENTS[name]
    start = time.perf_counter()
    record: dict[str, Any] = {"experiment": name, "what": run.__doc__.splitlines()[0], "rows": []}
    watched(name, limit, progress, armed)
    try:
        for row in run(setting):
            record["rows"].append(row)
            write(record | {"failed": "did not end"})
            progress("  ".join(shown(value) for value in row.values() if not isinstance(value, dict)))
    except Exception as error:
        record["failed"] = told(error)
    record["seconds"] = time.perf_counter() - start
    write(record)
    return record


def run_child(name: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One experiment in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "experiment.json"
        command = [sys.executable, __file__, name, "--in-process", "--json", str(file)]
        command += ["--device", args.device, "--backend", args.backend] + ["--quick"] * args.quick
        ended = end_of(command, seconds)
        try:
            (record,) = json.loads(file.read_text())["experiments"]
        except (OSError, ValueError, KeyError):
            record = {"experiment": name, "rows": [], "failed": "nothing was written"}
    if record.get("failed") and ended:
        record["failed"] += f" ({ended})"
    return record


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(record: Mapping[str, Any]) -> str:
    """An experiment's rows; columns are named by the first row, and a failed row says why."""
    rows = record["rows"]
    lines = [f"{record['experiment']}: {record.get('what', '')}"]
    if rows:
        names = [
            name for row in rows for name, value in row.items() if not isinstance(value, dict) and name != "failed"
        ]
        names = list(dict.fromkeys(names))
        cells: list[tuple[str, ...] | str] = [tuple(names)]
        for row in rows:
            if "failed" in row:
                given = [shown(row[name]) for name in names if name in row]
                cells.append(
                    (*given, row["failed"]) if len(given) < len(names) - 1 else "  ".join([*given, row["failed"]])
                )
            else:
                cells.append(tuple(shown(row.get(name, "")) for name in names))
        lines += aligned(cells, slice(0, None))
    if record.get("failed"):
        lines.append(f"FAILED: {record['failed']}")
    return "\n".join([*lines, ""])


def summary(records: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """One line per experiment, and whether all went well."""
    lines, well = ["summary"], True
    for record in records:
        bad = [row["failed"] for row in record["rows"] if "failed" in row]
        said = [record["failed"]] if record.get("failed") else []
        said += [f"{len(bad)} failed, the first: {bad[0]}"] if bad else []
        well = well and not said
        lines.append(f"  {record['experiment']:<12}{len(record['rows']):>4} rows  {'; '.join(said) or 'ok'}")
    return "\n".join(lines), well


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("experiment", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)} (default: all, in this order)")
    add("--list", action="store_true", help="name the experiments")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: what needs no GPU, for tests")
    add("--backend", choices=backends.names(), default="triton")
    add("--quick", action="store_true", help="few samples and few calls")
    add("--deadline", type=float, default=3600.0, metavar="S", help="time for all; later ones are left out")
    add("--json", type=Path, metavar="FILE", help="everything measured, raw samples included, kept up to date")
    add("--in-process", action="store_true", help="no process per experiment")
    args = parser.parse_args(argv)
    if unknown := set(args.experiment) - set(EXPERIMENTS):
        parser.error(f"expected experiments of {', '.join(EXPERIMENTS)}, got {', '.join(sorted(unknown))}")
    return args


def main(argv: Sequence[str] | None = None, setting: Setting | None = None) -> int:
    args = parse(argv)
    if args.list:
        for name, (run, _) in EXPERIMENTS.items():
            print(f"{name:<12}{run.__doc__.splitlines()[0]}")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_experiments.py: torch sees no CUDA device here, and these experiments are about one", file=sys.stderr
        )
        return 2
    if setting is None:
        setting = Setting(torch.device(args.device), args.backend)
    if args.quick:
        setting = replace(setting, samples=5, forwards=500)
    head = {"format": FORMAT, "machine": gpu_machine(setting.device), "settings": {"quick": args.quick}}
    records: list[dict] = []

    def write(record: dict) -> None:
        dump(args.json, head, "experiments", [*records, record])

    end = time.monotonic() + args.deadline
    for name in args.experiment or EXPERIMENTS:
        left = end - time.monotonic()
        if args.in_process or args.device == "cpu":
            record = measure(name, setting, write, armed=args.in_process)
        elif left < LEAST_S:
            record = {"experiment": name, "rows": [], "failed": "no time was left"}
        else:
            record = run_child(name, args, min(left, EXPERIMENTS[name][1] + 30))
        records.append(record)
        dump(args.json, head, "experiments", records)
        if not args.in_process:
            print(table(record), flush=True)
    text, well = summary(records)
    if not args.in_process:
        print(text)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
