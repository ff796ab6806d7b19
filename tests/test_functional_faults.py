"""Bad input to the functional level: each error says which layer, what was expected and what came."""

import warnings

import pytest
import torch
from zoo import Case, build

from bssn_kernels import backends, functional
from bssn_kernels.backends.reference import ReferenceBackend
from bssn_kernels.plan import LayerSpec
from bssn_kernels.variants import Variant, resolve_variant


def spec(*shape: int, name: str = "first", dtype: torch.dtype = torch.float32, **rule) -> LayerSpec:
    return LayerSpec.of(torch.empty(shape, dtype=dtype), name=name, **rule)


@pytest.mark.parametrize(
    "specs, error, message",
    [
        ([], ValueError, "expected at least one layer, got none"),
        (
            [spec(3, 4), spec(3, 4, name="other", dtype=torch.float64)],
            ValueError,
            r"layer 'other': expected torch\.float32 on cpu as the first layer of the group, got torch\.float64 on cpu",
        ),
        ([spec(3, 4, axis=2)], ValueError, r"layer 'first': expected an axis of the weight \(3, 4\), got 2"),
        ([spec(3, 4, axis=-3)], ValueError, r"layer 'first': expected an axis of the weight \(3, 4\), got -1"),
        ([spec()], ValueError, r"layer 'first': expected an axis of the weight \(\), got 0"),
        ([spec(3, 0)], ValueError, r"layer 'first': expected a weight with elements, got shape \(3, 0\)"),
        *(
            ([spec(3, 4, dtype=dtype)], TypeError, f"'first': expected a floating or complex weight, got {dtype}")
            for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn)
        ),
    ],
)
def test_make_plan(specs, error, message):
    with pytest.raises(error, match=message):
        functional.make_plan(specs, "reference")


def test_mixed_devices():
    other = LayerSpec.of(torch.empty(3, 4, device="meta"), name="other")
    with pytest.raises(ValueError, match=r"layer 'other': expected torch\.float32 on cpu .*float32 on meta"):
        functional.make_plan([spec(3, 4), other], "reference")


def test_unknown_backend_lists_the_known():
    for call in (lambda: functional.make_plan([spec(3, 4)], "cudnn"), lambda: backends.check_name("cudnn")):
        with pytest.raises(ValueError, match=rf"one of \[{', '.join(map(repr, backends.names()))}\], got 'cudnn'"):
            call()


def test_a_backend_that_cannot_take_the_group_says_why(fused_backend):
    complex_one = spec(3, 4, name="spectrum", dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=rf"backend '{fused_backend}' cannot take.*'spectrum'.*torch\.complex64"):
        functional.make_plan([complex_one], fused_backend)
    meta = LayerSpec.of(torch.empty(3, 4, device="meta"), name="nowhere")
    with pytest.raises(RuntimeError, match=rf"backend '{fused_backend}' cannot take.*'nowhere'.*meta"):
        functional.make_plan([meta], fused_backend)


class Lame(ReferenceBackend):
    """A backend that can run nowhere."""

    name = "lame"

    def unsupported(self, specs=None):
        return ["it has no legs", "it has no wings"]


@pytest.fixture
def nothing_but_the_reference(monkeypatch):
    """As on a machine without any fused backend."""
    monkeypatch.setattr(backends, "_BACKENDS", {"lame": Lame(), "reference": ReferenceBackend()})
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.delenv("BSSN_STRICT", raising=False)


def test_a_backend_that_runs_nowhere(nothing_but_the_reference):
    assert backends.report() == [("lame", ["it has no legs", "it has no wings"]), ("reference", [])]
    backends.check_name(None), backends.check_name("reference")
    with pytest.raises(RuntimeError, match="'lame' cannot run on this machine: it has no legs; it has no wings"):
        backends.check_name("lame")
    with pytest.raises(RuntimeError, match="backend 'lame' cannot take this group: it has no legs"):
        functional.make_plan([spec(3, 4)], "lame")


