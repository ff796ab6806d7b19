"""What the backends for GPUs have in common, without a GPU: tables, half precision, training, very large layers.

Triton's kernels run in its interpreter, those of csrc/cuda on a model of a device.
"""

import copy
import dataclasses
import importlib
import os
import threading

import pytest
import torch
import torch.nn as nn
from drafts import Layer, draft_of, run
from nets import close, images, native, same, state
from zoo import Case, build, home

import bssn_kernels as bk
from bssn_kernels import backends, functional
from bssn_kernels.backends import _launch
from bssn_kernels.backends._geometry import FLAT
from bssn_kernels.backends._tables import (
    INNER,
    LAYER_FIELDS,
    OUTER,
    ROLE_FIELDS,
    SCALE,
    TILE_FIELDS,
    UPDATE,
)
from bssn_kernels.plan import SCALARS, LayerSpec, Layout, layer_table
from bssn_kernels.variants import Variant


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request) -> str:
    """Played by the CPU; where there is a GPU test_gpu.py has the like."""
    reasons = backends.get(request.param).unsupported()
    if home(request.param).type != "cpu":
        pytest.skip("there is a GPU")
    if reasons:
        (pytest.fail if os.environ.get("BSSN_STRICT") == "1" else pytest.skip)("; ".join(reasons))
    return request.param


class TestTables:
    """They are made once; a call in the steady state builds and uploads nothing."""

    @pytest.fixture
    def made(self, monkeypatch) -> list[str]:
        made = []
        upload, make = _launch.State._upload, _launch.Launch.make

        def note_upload(*args):
            made.append("addresses")
            return upload(*args)

        def note_make(schedule, *args):
            made.append(type(schedule).__name__)
            return make(schedule, *args)

        monkeypatch.setattr(_launch.State, "_upload", staticmethod(note_upload))
        monkeypatch.setattr(_launch.Launch, "make", note_make)
        return made

    def call(self, plan, layer, iterations=1):
        out = functional.spectral_normalize([layer.weight], layer.vectors, plan, iterations).weights[0]
        out.sum().backward()

    def test_steady_state(self, gpu_backend, made):
        layer = build(Case("conv2d", variant="bssn"))
        plan = functional.make_plan([layer.spec], gpu_backend)
        self.call(plan, layer)
        assert made == ["ForwardSchedule", "addresses", "BackwardSchedule", "addresses"]
        self.call(plan, layer)
        assert len(made) == 4

    def test_other_iterations_and_back(self, gpu_backend, made):
        layer = build(Case("linear"))
        plan = functional.make_plan([layer.spec], gpu_backend)
        for iterations in (1, 0, 1, 0):
            self.call(plan, layer, iterations)
        assert made.count("ForwardSchedule") == 2 and made.count("BackwardSchedule") == 1

    def test_tensors_that_moved(self, gpu_backend, made):
        layer = build(Case("linear"))
        plan = functional.make_plan([layer.spec], gpu_backend)
        self.call(plan, layer)
        made.clear()
        layer.vectors = [x.clone() for x in layer.vectors]
        self.call(plan, layer)
        assert made == ["addresses"]

    def test_vectors_without_state_stay_where_they_are(self, gpu_backend, made):
        """A vector under order uv starts from ones, which are the plan's."""
        layer = build(Case("vector"))
        plan = functional.make_plan([layer.spec], gpu_backend)
        self.call(plan, layer)
        made.clear()
        self.call(plan, layer)
        assert made == []

    @pytest.mark.parametrize("what", ["vectors", "gain"])
    def test_the_same_memory_as_another_dtype(self, gpu_backend, what):
        """Where a tensor was freed and one of another dtype came in its place."""
        layer = build(Case("linear", gain=True))
        plan, gains = functional.make_plan([layer.spec], gpu_backend), [torch.full((1,), 0.7)]
        vectors, memory = layer.vectors, [x.clone() for x in layer.vectors]

        def call(vectors, gains) -> torch.Tensor:
            return functional.spectral_normalize([layer.weight.detach()], vectors, plan, gains=gains).weights[0]

        call(memory, gains)
        if what == "gain":
            other = gains[0].view(torch.bfloat16)[:1].fill_(0.7)
            found, expected = call(memory, [other]), call([x.clone() for x in vectors], [torch.full((1,), 0.7)])
        else:
            halves = [x.view(torch.bfloat16)[: x.numel()] for x in memory]
            for half, x in zip(halves, vectors):
                half.copy_(x)
            found, expected = call(halves, gains), call([x.float() for x in halves], gains)
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=0)

    def test_vectors_of_half_precision_beside_a_weight_without(self, gpu_backend, made):
        """A module in bfloat16 with a 1-D weight, which starts from ones: nothing is cast or uploaded anew."""
        weights = [torch.randn(5, 4).bfloat16(), torch.randn(6).bfloat16()]
        plan = functional.plan_for(weights, backend=gpu_backend)
        vectors = [torch.randn(n).bfloat16() for n in plan.sizes]
        for _ in range(3):
            functional.spectral_normalize(weights, vectors, plan)
        assert made == ["ForwardSchedule", "addresses"]

    def test_few_are_kept(self, gpu_backend):
        """Whatever the mixtures of training and evaluation, and however often tensors move."""
        weights = [torch.randn(2, 3) for _ in range(6)]
        plan = functional.plan_for(weights, backend=gpu_backend)
        vectors = [torch.randn(n) for n in plan.sizes]
        state = _launch.State.of(plan.tables[0])
        state.kept = 4
        for i in range(2 + state.kept):
            iterations = [i >> k & 1 for k in range(6)]
            functional.spectral_normalize(weights, [x.clone() for x in vectors], plan, iterations)
        assert len(state._launches) == len(state._addresses) == state.kept

    def test_a_backward_for_each_of_many_layers(self, gpu_backend, made):
        """As with as many buckets: all of them are kept."""
        net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)))
        bk.normalize(net, backend=gpu_backend, backward_buckets=40)
        for _ in range(2):
            net(torch.randn(1, 2)).sum().backward()
        assert made.count("BackwardSchedule") == 40

    def test_a_plan_can_be_copied_and_saved(self, gpu_backend, tmp_path, monkeypatch):
        """What is kept for it stands on the device, with streams and events, and is made anew."""
        monkeypatch.setattr(_launch.State, "_upload", self.as_on_a_device(_launch.State._upload))
        layer = build(Case("linear"))
        plan = functional.make_plan([layer.spec], gpu_backend)
        out = functional.spectral_normalize([layer.weight], layer.vectors, plan).weights[0]
        other = copy.deepcopy(plan)
        assert torch.equal(functional.spectral_normalize([layer.weight], layer.vectors, other).weights[0], out)
        torch.save(plan.tables, tmp_path / "tables")
        assert all(map(torch.equal, torch.load(tmp_path / "tables", weights_only=False), plan.tables))

    @staticmethod
    def as_on_a_device(upload):
        def with_event(*args):
            addresses = upload(*args)
            addresses.uploaded = threading.Lock()  # no more to be copied than an event
            return addresses

        return staticmethod(with_event)

    def test_what_is_used_stays(self, gpu_backend, made):
        plan = functional.plan_for([torch.randn(2, 3)], backend=gpu_backend)
        _launch.State.of(plan.tables[0]).kept = 2
        weights, vectors = [torch.randn(2, 3)], [torch.randn(n) for n in plan.sizes]
        for iterations in (1, 2, 1, 3, 1, 4, 1):
            functional.spectral_normalize(weights, vectors, plan, iterations)
        assert made.count("ForwardSchedule") == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
