"""How times grow: with the number of layers, the size of a layer, the iterations, and the threads of a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks import MB
from benchmarks.measure import Bench, bandwidths
from benchmarks.targets import HOST, ratios_of
from bssn_kernels import backends
from bssn_kernels.bench import threads
from bssn_kernels.bench.host import WIDTH
from bssn_kernels.bench.providers import NATIVE, Provider, Root, Subject, fused
from bssn_kernels.bench.report import aligned, over
from bssn_kernels.bench.session import Measured, Row
from bssn_kernels.bench.workloads import WORKLOADS

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
WIDTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # 4 KB to 1 GB in float32
ITERATIONS = (0, 1, 2, 3, 5, 7, 10)
# Copies of a layer that are alive at once: of each provider the weight, its result and its gradient, and the truth.
COPIES = 14

Points = Iterator[tuple[Any, Subject, list[Provider]]]


def providers(device: torch.device) -> list[Provider]:
    """torch's parametrization, under the name that ratios are made with, and our fused backends."""
    native = replace(NATIVE, name="parametrization")
    return [native, *(fused(name) for name in backends.natural(device.type) if name != "reference")]


def by_layers(device: torch.device) -> Points:
    """n layers of 4 x 4: arithmetic is nothing, and what is left is the time of the host."""
    for n in COUNTS:
        layers = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(n))
        yield n, Subject(f"{n} layers", nn.Sequential(*layers), device=device), providers(device)


def by_size(device: torch.device) -> Points:
    """One square layer of 4 KB to 1 GB, as long as there is memory for all providers."""
    for width in WIDTHS:
        nbytes = 4 * width**2
        if nbytes * COPIES > (free := free_bytes(device)):
            why = f"left out: {nbytes / MB:.0f} MB a layer, times {COPIES}, is more than {free / MB:.0f} MB free"
            yield nbytes, why, []
            continue
        layer = nn.utils.skip_init(nn.Linear, width, width, bias=False)
        nn.init.normal_(layer.weight, std=0.02)
        yield nbytes, Subject(f"{width} x {width}", nn.Sequential(layer), device=device), providers(device)


def by_iterations(device: torch.device) -> Points:
    """0 (an eval forward) to 10 power iterations, on the headline for a GPU and a set that a CPU has time for."""
    workload = WORKLOADS["biggan128" if device.type == "cuda" else "paper_cnn"]
    for k in ITERATIONS:
        model = workload.build()
        for module in list(model):
            nn.utils.parametrizations.spectral_norm(module, n_power_iterations=max(k, 1))
        subject = Subject(f"{workload.name}, {k} iterations", model, device=device)
        yield k, subject, [p if k else still(p) for p in providers(device)]


def still(provider: Provider) -> Provider:
    """The same in eval mode, which makes no iteration."""

    def make(subject: Subject, variant: str) -> Root:
        root = provider.make(subject, variant).eval()
        root.sites = tuple(replace(site, n_power_iterations=0) for site in root.sites)
        return root

    return replace(provider, make=make)


def by_threads(device: torch.device) -> Points:
    """torch's threads, 1 to the number of cores, for a large set on a CPU."""
    workload = WORKLOADS["paper_resnet"]
    for n in sorted({1, 2, *range(4, (os.cpu_count() or 1) + 1, 4), os.cpu_count() or 1}):
        if n <= (os.cpu_count() or 1):
            with threads(n):
                yield n, Subject(workload.name, workload.build(), device=device), providers(device)


CURVES: dict[str, Callable[[torch.device], Points]] = {
    "layers": by_layers,
    "bytes": by_size,
    "iterations": by_iterations,
    "threads": by_threads,
}