def test_falling_back_to_the_reference_warns_once(nothing_but_the_reference):
    with pytest.warns(UserWarning, match=r"falls back to the slow reference backend \(lame: it has no legs"):
        plan = functional.make_plan([spec(3, 4)])
    assert plan.backend.name == "reference" and plan.why == ("lame: it has no legs; it has no wings",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.make_plan([spec(3, 4)])
        functional.make_plan([spec(3, 4)], "reference")


def test_strict_forbids_falling_back(nothing_but_the_reference, monkeypatch):
    monkeypatch.setenv("BSSN_STRICT", "1")
    with pytest.raises(RuntimeError, match="falls back to the slow reference.*BSSN_STRICT=1 forbids it"):
        functional.make_plan([spec(3, 4)])
    assert functional.make_plan([spec(3, 4)], "reference").backend.name == "reference"


def test_a_failing_backend_never_becomes_another_one(backend, monkeypatch):
    def fail(self, *args):
        raise RuntimeError("out of order")

    layer = build(Case("linear"))
    plan = functional.make_plan([layer.spec], backend)
    monkeypatch.setattr(type(plan.backend), "normalize", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        functional.spectral_normalize([layer.weight], layer.vectors, plan)


class Call:
    """A good call of two layers, to be spoiled."""

    def __init__(self, backend: str) -> None:
        variant = resolve_variant("bssn")
        self.weights = [torch.randn(4, 3, 2), torch.randn(5, 6)]
        specs = [
            LayerSpec.of(w, name=name, variant=variant, gain=name == "second")
            for w, name in zip(self.weights, ("first", "second"))
        ]
        self.plan = functional.make_plan(specs, backend)
        self.vectors = [torch.randn(n) for n in self.plan.sizes]
        self.gains = [torch.ones(1)]
        self.iterations = 1

    def __call__(self):
        return functional.spectral_normalize(self.weights, self.vectors, self.plan, self.iterations, gains=self.gains)


def drop(tensors: list) -> None:
    tensors.pop()


SPOILED = {
    "too few weights": (lambda c: drop(c.weights), "weights: expected 2 tensors, got 1"),
    "shape": (
        lambda c: c.weights.__setitem__(1, torch.randn(5, 7)),
        r"layer 'second': expected a weight \(5, 6\) of torch\.float32 on cpu, got \(5, 7\) of torch\.float32 on cpu",
    ),
    "dtype": (lambda c: c.weights.__setitem__(1, c.weights[1].double()), r"'second'.*got \(5, 6\) of torch\.float64"),
    "device": (lambda c: c.weights.__setitem__(0, c.weights[0].to("meta")), r"layer 'first'.*torch\.float32 on meta"),
    "strides": (
        lambda c: c.weights.__setitem__(1, torch.randn(6, 5).t()),
        r"layer 'second': expected strides \(6, 1\), got \(1, 5\); make a new plan",
    ),
    "too few vectors": (lambda c: drop(c.vectors), "vectors: expected 6 tensors, flat in plan order, got 5"),
    "vector size": (
        lambda c: c.vectors.__setitem__(2, torch.randn(4)),
        r"layer 'first': expected a vector \(3,\) that fits torch\.float32 on cpu, got \(4,\) of torch\.float32",
    ),
    "vector shape": (lambda c: c.vectors.__setitem__(4, torch.randn(5, 1)), r"'second': expected a vector \(5,\)"),
    "vector dtype": (
        lambda c: c.vectors.__setitem__(4, torch.randn(5).double()),
        r"layer 'second': expected a vector \(5,\) that fits torch\.float32 on cpu, got \(5,\) of torch\.float64",
    ),
    "vector device": (lambda c: c.vectors.__setitem__(4, torch.empty(5, device="meta")), "layer 'second'.*meta"),
    "too few gains": (lambda c: drop(c.gains), "gains: expected 1 tensors, got 0"),
    "too many gains": (lambda c: c.gains.append(torch.ones(1)), "gains: expected 1 tensors, got 2"),
    "gain shape": (lambda c: c.gains.__setitem__(0, torch.ones(2)), r"layer 'second'.*gain.*got \(2,\)"),
    "negative iterations": (lambda c: setattr(c, "iterations", -1), "n_power_iterations: .*a number >= 0.*got -1"),
    "fractional iterations": (lambda c: setattr(c, "iterations", 1.5), r"n_power_iterations: .*got 1\.5"),
    "too few iterations": (lambda c: setattr(c, "iterations", [1]), r"n_power_iterations: .*2 of them, got \[1\]"),
    "None among iterations": (lambda c: setattr(c, "iterations", [1, None]), r"n_power_iterations: .*got \[1, None\]"),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_spectral_normalize(backend, fault):
    spoil, message = SPOILED[fault]
    call = Call(backend)
    call()
    spoil(call)
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_iterations_per_layer(backend):
    """A number for all layers is the same as a list of it."""
    call = Call(backend)
    results = []
    for call.iterations in (2, [2, 2], (2, 2)):
        results.append(call().weights)
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))


def test_plan_for_names_layers_by_their_place():
    plan = functional.plan_for([torch.randn(3, 4), torch.randn(4, 3, 2)], axes=[0, 1], variant=Variant(0.5, 0.5))
    assert [s.name for s in plan.specs] == ["0", "1"] and [s.axis for s in plan.specs] == [0, 1]


def test_initial_vectors():
    """Torch's draws, in its order; the other starts are what their names say."""
    weight = torch.randn(40, 30)
    for semantics, check in {
        "torch_hook": lambda x: torch.testing.assert_close(x.norm(), torch.ones(())),
        "miyato": lambda x: torch.testing.assert_close(x.std(), torch.ones(()), rtol=0.4, atol=0),
        "paper": lambda x: torch.testing.assert_close(x.abs().max(), torch.full((), 1.7), rtol=0.18, atol=0),
    }.items():
        layer = LayerSpec.of(weight, semantics=semantics, variant=resolve_variant("bsn"))
        vectors = functional.initial_vectors(weight, layer, torch.Generator().manual_seed(3))
        again = functional.initial_vectors(weight, layer, torch.Generator().manual_seed(3))
        assert [x.shape for x in vectors] == [(40,), (30,)] and all(map(torch.equal, vectors, again))
        for x in vectors:
            check(x)
    warm = LayerSpec.of(weight)
    u, v = functional.initial_vectors(weight, warm)
    top = torch.linalg.matrix_norm(weight, 2)
    assert u @ weight @ v > 0.9 * top
    assert functional.initial_vectors(torch.randn(5), LayerSpec.of(torch.randn(5))) == []
