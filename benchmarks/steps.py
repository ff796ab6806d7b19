"""Whole steps of a discriminator: the share that normalization takes of them, natively and with ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bssn_kernels
from benchmarks.models import MODELS
from bssn_kernels import backends
from bssn_kernels.bench.measure import clock_of, interleaved
from bssn_kernels.bench.providers import PLAIN_LAYERS
from bssn_kernels.bench.report import aligned
from bssn_kernels.bench.session import told
from bssn_kernels.bench.task import Task

POOL = 4  # batches of images to choose from
AGREE = 1e-3


class Step:
    """One discriminator with its optimizer and data; equal seeds make equal steps.

    Args:
        model: is changed.
        images: (n, 3, size, size), real and generated ones alike, since what an image shows costs nothing.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> None:
        self.model, self.images, self.labels, self.batch = model, images, labels, batch
        self.adam = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.0, 0.999))
        self.random = torch.Generator().manual_seed(0)

    def _scores(self) -> Tensor:
        chosen = torch.randint(len(self.images), (self.batch,), generator=self.random).to(self.images.device)
        return self.model(self.images[chosen], self.labels[chosen])

    def run(self) -> Tensor:
        """Data, both forwards, hinge loss, backward, optimizer; returns the loss."""
        loss = F.relu(1 - self._scores()).mean() + F.relu(1 + self._scores()).mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return loss.detach()


def native(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, PLAIN_LAYERS):
            parametrizations.spectral_norm(module)
    return model


def providers(device: torch.device) -> dict[str, tuple[str, Callable[[nn.Module], object]]]:
    """By name: which copy a step starts from, "plain" or "native", and what is done to it."""
    found: dict[str, tuple[str, Callable[[nn.Module], object]]] = {
        "plain": ("plain", lambda model: None),
        "parametrization sn": ("native", lambda model: None),
    }
    for name in backends.natural(device.type):
        if name != "reference":
            found[f"{name} sn"] = ("native", lambda model, name=name: bssn_kernels.fuse(model, backend=name))
            found[f"{name} bssn"] = (
                "plain",
                lambda model, name=name: bssn_kernels.normalize(model, "bssn", backend=name),
            )
    return found


def measure_steps(
    name: str,
    device: torch.device,
    batch: int | None = None,
    repeats: int | None = None,
    budget_s: float = 10.0,
    models: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of one discriminator: times of a step, and the share that normalization takes of it.

    A fused SN step whose first losses are not those of the native one is refused.
    """
    build, size, usual, few = (models or MODELS)[name]
    batch = batch or (usual if device.type == "cuda" else few)
    record: dict[str, Any] = {"kind": "step", "name": f"step of {name}", "model": name, "batch": batch, "size": size}
    torch.manual_seed(0)
    plain = build()
    start = {"plain": plain.to(device), "native": native(copy.deepcopy(plain)).to(device)}
    images = torch.randn(POOL * batch, 3, size, size, device=device)
    labels = torch.randint(1000, (len(images),), device=device)
    rows: list[dict[str, Any]] = []
    tasks: dict[str, Task] = {}
    losses: dict[str, list[float]] = {}
    for label, (source, change) in providers(device).items():
        row: dict[str, Any] = {"provider": label, "times": {}}
        rows.append(row)
        try:
            model = copy.deepcopy(start[source])
            change(model)
            step = Step(model, images, labels, batch)
            losses[label] = [float(step.run()) for _ in range(2)]
            row["losses"] = losses[label]
            if label.endswith(" sn"):
                row["refused"] = disagreement(losses["parametrization sn"], losses[label])
            if not row.get("refused"):
                tasks[label] = Task(step.run)
        except Exception as error:
            row["refused"] = told(error)
    times = interleaved(tasks, clock=clock_of(device), repeats=repeats, budget_s=budget_s)
    for row in rows:
        if row["provider"] in times:
            row["times"] = {"step": times[row["provider"]].record()}
    return record | {"rows": rows, "rounds": max(len(of.wall.seconds) for of in times.values()), **shares(rows)}


def disagreement(expected: Sequence[float], losses: Sequence[float]) -> str:
    """Why these losses are not the native ones, or nothing. NaN is none."""
    off = [abs(a - b) / max(1.0, abs(a)) for a, b in zip(expected, losses)]
    return "" if all(o <= AGREE for o in off) else f"wrong numbers: losses {losses}, natively {expected}"


def shares(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By provider: the share of a step that is not in the step of the plain network, and native's time over its own."""
    ms = {row["provider"]: row["times"]["step"]["wall"]["median"] for row in rows if row["times"]}
    plain, before = ms.pop("plain", None), ms.get("parametrization sn")
    return {
        "share": {name: 1 - plain / of for name, of in ms.items() if plain},
        "native_over": {name: before / of for name, of in ms.items() if before},
    }


def steps_table(records: Sequence[dict[str, Any]]) -> str:
    lines: list[tuple[str, ...] | str] = [("step of", "batch", "provider", "ms", "10-90 %", "normalization", "native/")]
    for record in records:
        for row in record["rows"]:
            head = (record["model"], str(record["batch"]), row["provider"])
            if not row["times"]:
                lines.append((*head, row["refused"]))
                continue
            times = row["times"]["step"]["wall"]
            share, ratio = (record[what].get(row["provider"]) for what in ("share", "native_over"))
            cells = (f"{times['median'] * 1e3:.1f}", f"{times['p10'] * 1e3:.1f}-{times['p90'] * 1e3:.1f}")
            cells += ("" if share is None else f"{share:.1%}", "" if ratio is None else f"{ratio:.2f}x")
            lines.append((*head, *cells))
    return "\n".join([*aligned(lines, slice(3, None)), "", LEGEND, ""])


LEGEND = (
    "step: data, D(real), D(fake), hinge loss, backward, Adam. normalization: the share of a step that the step of\n"
    "the same network without normalization does not take. native/: the step under torch's parametrization over it."
)
