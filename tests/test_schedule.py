"""The schedules of the GPU backends, as data: see schedule_model.py."""

import random
from collections import Counter
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from schedule_model import Model, products
from test_random_groups import layer_drafts

from bssn_kernels.backends import _geometry, _order, _tables
from bssn_kernels.backends._launch import machine_of
from bssn_kernels.backends._order import Machine
from bssn_kernels.backends._schedule import BackwardSchedule, ForwardSchedule
from bssn_kernels.bench.workloads import WORKLOADS
from bssn_kernels.plan import LayerSpec, Layout, accumulation_dtype, layer_rows, layer_table
from bssn_kernels.variants import resolve_variant


def rows_of(specs):
    layout = Layout(specs)
    return layer_rows(layer_table(specs, layout)), layout


def specs_of(drafts, dtype=torch.float32):
    from zoo import lay_out

    specs = []
    for draft in drafts:
        weight = lay_out(torch.empty(draft["shape"], dtype=dtype), draft["layout"])
        rule = {key: draft[key] for key in ("axis", "variant", "semantics", "gain")}
        specs.append(LayerSpec.of(weight, **rule))
    return specs


@st.composite
def larger_drafts(draw) -> dict:
    """Layers of several tiles, row blocks and column blocks."""
    draft = draw(layer_drafts())
    shapes = [(130, 70, 3, 3), (300, 600), (40, 20, 7, 7), (17, 33, 5, 5), (9, 3000), (2000, 9), (40, 4096), (900, 256)]
    shape = draw(st.sampled_from(shapes))
    layout = draw(st.sampled_from(["contiguous", "exchanged"] + ["channels_last"] * (len(shape) == 4)))
    return {**draft, "shape": shape, "layout": layout}


groups = st.lists(layer_drafts() | larger_drafts(), min_size=1, max_size=5)
settings = hypothesis.settings(max_examples=40, suppress_health_check=list(hypothesis.HealthCheck))


def forward(drafts, dtype=torch.float32):
    specs = specs_of(drafts, dtype)
    rows, layout = rows_of(specs)
    iterations = [1 if not spec.stores_vectors else draft["iterations"] for spec, draft in zip(specs, drafts)]
    whole_rows = [draft["layout"] != "offset" for draft in drafts]
    return ForwardSchedule(rows, iterations, dtype.itemsize, whole_rows=whole_rows), layout, iterations


def assert_apart(places: list[tuple[int, int]], size: int) -> None:
    """No two places overlap, and all are within the buffer."""
    end = 0
    for begin, n in sorted(places):
        assert begin >= end
        end = begin + n
    assert end <= size


