"""What a launch would move and how long it would take, on a model of a device: see played.py."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from played import Device, Played, play

from bssn_kernels.backends import _geometry
from bssn_kernels.backends._order import Machine
from bssn_kernels.backends._schedule import BackwardSchedule, ForwardSchedule, Schedule
from bssn_kernels.bench.workloads import WORKLOADS
from bssn_kernels.plan import LayerSpec, Layout, layer_rows, layer_table
from bssn_kernels.variants import resolve_variant

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "gpu_h200_tuning.jsonl"
# Settings of those runs that a record leaves out.
THEN = {"LARGEST_TILE": 49152, "TILES": 64}

# About what devices give; L2 by what still behaves like a cache, `each` by what the kernels have on their way.
H200 = Device(each=27e3)
DEVICES = {
    "H200": (Machine(), H200),
    "H100": (Machine(528, 3.0e6, 50 << 20), Device(hbm=2.8e6, l2_rate=5e6, l2=38e6, each=27e3)),
    "A100": (Machine(432, 1.8e6, 40 << 20), Device(432, hbm=1.7e6, l2_rate=3.5e6, l2=28e6, each=20e3)),
}


def rows_of(workload: str, variant="sn", semantics="torch") -> list:
    rule = {"variant": resolve_variant(variant), "semantics": semantics}
    specs = [LayerSpec.of(torch.empty(layer.shape, device="meta"), **rule) for layer in WORKLOADS[workload].layers]
    return layer_rows(layer_table(specs, Layout(specs)))


def schedule_of(workload: str, variant="sn", semantics="torch", machine=None, whole=False) -> ForwardSchedule:
    rows = rows_of(workload, variant, semantics)
    return ForwardSchedule(rows, [1] * len(rows), 4, machine and (lambda _: machine), [whole] * len(rows))


def nbytes(schedule: Schedule) -> int:
    return sum(geometry.numel for geometry in schedule.geometries) * schedule.itemsize


@cache
def forward(workload: str, name: str, variant="sn", semantics="torch", whole=False) -> tuple[Played, float]:
    """A forward on a device, and how often each byte of a weight would pass HBM."""
    machine, device = DEVICES[name]
    if variant == "bssn":  # three programs an SM
        programs = machine.programs * 3 // 4
        machine, device = replace(machine, programs=programs), replace(device, programs=programs)
    schedule = schedule_of(workload, variant, semantics, machine, whole)
    played = play(schedule, device)
    return played, played.hbm / nbytes(schedule)


def measured(workload: str) -> dict[int, float]:
    """Microseconds of the Triton forward, SN, on an H200, by the size of the largest tile; the last run that has it."""
    found: dict[int, float] = {}
    for line in RESULTS.read_text().splitlines():
        record = json.loads(line)
        kind = [record.get(name) for name in ("backend", "workload", "variant")]
        if kind == ["triton", workload, "sn"] and record["run"] in (3, 4):
            settings = THEN | record["settings"]
            if settings["TILES"] == THEN["TILES"]:
                found[settings["LARGEST_TILE"]] = record["forward"][0] * 1e3
    return found


@pytest.mark.parametrize("workload", ["biggan128", "vit_b", "paper_resnet"])
def test_the_model_takes_the_times_that_were_measured(workload):
    times = measured(workload)
    assert len(times) >= 2
    for tile, us in times.items():
        with patch.object(_geometry, "LARGEST_TILE", tile):
            played = play(schedule_of(workload), Device())
        assert played.us == pytest.approx(us, rel=0.12), tile


@pytest.mark.parametrize("name", DEVICES)
def test_whole_rows_are_read_once_for_both_products(name):
    """All rows of vit_b are short enough: weights are read for the products and for W_bar, which is written. In pieces
    they are read once more, and L2 is of no use: what is read again comes 100 MB later."""
    played, passes = forward("vit_b", name, whole=True)
    in_pieces, passes_in_pieces = forward("vit_b", name)
    assert passes < 3.2 and passes_in_pieces > 3.8
    assert played.us < 0.8 * in_pieces.us


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("workload", ["biggan128", "paper_resnet"])
def test_longer_rows_are_read_twice(workload, name):
    """Three quarters of these weights and more have rows that no program holds."""
    played, passes = forward(workload, name, whole=True)
    assert passes < 4.15 and played.waited < 0.06
    assert played.us < 1.05 * forward(workload, name)[0].us


def test_directions_that_contradict_each_other_share_reads():
    """Tiles of the same rows are next to each other: W passes HBM four times, and is read or written six times."""
    for workload in ("biggan128", "paper_resnet"):
        played, passes = forward(workload, "H200", "bssn", "paper")
        assert passes < 4 and played.hits["outer"] + played.hits["inner"] > 1


def test_small_sets_stay_in_l2():
    for workload in ("sngan32", "stylegan_t"):
        for semantics, whole in (("torch", True), ("torch", False), ("torch_hook", False)):
            hits = forward(workload, "H200", semantics=semantics, whole=whole)[0].hits
            assert all(share > 0.9 for kind, share in hits.items() if kind not in ("rows", _first(semantics))), hits


def _first(semantics: str) -> str:
    return "inner" if semantics == "torch" else "outer"


@pytest.mark.parametrize("workload", ["biggan128", "vit_b", "paper_resnet"])
def test_nobody_waits_in_the_backward(workload):
    rows = rows_of(workload)
    played = play(BackwardSchedule(rows, range(len(rows)), 4), H200)
    assert played.waited < 0.01 and played.hits["dot"] < 0.01, played


def test_a_tile_waits_for_all_that_it_needs():
    """Without its L2 the device reads everything from HBM, and a late sum holds up who waits for it."""
    schedule = schedule_of("sngan32", whole=True)
    usual, without = play(schedule, H200), play(schedule, replace(H200, l2=0.0))
    assert not any(without.hits.values()) and without.hbm > 1.2 * usual.hbm
    assert play(schedule, replace(H200, sums=30.0, late_sums=30.0)).us > usual.us + 25
