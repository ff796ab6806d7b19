"""The Triton backend's surroundings, in the interpreter: grids, counters, tables, selection, very large layers."""


import pytest
import torch
from drafts import Layer, assert_same_bits, draft_of, run
from zoo import Case, build, check, lay_out

from bssn_kernels import backends, functional
from bssn_kernels.backends import _launch, triton
from bssn_kernels.plan import LayerSpec
from bssn_kernels.variants import Variant, semantics_names

pytestmark = pytest.mark.usefixtures("interpreted_triton")


def drafts() -> list[dict]:
    """Layers of several tiles and of one, of every scheme of columns."""
    return [
        draft_of((20, 24, 3, 3), 1, semantics="torch"),
        draft_of((10, 20, 3, 3), 2, semantics="paper", layout="channels_last"),
        draft_of((40, 130), 3, semantics="torch_hook", iterations=3),
        draft_of((3, 2, 17, 17), 4, semantics="miyato", iterations=1),
        draft_of((16, 10, 4, 4), 5, semantics="biggan", axis=1, layout="exchanged"),
        draft_of((9,), 6, semantics="paper", iterations=0),
        draft_of((30, 260), 7, semantics="torch", variant=Variant(1.0, 0.0)),
        draft_of((10, 32, 6, 6), 8, semantics="torch", variant=Variant(1.0, 0.0), layout="channels_last"),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_any_number_of_programs_gives_the_same_bits(monkeypatch, dtype):
    """Fresh memory is full of NaN, which shows what nobody wrote; counters are zero after every launch."""
    found = []
    for programs in (1, 2, 7):
        monkeypatch.setattr(triton, "INTERPRETED_PROGRAMS", programs)
        found.append(run([Layer(draft, dtype) for draft in drafts()], "triton"))
        assert triton.counters_of._of_stream and not any(c.any() for c in triton.counters_of._of_stream.values())
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@pytest.mark.parametrize("columns", [131, 260], ids=["unaligned", "whole rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_one_direction_beside_two(dtype, columns):
    """A layer of one direction keeps its bits where the kernel is the one for two directions.

    In fp64 a sum along a row that is read number by number shows it here: NumPy adds 128 numbers as halves of them
    would be, but not 256.
    """
    single = draft_of((24, columns), 1, variant=Variant(1.0, 0.0))
    alone = run([Layer(single, dtype)], "triton")
    beside = run([Layer(single, dtype), Layer(draft_of((16, 5, 3, 3), 2), dtype)], "triton")
    assert_same_bits(beside[:1], alone)


def schedules(plan) -> list[dict[str, int]]:
    """What the launches of a plan read and write, by phase."""
    return [launch.schedule.traffic for launch in _launch.State.of(plan.tables[0])._launches.values()]


def test_whole_rows():
    """Read once where the weight stands at a multiple of 16 bytes; else in pieces, as where nothing is iterated."""
    cases = [Case("rows_576"), Case("linear")]
    layers = [build(case) for case in cases]
    weights, vectors = [x.weight.detach() for x in layers], [v for x in layers for v in x.vectors]
    plan = functional.make_plan([layer.spec for layer in layers], "triton")
    functional.spectral_normalize(weights, vectors, plan, [1, 1])
    functional.spectral_normalize(weights, vectors, plan, [0, 1])
    elsewhere = [lay_out(weights[0], "offset"), weights[1]]
    functional.spectral_normalize(elsewhere, vectors, plan, [1, 1])
    large, small = (4 * w.numel() for w in weights)
    read = [(found.get("rows", 0), found["inner"], found.get("outer", 0)) for found in schedules(plan)]
    assert read == [(large, small, small), (0, large + small, small), (0, large + small, large + small)]


@pytest.mark.parametrize("layer", ["rows_576", "rows_1032"])
def test_whole_rows_with_vectors_of_another_dtype(layer):
    """Vectors in bfloat16 are read as what they are in float32."""
    built = build(Case(layer, layout="channels_last" if layer == "rows_576" else "contiguous"))
    plan = functional.make_plan([built.spec], "triton")
    halves = [x.bfloat16() for x in built.vectors]
    found = functional.spectral_normalize([built.weight.detach()], halves, plan, 2)
    expected = functional.spectral_normalize([built.weight.detach()], [x.float() for x in halves], plan, 2)
    assert "rows" in schedules(plan)[0]
    assert torch.equal(found.saved, expected.saved) and torch.equal(found.weights[0], expected.weights[0])


def test_alignment_counts_where_rows_are_whole():
    """Elsewhere it makes no other launch."""
    weights = [torch.randn(33, 20), torch.randn(33, 20)]
    plan = functional.plan_for(weights, backend="triton")
    vectors = [torch.randn(n) for n in plan.sizes]
    for _ in range(2):
        functional.spectral_normalize(weights, vectors, plan)
        weights[0] = lay_out(weights[0], "offset")
    assert len(schedules(plan)) == 1


def test_launches_in_a_row():
    """A plan's second call computes what its first did."""
    layer = build(Case("conv2d", variant="bssn", iterations=2))
    plan = functional.make_plan([layer.spec], "triton")
    results = [functional.spectral_normalize([layer.weight], layer.vectors, plan, 2) for _ in range(2)]
    assert torch.equal(results[0].weights[0], results[1].weights[0])
    assert torch.equal(results[0].saved, results[1].saved)


def test_an_interrupted_launch_leaves_nothing_behind(monkeypatch):
    layer = build(Case("linear"))
    plan = functional.make_plan([layer.spec], "triton")
    expected = functional.spectral_normalize([layer.weight], layer.vectors, plan).weights[0]

    class Broken:
        def __getitem__(self, grid):
            def launch(*arguments, **settings):
                next(iter(triton.counters_of._of_stream.values())).fill_(3)
                raise KeyboardInterrupt

            return launch

    kernels = triton._kernels()
    monkeypatch.setattr(kernels, "forward_kernel", Broken())
    with pytest.raises(KeyboardInterrupt):
        functional.spectral_normalize([layer.weight], layer.vectors, plan)
    monkeypatch.undo()
    assert torch.equal(functional.spectral_normalize([layer.weight], layer.vectors, plan).weights[0], expected)


def test_tuples_have_few_lengths():
    """So that groups of like size share a compiled kernel."""
    x = torch.zeros(3)
    assert {len(triton._tuple([x] * n)) for n in range(1, 17)} == {8, 16}


class TestSelection:
    def test_never_by_itself_on_the_cpu(self, monkeypatch):
        """TRITON_INTERPRET=1 is for tests: who does not name the backend gets another one."""
        plan = functional.plan_for([torch.randn(3, 4)])
        assert plan.backend.name != "triton"
        monkeypatch.setattr(backends.cpu.CpuBackend, "unsupported", lambda self, specs=None: ["left out"])
        monkeypatch.setattr(backends, "_warned", set())
        monkeypatch.delenv("BSSN_STRICT", raising=False)
        with pytest.warns(UserWarning, match=r"triton: made for cuda, and the layers are on cpu"):
            assert functional.plan_for([torch.randn(3, 4)]).backend.name == "reference"

    def test_first_on_a_gpu(self, monkeypatch):
        """Where it can run; a machine with a GPU is made up."""
        monkeypatch.setattr(triton.TritonBackend, "unsupported", lambda self, specs=None: [])
        spec = LayerSpec.of(torch.empty(3, 4, device="meta"))
        object.__setattr__(spec, "device", torch.device("cuda"))
        monkeypatch.setattr(backends.cuda.CudaBackend, "unsupported", lambda self, specs=None: ["not built"])
        backend, passed = backends.select([spec])
        assert backend.name == "triton" and passed[0].startswith("cpu: made for cpu") and passed[1] == "cuda: not built"
        monkeypatch.setattr(backends.cuda.CudaBackend, "unsupported", lambda self, specs=None: [])
        assert backends.select([spec])[0].name == "cuda"

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda m: m.setattr(triton, "_installed", lambda: ((), "Triton is not installed")), "is not installed"),
            (lambda m: m.setenv("TRITON_INTERPRET", "0"), "no CUDA device"),
            (lambda m: m.setattr(triton, "_interpreter_reason", lambda: "needs NumPy below 2.4"), "NumPy below 2.4"),
        ],
    )
    def test_reasons_of_the_machine(self, monkeypatch, change, reason):
        if reason == "no CUDA device" and torch.cuda.is_available():
            pytest.skip("there is one")
        change(monkeypatch)
        with pytest.raises(RuntimeError, match=rf"'triton' cannot run on this machine: .*{reason}"):
            backends.check_name("triton")
        with pytest.raises(RuntimeError, match=rf"'triton' cannot take this group: .*{reason}"):
            functional.plan_for([torch.randn(3, 4)], backend="triton")

    def test_old_and_new_triton(self, monkeypatch):
        triton._installed.cache_clear()
        for version, old in (("3.2.0", True), ("3.3.0", False), ("3.10.1+git", False)):
            monkeypatch.setattr(triton.importlib.metadata, "version", lambda name, version=version: version)
            assert bool(triton._installed()[1]) == old
            triton._installed.cache_clear()

    def test_long_rows(self):
        spec = LayerSpec.of(torch.empty(2, 1 << 28, device="meta"), name="long")
        object.__setattr__(spec, "device", torch.device("cpu"))
        assert "rows of more than" in "".join(triton.TritonBackend().unsupported([spec]))


def test_group_of_many_layers_in_one_launch(monkeypatch):
    launches = []
    run_launch = triton._run
    monkeypatch.setattr(triton, "_run", lambda *a, **k: (launches.append(1), run_launch(*a, **k)))
    check([Case("linear", variant="bsn", semantics=s) for s in semantics_names()] * 3, "triton")
    assert len(launches) == 2
