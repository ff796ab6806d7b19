"""The CUDA backend without a GPU: the kernels' own code on a model of a device, however its threads interleave."""

import os
import re
import shutil

import model
import pytest
import torch
from drafts import Layer, assert_same_bits, draft_of, run
from zoo import Case, build, home

from bssn_kernels import backends, functional
from bssn_kernels.backends import _launch, cuda

MISSING = "; ".join(backends.get("cuda").unsupported()) or ("there is a GPU" if home("cuda").type != "cpu" else "")
pytestmark = pytest.mark.skipif(
    bool(MISSING) and os.environ.get("BSSN_STRICT") != "1", reason=MISSING or "the model is here"
)


def drafts() -> list[dict]:
    """Layers of several tiles and of one, of every scheme of columns, aligned and not."""
    return [
        draft_of((20, 24, 3, 3), 1, semantics="torch"),
        draft_of((10, 20, 3, 3), 2, semantics="paper", layout="channels_last"),
        draft_of((40, 132), 3, semantics="torch_hook", iterations=3),
        draft_of((3, 2, 17, 17), 4, semantics="miyato", iterations=1),
        draft_of((16, 10, 4, 4), 5, semantics="biggan", axis=1, layout="exchanged"),
        draft_of((70, 64, 3, 3), 6, semantics="paper"),
        draft_of((9,), 7, semantics="paper", iterations=0),
    ]


def interleaved(monkeypatch, resident: int, seed: int) -> None:
    monkeypatch.setenv("BSSN_MODEL_RESIDENT", str(resident))
    monkeypatch.setenv("BSSN_MODEL_SEED", str(seed))
    cuda._resident_of.cache_clear()


@pytest.fixture(autouse=True)
def as_before():
    yield
    cuda._resident_of.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_any_interleaving_gives_the_same_bits(monkeypatch, dtype):
    """Fresh memory is full of NaN, which shows what nobody wrote; counters are zero after every launch."""
    expected = None
    for seed, resident in enumerate((1, 2, 3, 7, 12, 2, 5)):
        interleaved(monkeypatch, resident, seed)
        found = run([Layer(draft, dtype) for draft in drafts()], "cuda")
        expected = expected or found
        assert_same_bits(found, expected)
        assert _launch.counters_of._of_stream and not any(c.any() for c in _launch.counters_of._of_stream.values())


def test_more_tensors_than_parameters_hold():
    """Their addresses stand in a table; 448 have room as parameters, which are 224 gradients and results."""
    assert cuda._load()[0].TENSORS < 450
    layers = [Layer(draft_of((3 + i % 4, 4 + i % 3), i), torch.float32) for i in range(450)]
    found = run(layers, "cuda")
    expected = run([Layer(draft_of((3 + i % 4, 4 + i % 3), i), torch.float32) for i in range(450)], "reference")
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_a_launch_that_fails_names_the_layers(monkeypatch):
    layers = [build(Case("conv2d")), build(Case("linear"))]
    plan = functional.make_plan([layer.spec for layer in layers], "cuda")
    call = [layer.weight for layer in layers], [x for layer in layers for x in layer.vectors], plan
    expected = functional.spectral_normalize(*call).weights

    class Failing:
        TENSORS = 448
        resident_programs = staticmethod(lambda *args: 1)

        @staticmethod
        def forward(*args):
            raise RuntimeError("cudaLaunchKernel: cudaErrorInvalidValue, invalid argument")

    monkeypatch.setattr(cuda, "_load", lambda: (Failing, ""))
    names = re.escape("'conv2d/contiguous/fp32/sn/torch/1', 'linear/contiguous/fp32/sn/torch/1'")
    text = rf"forward of 2 layers \({names}; the largest 20 x 33 x 1 in memory\) of torch.float32 on cpu: cudaLaunch"
    with pytest.raises(RuntimeError, match=text):
        functional.spectral_normalize(*call)
    monkeypatch.undo()
    for x, y in zip(functional.spectral_normalize(*call).weights, expected):
        assert torch.equal(x, y)


def test_a_module_of_other_sources_is_refused(monkeypatch):
    cuda._load.cache_clear()
    monkeypatch.setattr(cuda._tables, "TILE_FIELDS", (*cuda._tables.TILE_FIELDS[1:], "kind"))
    try:
        with pytest.raises(RuntimeError, match="'cuda' cannot run on this machine: .*built from other sources"):
            backends.check_name("cuda")
    finally:
        monkeypatch.undo()
        cuda._load.cache_clear()
    backends.check_name("cuda")


def test_never_by_itself_on_the_cpu():
    assert functional.plan_for([torch.randn(3, 4)]).backend.name != "cuda"


# What each fault does to the code, and where. All are of the kind that a device shows seldom.
FAULTS = {
    "a tile is counted before its program wrote everything": (
        "collectives.cuh",
        "BSSN_DEVICE int raise(int* counters, int i, int* shared) {\n  barrier();",
        "BSSN_DEVICE int raise(int* counters, int i, int* shared) {",
    ),
    "nobody waits for the products": (
        "collectives.cuh",
        "  return tile.wait_target <= 0 ||",
        "  return tile.wait_target < 1000 ||",
    ),
    "threads go on before the wait is over": (
        "collectives.cuh",
        "tickets.tiles[places.next()]);\n      }\n      barrier();",
        "tickets.tiles[places.next()]);\n      }",
    ),
    "the next tile takes the place of the one that is held": (
        "collectives.cuh",
        "while (place == held() || place == busy()) ++place;",
        "while (place == busy()) ++place;",
    ),
    "numbers are used while their copy is on its way": (
        "policy.cuh",
        "wait_copies<kStages<T> - 2>();",
        "wait_copies<kStages<T> - 1>();",
    ),
    "sums of one role overwrite those of the other": (
        "products.cuh",
        "      A* const mine = shared.scratch + thread() * n;\n      barrier();",
        "      A* const mine = shared.scratch + thread() * n;",
    ),
    "the counters are not cleared": (
        "collectives.cuh",
        "launch.counters[i * kCounterStride] = 0;",
        "launch.counters[i * kCounterStride] += 0;",
    ),
    "a counter is never raised": ("sums.cuh", "  raise(launch.counters, block.done, &shared.count);\n", ""),
}


@pytest.fixture(scope="module")
def sound():
    return run([Layer(draft, torch.float32) for draft in drafts()], "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(monkeypatch, tmp_path, sound, fault):
    """Each shows within a few interleavings, as wrong numbers, as a launch that would never end, or as one that spoils
    the next.
    """
    file, old, new = FAULTS[fault]
    shutil.copytree(model.ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / "cuda" / file
    text = source.read_text()
    assert text.count(old) == 1, "the fault has no place any more"
    source.write_text(text.replace(old, new))
    monkeypatch.setenv("BSSN_CUDA_MODEL", str(model.build(tmp_path / "csrc", tmp_path, "-DBSSN_MODEL_FLOAT", "-O0")))
    loaded = cuda._load.__wrapped__()
    monkeypatch.setattr(cuda, "_load", lambda: loaded)
    try:
        for seed in range(6):
            interleaved(monkeypatch, 3, seed)
            try:
                assert_same_bits(run([Layer(draft, torch.float32) for draft in drafts()], "cuda"), sound)
            except RuntimeError as error:
                assert "deadlock" in str(error) or "copies" in str(error)
                return
            except AssertionError:
                return
        pytest.fail("nothing was seen in 6 interleavings")
    finally:
        _launch.counters_of.forget()