def test_a_class_for_each_of_many_columns(gpu_backend, dtype):
    """Large kernels, as of a patch embedding: a row of an update needs more numbers of the vectors than anywhere."""
    shapes = [(24, 3, 16, 16), (16, 3, 20, 20), (9, 4, 8, 8, 4), (40, 1, 128)]
    drafts = [draft_of(shape, i, semantics="paper", axis=i == 1) for i, shape in enumerate(shapes)]
    found, expected = (run([Layer(draft, dtype) for draft in drafts], name) for name in (gpu_backend, "reference"))
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        for x, y in zip(a, b, strict=True):
            error = (x.double() - y.double()).norm() / y.double().norm()
            assert error < {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 1e-2}[dtype], shapes[i]


@pytest.mark.parametrize("module", [nn.Linear(30, 20), nn.Conv2d(6, 8, 3), nn.ConvTranspose2d(4, 6, 4)])
def test_vectors_of_a_half_precision_module(gpu_backend, module):
    """Buffers in the weight's dtype are read as they are."""
    layer = bk.spectral_norm(module.to(torch.bfloat16), backend=gpu_backend, variant="bssn")
    other = copy.deepcopy(layer)
    other.parametrizations.weight[0].backend = "reference"
    # bf16 of the one is cut off where that of the other is rounded: one unit in the last place of 8 bits.
    torch.testing.assert_close(layer.weight, other.weight, rtol=2**-7, atol=0)


@pytest.mark.parametrize("form", ["parametrization", "hook"])
def test_a_discriminator_trains_as_on_the_cpu_backend(gpu_backend, form):
    """`fuse`, a few steps of training, in fp64 to 1e-12 and with the same buffers."""
    nets = {name: native(form) for name in (gpu_backend, "cpu")}
    losses = {name: [] for name in nets}
    for name, net in nets.items():
        group = bk.fuse(net, backend=name)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            real, fake = images(seed=step), images(seed=100 + step)
            loss = (1 - net(real)).relu().mean() + (1 + net(fake)).relu().mean()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
        assert name in repr(group)
        net.eval()
        losses[name].append(net(images(seed=7)).sum().item())
    assert losses[gpu_backend] == pytest.approx(losses["cpu"], rel=1e-12)
    close(state(nets[gpu_backend]), state(nets["cpu"]), rtol=1e-11)
    assert not same(state(nets[gpu_backend]), state(native(form)))


