"""Experiments about time: bandwidths, whole calls, launch settings, the schedule, and host time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks import LARGE, MB
from benchmarks.experiments.groups import Group, Rows, Setting, attempt
from benchmarks.measure import streams
from benchmarks.providers import captured
from bssn_kernels.backends import _geometry, _order
from bssn_kernels.backends._schedule import BackwardSchedule, ForwardSchedule
from bssn_kernels.backends._triton_settings import REGISTERS, family_of
from bssn_kernels.backends.triton import capability_of
from bssn_kernels.bench.host import WIDTH, floor_task, functional_task
from bssn_kernels.bench.providers import Subject, make_fused, tasks_of
from bssn_kernels.bench.task import Task
from bssn_kernels.plan import GroupPlan, layer_rows


def ratios(times: Mapping[str, dict]) -> dict[str, Any]:
    """Columns of forward and backward, from the medians of tasks and streams."""
    median = {name: samples["median"] for name, samples in times.items()}
    return {
        "forward ms": median["forward"] * 1e3,
        "/copy": median["forward"] / median["copy"],
        "backward ms": median["backward"] * 1e3,
        "/three_stream": median["backward"] / median["three_stream"],
        "samples": dict(times),
    }


def bandwidth(setting: Setting) -> Rows:
    """Copy, read, and three streams, by torch."""
    x = torch.randn(setting.numel, device=setting.device)
    y, out = torch.randn_like(x), torch.empty_like(x)
    group = Group(setting, setting.headline, "sn")
    tasks = {
        "copy": (2 * x.nbytes, Task(lambda: out.copy_(x))),
        "read only (sum)": (x.nbytes, Task(x.sum)),
        "three streams (add)": (3 * x.nbytes, Task(lambda: torch.add(x, y, out=out))),
        f"_foreach_copy_ of {setting.headline}": (2 * group.nbytes, streams(group.weights)["copy"]),
    }
    for name, samples in setting.samples_of({name: task for name, (_, task) in tasks.items()}).items():
        moved, seconds = tasks[name][0], samples["median"]
        rate = moved / seconds / 1e12
        yield {"what": name, "MB moved": moved / MB, "ms": seconds * 1e3, "TB/s": rate, "samples": samples}


def whole(setting: Setting) -> Rows:
    """Forward and backward of whole workloads; sets under 100 MB find an L2 cache full of other data."""
    for workload in setting.workloads:
        for channels_last in (False, True):
            for variant in ("sn", "bssn"):
                group = Group(setting, workload, variant, channels_last)
                head = {"workload": workload, "variant": variant, "MB": group.nbytes / MB}
                head["format"] = "channels_last" if channels_last else "contiguous"
                sums = {f"counted {k[0]} MB": sum(of.values()) / MB for k, of in counted_bytes(group.plan).items()}
                tasks = group.tasks() | streams(group.weights)
                yield head | ratios(setting.samples_of(tasks, cold=group.nbytes < LARGE)) | sums


def counted_bytes(plan: GroupPlan) -> dict[str, dict[str, int]]:
    """What the Triton backend's schedules count for float32, by call and phase."""
    rows = layer_rows(plan.tables[0])
    forward = ForwardSchedule(rows, [1] * len(rows), 4, whole_rows=[True] * len(rows))
    backward = BackwardSchedule(rows, range(len(rows)), 4)
    return {"forward": forward.traffic, "backward": backward.traffic}