def measure_curve(
    curve: str,
    device: torch.device,
    repeats: int | None = None,
    budget_s: float = 2.0,
    variants: Sequence[str] = ("sn",),
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The record of one curve, by the name of what it is drawn against."""
    record: dict[str, Any] = {"kind": "scaling", "name": f"by {curve}", "curve": curve, "points": [], "left_out": []}
    record["what"] = CURVES[curve].__doc__
    if curve == "threads" and device.type != "cpu":
        return record | {"left_out": ["threads are the CPU's"]}
    rows: list[dict] = []
    for x, subject, of_point in CURVES[curve](device):
        if isinstance(subject, str):
            record["left_out"].append(subject)
            continue
        progress(f"{record['name']}: {x}")
        bench = Bench(subject)
        bench.meter = None  # a layer of 1 GB takes seconds a call, and curves are of time
        bench.add_bounds()
        bench.add_all(of_point, variants)
        measured = Measured(subject.name, len(subject.sites), subject.nbytes, bench.time(repeats, budget_s))
        for row in measured.rows:
            row.ratios = ratios_of(row, measured, device.type)
        sizes = {"x": x, "layers": measured.layers, "bytes": measured.nbytes, **bandwidths(measured)}
        record["points"].append(sizes | {"rows": [row_record(row) for row in measured.rows]})
        rows += [row.record() for row in measured.rows if row.refused]
    record["rows"] = rows  # that were refused, for the summary
    if curve == "layers":
        record["growth"] = growth(record["points"])
    return record


def row_record(row: Row) -> dict[str, Any]:
    """Without the samples."""
    record = row.record()
    for clocks in record["times"].values():
        for clock, samples in clocks.items():
            if clock != "behind":
                del samples["samples"]
    return record


def growth(points: Sequence[dict]) -> list[dict[str, Any]]:
    """Of each provider and call: host seconds for every layer more, by least squares from 8 layers on, and the
    target for our forward: host time over that of the floor with the most layers."""
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for point in points:
        for row in point["rows"]:
            for what, clocks in row["times"].items():
                median = clocks.get("host", clocks["wall"])["median"]
                series.setdefault((row["provider"], what), []).append((point["x"], median))
    found = []
    floor = dict(series.get(("floor", "forward"), []))
    for (provider, what), pairs in series.items():
        many = [pair for pair in pairs if pair[0] >= 8] or pairs
        n, mean_x, mean_y = len(many), *(sum(column) / len(many) for column in zip(*many))
        spread = sum((x - mean_x) ** 2 for x, _ in many)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in many) / spread if spread else None
        x, last = pairs[-1]
        one = {"provider": provider, "what": what, "per_layer": slope, "points": n}
        one["over_floor"] = over(last, floor.get(x))
        if provider not in ("floor", "copy", "clone", "three_stream", "parametrization") and what == "forward":
            one |= {"limit": HOST, "met": one["over_floor"] <= HOST}
        found.append(one)
    return found


def curve_table(record: dict[str, Any]) -> str:
    """The points of a curve: ms of forward and of forward with backward, and how native compares."""
    titles = ("variant", "provider", "f ms", "f+b ms", "native/f", "native/f+b")
    lines: list[tuple[str, ...] | str] = [(record["curve"], *titles)]
    for point in record["points"]:
        for row in point["rows"]:
            if "both" not in row["times"]:
                continue
            ms = [f"{row['times'][what]['wall']['median'] * 1e3:.3f}" for what in ("forward", "both")]
            ratios = [f"{row['ratios'][f'native_over_{what}']:.2f}x" for what in ("forward", "both")]
            lines.append((f"{point['x']:,}", row["variant"].upper(), row["provider"], *ms, *ratios))
    text = [f"{record['name']}: {record['what']}", "", *aligned(lines, slice(3, None)), *record["left_out"]]
    for one in record.get("growth", ()):
        if one["what"] in ("forward", "both") and one["provider"] not in ("copy", "clone") and one["per_layer"]:
            verdict = f", {'met' if one['met'] else 'MISSED'}: at most {one['limit']}" if "limit" in one else ""
            ratio = f"; {one['over_floor']:.2f}x the floor's forward with the most layers{verdict}"
            text.append(f"  {one['provider']}, {one['what']}: {one['per_layer'] * 1e6:.2f} us a layer{ratio}")
    return "\n".join([*text, ""])


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