class TestBeyond32Bits:
    """A layer of more than 2^31 numbers, of which the kernels do the first and the last tiles: the memory in between is
    never touched.
    """

    P, L = 65_537, 32_768  # the last row is a block of its own

    @pytest.fixture
    def made(self, gpu_backend, monkeypatch) -> list[torch.Tensor]:
        """torch.empty leaves memory alone, and what the backend takes is noted."""
        before, empty, made = torch.utils.deterministic.fill_uninitialized_memory, torch.empty, []
        torch.utils.deterministic.fill_uninitialized_memory = False

        def note(*args, **kwargs):
            made.append(empty(*args, **kwargs))
            return made[-1]

        monkeypatch.setattr(torch, "empty", note)
        if gpu_backend == "triton":
            builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
            monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=True))
        yield made
        torch.utils.deterministic.fill_uninitialized_memory = before

    @pytest.fixture
    def layer(self, made):
        weight = torch.empty(self.P, self.L, dtype=torch.bfloat16)
        assert weight.numel() > 2**31
        generator = torch.Generator().manual_seed(0)
        for row in (0, -1):
            weight[row].copy_(torch.randn(self.L, generator=generator))
        spec = LayerSpec.of(weight, variant=Variant())
        return weight, layer_table([spec], Layout([spec])), Layout([spec]).numel

    @pytest.fixture
    def only(self, monkeypatch):
        """Keeps some tiles of a schedule, which then wait for nothing."""
        make = _launch.Launch.make

        def keep(wanted) -> None:
            def make_less(schedule, *args):
                tiles = [dict(zip(TILE_FIELDS, tile)) for tile in schedule.tiles.tolist()]
                tiles = [{**tile, "wait_target": 0} for tile in tiles if wanted(tile)]
                assert 0 < len(tiles) < 200
                schedule.tiles = torch.tensor([list(tile.values()) for tile in tiles], dtype=torch.int32)
                keep.schedule = schedule
                return make(schedule, *args)

            monkeypatch.setattr(_launch.Launch, "make", make_less)

        return keep

    def test_scale(self, gpu_backend, layer, made, only, monkeypatch):
        weight, table, saved_numel = layer
        last = weight.numel() - self.L
        only(
            lambda tile: (
                tile["kind"] == SCALE and (tile["row0"] * FLAT < self.L or tile["row0"] * FLAT + tile["rows"] > last)
            )
        )
        noting = torch.empty

        def with_multiplier(*size, **kwargs):
            out = noting(*size, **kwargs)
            return out.fill_(2.0) if size == (saved_numel,) else out

        monkeypatch.setattr(torch, "empty", with_multiplier)
        vectors = [torch.ones(self.P), torch.ones(self.L)]
        (out,), _ = backends.get(gpu_backend).normalize([weight], vectors, [], [table], [1], saved_numel, None)
        for row in (0, -1):
            assert torch.equal(out[row], weight[row] * 2)

    def test_products(self, gpu_backend, layer, made, only, monkeypatch):
        """s = M v of the last row, then the part of M^T s that the last row gives to the last columns."""
        monkeypatch.setenv("BSSN_MODEL_RESIDENT", "1")  # one tile after the other, since none waits
        weight, table, saved_numel = layer
        only(
            lambda tile: (
                tile["row0"] == self.P - 1
                and (tile["kind"] == INNER or (tile["kind"] == OUTER and tile["end"] == self.L))
            )
        )
        v = torch.randn(self.L)
        backends.get(gpu_backend).normalize([weight], [torch.ones(self.P), v], [], [table], [1], saved_numel, None)
        fields = dict(zip(LAYER_FIELDS + ROLE_FIELDS, only.schedule.layers[0].tolist()))
        work = next(x for x in made if x.numel() == only.schedule.workspace)
        s = work[fields["slab"] + self.P - 1]
        torch.testing.assert_close(s, weight[-1].float() @ v, rtol=1e-4, atol=0)
        part = fields["outer_partial"] + (fields["outer_slots"] - 1) * self.L
        begin = only.schedule.tiles[only.schedule.tiles[:, 0] == OUTER][0, TILE_FIELDS.index("col0")]
        torch.testing.assert_close(work[part + begin : part + self.L], weight[-1, begin:].float() * s)

    def test_update(self, gpu_backend, layer, made, only):
        weight, table, saved_numel = layer
        only(lambda tile: tile["kind"] == UPDATE and tile["row0"] == self.P - 1)
        grad, saved = torch.empty_like(weight), torch.zeros(saved_numel)
        grad[-1].copy_(torch.randn(self.L))
        saved[self.P + self.L + SCALARS.index("multiplier")] = 0.5  # no slope, so no rank term: <G, W> is not there
        (found,), _ = backends.get(gpu_backend).normalize_backward([grad], [weight], saved, [table], [0])
        assert torch.equal(found[-1], grad[-1] * 0.5)
