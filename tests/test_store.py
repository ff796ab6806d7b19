"""New vectors go to where they are stored in one call of a backend, which autograd is told of; where they are not as
the forward read them, torch copies them.
"""

import copy

import pytest
import torch
import torch.nn as nn
from nets import LAYERS, images, native, scattered
from zoo import Case, build

import bssn_kernels as bk
from bssn_kernels import backends, functional, ops
from bssn_kernels.backends._schedule import ForwardSchedule
from bssn_kernels.backends._tables import VECTOR_FIELDS
from bssn_kernels.plan import LayerSpec, Layout, layer_rows, layer_table
from bssn_kernels.variants import Semantics, Variant, semantics_names


@pytest.fixture
def stored(fused_backend, monkeypatch) -> list[bool]:
    """What the backend answered."""
    cls, answers = type(backends.get(fused_backend)), []
    store = cls.store
    monkeypatch.setattr(cls, "store", lambda *args: answers.append(store(*args)) or answers[-1])
    return answers


def norm_of(model: nn.Module, layer: str) -> nn.Module:
    return model[int(layer)].parametrizations.weight[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_as_native(fused_backend, stored, dtype):
    model = scattered(dtype)
    other, x = copy.deepcopy(model), images(dtype=dtype)
    bk.fuse(model, backend=fused_backend)
    before = {name: x._version for name, x in model.named_buffers()}
    for net in (model, other):
        net(x)
        net(x)
    assert stored == [True, True]
    for (name, found), (_, expected) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert found._version >= before[name] + 2


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("semantics", [*semantics_names(), "through"])
def test_two_directions_of_every_layout(fused_backend, stored, semantics, iterations):
    """Parts of long vectors, and vectors whose order in memory is another one."""
    layers = [nn.Conv2d(40, 3, 12), nn.Conv2d(6, 10, (3, 2)).to(memory_format=torch.channels_last)]
    layers += [nn.ConvTranspose2d(7, 12, 4), nn.Linear(5, 4), nn.Conv3d(3, 5, (2, 3, 2))]
    if semantics == "through":
        semantics = Semantics("uv", "max", "stored", "through", "forward", "normal")
    rule = {"semantics": semantics, "n_power_iterations": iterations}
    group = bk.normalize(nn.Sequential(*layers), "bssn", backend=fused_backend, **rule)
    other = copy.deepcopy(group)
    for layer in other.layers:
        layer.rule.backend = "reference"
    for one in (group, other):
        one.update()
    assert stored == [True]
    for (name, found), (_, expected) in zip(group.root.named_buffers(), other.root.named_buffers(), strict=True):
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, name


def test_a_layer_alone(fused_backend, stored):
    semantics = Semantics("vu", "add", "stored", "through", "forward", "normal")
    layers = [bk.spectral_norm(nn.Linear(8, 6), semantics=semantics, backend=fused_backend)]
    layers.append(copy.deepcopy(layers[0]))
    layers[1].parametrizations.weight[0].backend = "reference"
    for _ in range(3):
        torch.testing.assert_close(*[layer.weight for layer in layers])
    assert stored == [True] * 3


def test_no_two_programs_write_to_the_same_place():
    """On a GPU there is one for each part of a stored vector, whatever else the forward has to write."""
    rule = {"semantics": "paper", "variant": Variant(0.5, 0.5)}
    weights = [torch.empty(300, 20, 5, 5), torch.empty(7, 9000), torch.empty(6, 10, 4, 4)]
    specs = [LayerSpec.of(w, name=str(i), axis=i == 2, **rule) for i, w in enumerate(weights)]
    rows = layer_rows(layer_table(specs, Layout(specs)))
    for iterations in (0, 1, 2, 3):
        schedule = ForwardSchedule(rows, [iterations] * 3, 4)
        places: dict[tuple[int, int], list[int]] = {}
        for part in (dict(zip(VECTOR_FIELDS, part)) for part in schedule.stores.tolist()):
            e = torch.arange(part["begin"], part["begin"] + part["count"])
            at = e // part["divisor"] * part["high"] + e % part["divisor"] * part["low"]
            places.setdefault((part["layer"], part["address"]), []).extend(at.tolist())
        sizes = sorted(n for spec in specs for shape in spec.matrix_shapes for n in shape)
        assert sorted(map(len, places.values())) == sizes
        assert all(sorted(at) == list(range(len(at))) for at in places.values())
        assert len(schedule.vectors) > len(schedule.stores)


def test_a_state_can_be_copied_and_saved(fused_backend, tmp_path):
    """And stored from then: by torch, if the backend does not know what it is."""
    layer = build(Case("linear"))
    plan = functional.make_plan([layer.spec], fused_backend)
    vectors = [x.clone() for x in layer.vectors]
    saved = functional.spectral_normalize([layer.weight], vectors, plan).saved
    expected = [x.clone() for x in plan.vectors_of(saved)]
    torch.save(saved, tmp_path / "saved")
    for other in (saved, copy.deepcopy(saved), torch.load(tmp_path / "saved", weights_only=False)):
        assert torch.equal(other, saved)
        for x in vectors:
            x.zero_()
        ops.store(vectors, other, plan)
        assert all(map(torch.equal, vectors, expected))


def strided(vector: torch.Tensor) -> torch.Tensor:
    return torch.stack([vector, vector], dim=1)[:, 0]


@pytest.mark.parametrize("which", [LAYERS, LAYERS[:1]], ids=["all", "the first"])
@pytest.mark.parametrize("change", [torch.Tensor.double, torch.Tensor.bfloat16, strided])
def test_vectors_of_another_kind(fused_backend, stored, change, which):
    model = scattered(torch.float32)
    for name in which:
        norm = norm_of(model, name)
        norm._u, norm._v = change(norm._u), change(norm._v)
    exact, x = copy.deepcopy(model).double(), images()
    before = {name: x._version for name, x in model.named_buffers()}
    bk.fuse(model, backend=fused_backend)
    model(x.float())
    exact(x)
    assert stored == [False]
    for (name, found), (_, expected) in zip(model.named_buffers(), exact.named_buffers(), strict=True):
        assert found._version > before[name]
        tolerance = 2**-8 if found.dtype == torch.bfloat16 else 1e-5
        assert (found - expected).abs().max() < tolerance, name


def test_vectors_that_moved_during_the_forward(fused_backend, stored):
    """They are stored where they are then."""
    model = scattered(torch.float32)
    bk.fuse(model, backend=fused_backend)
    norm = norm_of(model, LAYERS[0])
    old, memory = norm._u.clone(), norm._u.data

    def move(module, args) -> None:
        norm._u.data = norm._u.data.clone()

    model[int(LAYERS[0])].register_forward_pre_hook(move)
    model(images(dtype=torch.float32))
    assert stored == [False] and not torch.equal(norm._u, old) and torch.equal(memory, old)
    torch.testing.assert_close(norm._u.norm(), torch.tensor(1.0))


def test_vectors_that_became_shorter(fused_backend, stored):
    """The tensors are the same objects, so that nobody else would look. Nothing is written behind their end."""
    layer = bk.spectral_norm(nn.Linear(8, 6), backend=fused_backend)
    norm, memory = layer.parametrizations.weight[0], torch.zeros(20)
    norm._v.data = memory[:3]
    with pytest.raises(ValueError, match=r"layer 'Linear.weight': expected a vector \(8,\).*got \(3,\)"):
        layer.weight  # noqa: B018
    model = scattered(torch.float32)
    bk.fuse(model, backend=fused_backend)
    model(images(dtype=torch.float32))
    vector = norm_of(model, LAYERS[0])._v
    n, whole = vector.numel(), vector.data
    vector.data = memory[:3]
    with pytest.raises(ValueError, match=rf"layer '{LAYERS[0]}': expected a vector \({n},\) .*got \(3,\)"):
        model(images(dtype=torch.float32))
    assert not memory.any()
    vector.data = whole

    def shorten(module, args) -> None:
        vector.data = memory[:3]

    model[int(LAYERS[0])].register_forward_pre_hook(shorten)
    with pytest.raises(RuntimeError, match=r"must match the size"):
        model(images(dtype=torch.float32))
    assert not memory.any() and stored == [True]


@pytest.mark.parametrize("which", ["all", "the last"])
def test_vectors_of_inference_mode(fused_backend, stored, which):
    """Outside of it torch's error, as natively, and not a silent write."""
    with torch.inference_mode(which == "all"):
        model = native("parametrization", torch.float32)
    if which == "the last":
        norm = norm_of(model, LAYERS[-1])
        with torch.inference_mode():
            norm._v = norm._v.clone()
    bk.fuse(model, backend=fused_backend)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        model(images(dtype=torch.float32))
    assert stored == []