@settings
@hypothesis.given(drafts=groups, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_forward_in_order(drafts, dtype):
    """Tiles wait only for earlier ones; products cover each weight once; everything is written once."""
    schedule, layout, iterations = forward(drafts, dtype)
    model = Model(schedule, layout.numel)
    assert_apart(model.doubles(), schedule.doubles)
    model.in_order()
    model.check_results(layout.vectors_numel)
    # A source names one of two alternating iterations, so from the third on each stands for several.
    for (k, _, source, _), (least, most) in products(model).items():
        assert least == most and least >= 1
        if source == _tables.STORED:
            assert most == 1, f"layer {k} of {iterations[k]} iterations"


@settings
@hypothesis.given(drafts=groups, seed=st.integers(0, 2**31))
def test_forward_at_random(drafts, seed):
    """1 to 12 resident programs in any order: none gets stuck, and partial sums are never another's."""
    rng = random.Random(seed)
    schedule, layout, _ = forward(drafts)
    model = Model(schedule, layout.numel)
    programs = rng.randint(1, 24)
    model.at_random(programs, rng.randint(1, min(12, programs)), rng)
    model.check_results(layout.vectors_numel)


@settings
@hypothesis.given(drafts=groups, seed=st.integers(0, 2**31))
def test_backward(drafts, seed):
    """The same for the backward, of some of the layers."""
    rng = random.Random(seed)
    rows, layout = rows_of(specs_of(drafts))
    layers = sorted(rng.sample(range(len(rows)), rng.randint(1, len(rows))))
    for order in ("in order", "at random"):
        schedule = BackwardSchedule(rows, layers, 4)
        model = Model(schedule, layout.numel)
        assert_apart(model.doubles(), schedule.doubles)
        if order == "in order":
            model.in_order()
        else:
            programs = rng.randint(1, 24)
            model.at_random(programs, rng.randint(1, min(12, programs)), rng)
        model.check_results(0)
        assert all(span == (1, 1) for span in products(model).values())


@pytest.mark.parametrize("many", [(256, 256, 3, 3), (1000, 700)])
def test_partial_sums_take_turns(many, monkeypatch):
    """Many layers share the memory of few: those that take it over wait, and nothing is overwritten too early."""
    monkeypatch.setattr(_order, "RING", 2 << 20)
    variant = resolve_variant("sn" if len(many) == 2 else "bsn")
    specs = [LayerSpec.of(torch.empty(many), variant=variant) for _ in range(60)]
    rows, layout = rows_of(specs)
    for iterations, whole in ((1, False), (2, False), (1, True), (2, True)):
        schedule = ForwardSchedule(rows, [iterations] * len(rows), 4, whole_rows=[whole] * len(rows))
        alone = ForwardSchedule(rows[:1], [iterations], 4, whole_rows=[whole])
        assert ("rows" in schedule.traffic) == (whole and len(many) == 2)
        assert schedule.workspace < 0.6 * len(rows) * alone.workspace
        for seed in range(2):
            model = Model(schedule, layout.numel)
            model.at_random(12, 7, random.Random(seed))
            model.check_results(layout.vectors_numel)


class Planted:
    """A fault in a good schedule."""

    @staticmethod
    def early(model):
        """Products that do not wait for the vector they read."""
        for tile in model.tiles:
            if tile["kind"] in (_tables.OUTER, _tables.COMBINE):
                tile["wait_target"] = 0

    @staticmethod
    def lost(model):
        """A block that expects a tile too many."""
        model.blocks[0]["arrivals"] += 1

    @staticmethod
    def shared(model):
        """Two tiles that leave their sums at one place."""
        kinds = (_tables.OUTER, _tables.ROWS)
        first, second = [t for t in model.tiles if t["kind"] in kinds and t["col0"] == 0][:2]
        second["slot0"] = first["slot0"]

    @staticmethod
    def swapped(model):
        """A scale pass before its products."""
        at = next(i for i, t in enumerate(model.tiles) if t["kind"] == _tables.SCALE)
        model.tiles.insert(0, model.tiles.pop(at))

    @staticmethod
    def unscaled(model):
        """A scale pass that waits for nothing."""
        model.tiles = [{**t, "wait_target": 0} if t["kind"] == _tables.SCALE else t for t in model.tiles]

    @staticmethod
    def unwritten(model):
        """New vectors that wait for nothing."""
        model.tiles = [{**t, "wait_target": 0} if t["kind"] == _tables.VECTORS else t for t in model.tiles]

    @staticmethod
    def elsewhere(model):
        """New vectors that are read where nobody put them."""
        for part in model.parts:
            part["raw"] += 16

    @staticmethod
    def doubled(model):
        """A scale tile that is done twice."""
        model.tiles.append(dict(model.tiles[-1]))


@pytest.mark.parametrize("whole", [False, True], ids=["pieces", "whole"])
@pytest.mark.parametrize("fault", [name for name in vars(Planted) if not name.startswith("_")])
def test_the_model_finds_planted_faults(fault, whole):
    specs = [LayerSpec.of(torch.empty(300, 600), variant=resolve_variant("sn"))]
    rows, layout = rows_of(specs)

    def found() -> bool:
        for programs in (1, 6, 60):
            model = Model(ForwardSchedule(rows, [1], 4, whole_rows=[whole]), layout.numel)
            getattr(Planted, fault)(model)
            try:
                model.at_random(programs, programs, random.Random(programs))
                model.check_results(layout.vectors_numel)
            except AssertionError:
                return True
        return False

    assert found()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_workspace_and_traffic(workload, layout, dtype):
    """At most 2 % of the weights or 8 MB; each pass reads every weight once, and every result is written once."""
    for variant in ("sn", "bssn"):
        for semantics in ("torch", "torch_hook", "paper"):  # rows first, columns first, both at once
            specs = []
            for layer in WORKLOADS[workload].layers:
                weight = torch.empty(layer.shape, dtype=dtype, device="meta")
                if layout == "channels_last" and weight.ndim == 4:
                    weight = weight.to(memory_format=torch.channels_last)
                axis = int(layer.kind == "deconv")
                rule = {"variant": resolve_variant(variant), "semantics": semantics}
                specs.append(LayerSpec.of(weight, axis=axis, **rule))
            rows, _ = rows_of(specs)
            nbytes = WORKLOADS[workload].numel * dtype.itemsize
            accumulation = accumulation_dtype(dtype).itemsize
            forward = ForwardSchedule(rows, [1] * len(rows), dtype.itemsize)
            whole = ForwardSchedule(rows, [1] * len(rows), dtype.itemsize, whole_rows=[True] * len(rows))
            backward = BackwardSchedule(rows, range(len(rows)), dtype.itemsize)
            for schedule in (forward, whole, backward):
                taken = schedule.workspace * accumulation + schedule.doubles * 8 + schedule.n_counters * 32
                assert taken <= max(0.02 * nbytes, 8e6)
            passes = 2 if semantics == "paper" and variant == "bssn" and workload != "vit_b" else 1
            assert nbytes <= forward.traffic["inner"] <= passes * nbytes
            assert nbytes <= forward.traffic["outer"] <= passes * nbytes
            read = Counter(whole.traffic)
            assert read["inner"] + read["rows"] == forward.traffic["inner"]
            assert read["outer"] + read["rows"] == forward.traffic["outer"]
            assert forward.traffic["scale"] == forward.traffic["written"] == read["scale"] == read["written"] == nbytes
            assert backward.traffic["dot"] == 2 * nbytes
            assert backward.traffic["update"] == backward.traffic["written"] == nbytes
            assert len(forward.tiles) < 25_000


@pytest.mark.parametrize("itemsize", [8, 4, 2])
@pytest.mark.parametrize("shape", [(10239, 4096), (11008, 4096), (14336, 4096), (65536, 1024), (10**5, 256), (9, 4096)])
def test_whole_rows_have_room_and_few_terms(shape, itemsize):
    """Many rows have more or larger tiles, as long as partial sums have room and no sum has too many terms."""
    dtype = {8: torch.float64, 4: torch.float32, 2: torch.bfloat16}[itemsize]
    specs = [LayerSpec.of(torch.empty(shape, dtype=dtype, device="meta")) for _ in range(4)]
    rows, _ = rows_of(specs)
    schedule = ForwardSchedule(rows, [1] * 4, itemsize, whole_rows=[True] * 4)
    taken = schedule.workspace * max(itemsize, 4) + schedule.doubles * 8 + schedule.n_counters * 32
    assert taken <= max(0.02 * 4 * specs[0].shape[0] * specs[0].shape[1] * itemsize, 8 << 20)
    for geometry in schedule.geometries:
        longest = _geometry.WHOLE_ROWS[itemsize][1]
        at_once = 1 if longest // 4 < geometry.L else 4
        too_many = shape == (14336, 4096) or (shape == (65536, 1024) and itemsize == 8)
        assert geometry.whole == (longest >= geometry.L and not too_many)
        assert not geometry.whole or max(n for _, n in geometry.row_blocks) <= _geometry.WHOLE_TERMS * at_once


def test_the_order_of_sums_depends_on_the_layer_alone():
    """Tiles, slots and blocks of a layer are the same in any group."""
    torch.manual_seed(0)
    shapes = [(64, 32, 3, 3), (300, 600), (5, 7), (1000, 50)]
    specs = [LayerSpec.of(torch.empty(shape), variant=resolve_variant("bsn")) for shape in shapes]

    def sums(subset) -> list[list[tuple]]:
        rows, _ = rows_of([specs[i] for i in subset])
        schedule = ForwardSchedule(rows, [2] * len(rows), 4, whole_rows=[True] * len(rows))
        tiles = Model(schedule, 1).tiles
        fields = ("kind", "row0", "rows", "col0", "chunks", "step", "width", "end", "slot0", "slot1", "mask", "source")
        products = [t for t in tiles if t["kind"] in (_tables.INNER, _tables.OUTER, _tables.ROWS)]
        layers = range(len(subset))
        return [sorted(tuple(t[f] for f in fields) for t in products if t["layer"] == k) for k in layers]

    together = sums([0, 1, 2, 3])
    assert sums([2, 0]) == [together[2], together[0]] and [sums([i])[0] for i in range(4)] == together


def test_the_machine_decides_the_order_alone():
    """Another device takes the same tiles in another order, with the same sums in the same places of their layer."""
    rows, _ = rows_of([LayerSpec.of(torch.empty(512, 256, 3, 3, device="meta")) for _ in range(6)])
    machines = Machine(), Machine(80, 0.28e6, 4 << 20)
    order = [ForwardSchedule(rows, [1] * 6, 4, lambda _, m=m: m).tiles.tolist() for m in machines]
    fields = [_tables.TILE_FIELDS.index(name) for name in ("wait", "wait_target")]  # of batches: memory in turn
    plain = [sorted(tuple(x for i, x in enumerate(tile) if i not in fields) for tile in tiles) for tiles in order]
    assert order[0] != order[1] and plain[0] == plain[1]


def test_the_order_is_made_for_the_device(monkeypatch):
    """What a device tells of itself, and an H200's numbers where it tells nothing."""
    told = SimpleNamespace(memory_clock_rate=1_593_000, memory_bus_width=5120, L2_cache_size=40 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    machine = machine_of(torch.device("cuda"), 432)
    assert (machine.programs, machine.l2) == (432, 40 << 20)
    assert machine.bytes_per_us == pytest.approx(0.9 * 2.039e6, rel=1e-3)  # an A100 80 GB: 2,039 GB/s on paper
    assert machine_of(torch.device("cpu"), 432) == Machine()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=0))
    assert machine_of(torch.device("cuda"), 432) == Machine(432)
