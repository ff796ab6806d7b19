"""Whether second products find in L2 what the first ones read, on a model of a device: see played.py."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from played import Device, play

from bssn_kernels.backends import _geometry, _order
from bssn_kernels.backends._order import Machine
from bssn_kernels.backends._schedule import BackwardSchedule, ForwardSchedule
from bssn_kernels.bench.workloads import WORKLOADS
from bssn_kernels.plan import LayerSpec, Layout, layer_rows, layer_table
from bssn_kernels.variants import resolve_variant

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "gpu_h200_tuning.jsonl"
# The order and the tiles that those runs had.
THEN = {"order": {"SUM_US": 15.0, "TILE_US": 5.0}, "usual": {"LARGEST_TILE": 49152}}

# About what devices give; L2 by what still behaves like a cache.
H200 = Device(each=27e3)
DEVICES = {
    "H200": (Machine(), H200),
    "H100": (Machine(528, 3.0e6, 50 << 20), Device(hbm=2.6e6, l2_rate=5e6, l2=38e6, each=27e3)),
    "A100": (Machine(432, 1.8e6, 40 << 20), Device(432, hbm=1.6e6, l2_rate=3.5e6, l2=28e6, each=20e3)),
}


def rows_of(workload: str, variant="sn", semantics="torch") -> list:
    rule = {"variant": resolve_variant(variant), "semantics": semantics}
    specs = [LayerSpec.of(torch.empty(layer.shape, device="meta"), **rule) for layer in WORKLOADS[workload].layers]
    return layer_rows(layer_table(specs, Layout(specs)))


def schedule_of(workload: str, variant="sn", semantics="torch", machine=None) -> ForwardSchedule:
    rows = rows_of(workload, variant, semantics)
    return ForwardSchedule(rows, [1] * len(rows), 4, machine and (lambda _: machine))


def measured(workload: str) -> dict[int, float]:
    """Microseconds of the Triton forward, SN, on an H200, by the size of the largest tile; the last run that has it."""
    found: dict[int, float] = {}
    for line in RESULTS.read_text().splitlines():
        record = json.loads(line)
        kind = [record.get(name) for name in ("backend", "workload", "variant")]
        if kind == ["triton", workload, "sn"] and record["run"] in (3, 4):
            settings = THEN["usual"] | {"TILES": 64} | record["settings"]
            if settings["TILES"] == 64:
                found[settings["LARGEST_TILE"]] = record["forward"][0] * 1e3
    return found


@pytest.mark.parametrize("workload", ["biggan128", "vit_b", "paper_resnet"])
def test_the_model_takes_the_times_that_were_measured(workload):
    times = measured(workload)
    assert len(times) >= 2
    for tile, us in times.items():
        with patch.multiple(_geometry, LARGEST_TILE=tile, FIRST_TILE=tile), patch.multiple(_order, **THEN["order"]):
            played = play(schedule_of(workload), Device())
        assert played.us == pytest.approx(us, rel=0.12), tile


CASES = [  # vit_b has linear layers alone, which have one direction
    *(("sn", order, name) for order in ("torch", "torch_hook") for name in ("biggan128", "vit_b", "paper_resnet")),
    *(("bssn", order, name) for order in ("torch", "biggan") for name in ("biggan128", "paper_resnet")),
]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(("variant", "semantics", "workload"), CASES, ids=["-".join(case) for case in CASES])
def test_second_products_read_from_l2(variant, semantics, workload, name):
    machine, device = DEVICES[name]
    if variant == "bssn":  # three programs an SM
        programs = machine.programs * 3 // 4
        machine, device = replace(machine, programs=programs), replace(device, programs=programs)
    schedule = schedule_of(workload, variant, semantics, machine)
    second = "inner" if schedule.geometries[0].columns_first else "outer"
    played = play(schedule, device)
    assert played.hits[second] >= 0.5, played
    # The three large layers of paper_resnet leave little to do while the sums of the last one are on their way.
    assert played.waited < (0.25 if workload == "paper_resnet" else 0.12), played


@pytest.mark.parametrize("workload", ["biggan128", "vit_b", "paper_resnet"])
def test_hardly_anybody_waits_in_the_backward(workload):
    rows = rows_of(workload)
    played = play(BackwardSchedule(rows, range(len(rows)), 4), Device())
    assert played.waited < 0.12 and played.hits["dot"] == 0, played


def test_scale_passes_read_from_l2_where_layers_fit():
    """Those of vit_b are 2 to 9 MB each; the largest three of biggan128 are 85 MB, and pass through."""
    assert play(schedule_of("vit_b"), H200).hits["scale"] >= 0.6
    assert play(schedule_of("biggan128"), H200).hits["scale"] < 0.3


def test_the_model_tells_orders_apart():
    """With the tiles and the order of the first runs hardly anything is found, as on the device."""
    usual = _geometry.LARGEST_TILE
    with patch.multiple(_geometry, FIRST_TILE=usual), patch.multiple(_order, **THEN["order"]):
        before = play(schedule_of("biggan128"), H200)
    now = play(schedule_of("biggan128"), H200)
    assert before.hits["outer"] < 0.2 < 0.5 < now.hits["outer"]
    assert now.hbm < 0.85 * before.hbm and now.us < before.us