def settings(setting: Setting) -> Rows:
    """Programs per SM, with all registers shared among them, and stages of the Triton kernels, on the headline."""
    family = family_of(capability_of(setting.device))
    for variant, key in (("sn", False), ("bssn", True)):
        group = Group(setting, setting.headline, variant)
        bounds, first = streams(group.weights), group.forward().saved
        usual = family[key]
        for stages, programs in [(stages, programs) for stages in setting.stages for programs in setting.programs]:
            each = min(255, REGISTERS // (programs * 32 * usual.warps) // 8 * 8)
            config = replace(usual, programs=programs, stages=stages, registers=each)
            row = {"variant": variant, "stages": stages, "programs": programs, "registers": config.registers}
            row["usual"] = config == usual
            with patch.dict(family, {key: config}):
                group.make_plan()
                yield row | attempt(lambda: compared(group, group.tasks() | bounds, first))  # noqa: B023


def rows(setting: Setting) -> Rows:
    """Whole rows, by the stages of their loads, and the same rows in pieces, with the Triton backend."""
    family = family_of(capability_of(setting.device))
    for workload in setting.workloads:
        group = Group(setting, workload, "sn")
        bounds, usual = streams(group.weights), family[False]
        for stages in (*setting.whole_stages, 0):
            row = {"workload": workload, "whole rows": bool(stages), "stages": stages}
            row["usual"] = stages == usual.whole_stages
            held = _geometry.WHOLE_ROWS if stages else dict.fromkeys(_geometry.WHOLE_ROWS, (1, 0))
            config = replace(usual, whole_stages=stages or usual.whole_stages)
            with patch.dict(family, {False: config}), patch.object(_geometry, "WHOLE_ROWS", held):
                group.make_plan()
                yield row | attempt(lambda: ratios(setting.samples_of(group.tasks() | bounds)))  # noqa: B023


def compared(group: Group, tasks: Mapping[str, Task], first: Tensor) -> dict[str, Any]:
    """Times, and whether the state is still the same bit for bit."""
    same = bool(torch.equal(group.forward().saved, first))
    return ratios(group.setting.samples_of(tasks)) | {"same bits": same}


def schedule(setting: Setting) -> Rows:
    """SUM_US and L2_SHARE of the order of tiles, on the headline with the Triton backend."""
    usual = _order.SUM_US, _order.L2_SHARE
    for variant in ("sn", "bssn"):
        group = Group(setting, setting.headline, variant)
        bounds, first = streams(group.weights), group.forward().saved
        for sums, share in [(sums, share) for sums in setting.sums for share in setting.shares]:
            row = {"variant": variant, "SUM us": sums, "share of L2": share, "usual": (sums, share) == usual}
            with patch.multiple(_order, SUM_US=float(sums), L2_SHARE=share):
                group.make_plan()
                yield row | attempt(lambda: compared(group, group.tasks() | bounds, first))  # noqa: B023


def host(setting: Setting) -> Rows:
    """Host time of calls with n layers so small that arithmetic is nothing, eager and as the replay of a graph."""

    def seconds(task: Task) -> dict[str, Any]:
        return setting.samples_of({"task": task}, "host")["task"]

    for n in setting.counts:
        layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(n)))
        subject = Subject(f"{n} layers", layers, device=setting.device)
        native, grads = subject.copy(), [torch.randn(WIDTH, WIDTH, device=setting.device)] * n
        floor = seconds(floor_task(native))
        yield {"layers": n, "what": "floor", "us": floor["median"] * 1e6, "samples": floor}
        makers = {
            "functional, forward": lambda: functional_task(native, setting.backend),  # noqa: B023
            "root, forward": lambda: Task(make_fused(setting.backend, subject, "sn")),  # noqa: B023
            "root, forward + backward": lambda: tasks_of(make_fused(setting.backend, subject, "sn"), grads)["both"],  # noqa: B023
        }
        if setting.cuda:
            graphed = makers["functional, forward"]
            makers["graph of functional, forward"] = lambda: captured({"": graphed()})[""]  # noqa: B023
        for what, make in makers.items():

            def columns() -> dict[str, Any]:
                samples = seconds(make())  # noqa: B023
                us, over = samples["median"] * 1e6, samples["median"] / floor["median"]  # noqa: B023
                return {"us": us, "us/layer": us / n, "/floor": over, "samples": samples}  # noqa: B023

            yield {"layers": n, "what": what} | attempt(columns)
