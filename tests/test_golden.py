"""What other people's code computed (see golden/README.md), reproduced through the public API."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from truth import relative
from zoo import interpreted

import bssn_kernels as bk
from bssn_kernels import functional
from bssn_kernels.plan import LayerSpec
from bssn_kernels.variants import resolve_variant

GOLDEN = Path(__file__).parent / "golden"
AUTHORS = {"authors_sn": "sn", "authors_ssn": "ssn", "authors_bsn": "bsn", "authors_bssn": "bssn"}
FILES = [*AUTHORS, "miyato_sn"]


def bound(dtype: torch.dtype) -> float:
    """Relative. The records are rounded to float32, which alone makes up to 1e-6."""
    return 2e-6 if dtype == torch.float64 else 1e-5


class Records:
    """One file, its arrays as tensors of one dtype."""

    def __init__(self, file: str, dtype: torch.dtype) -> None:
        self.arrays, self.dtype = dict(np.load(GOLDEN / f"{file}.npz")), dtype
        self.steps, self.layers = int(self.arrays["meta/steps"]), int(self.arrays["meta/layers"])
        self.authors = file in AUTHORS
        self.variant = AUTHORS.get(file, "sn")
        self.semantics = "paper" if self.authors else "miyato"
        self.grad_name = "grad_weight_through_iteration" if self.authors else "grad_weight"

    def __call__(self, step: int, layer: int, name: str) -> Tensor:
        return torch.tensor(self.arrays[f"step{step}/layer{layer}/{name}"], dtype=self.dtype)

    def has(self, layer: int, name: str) -> bool:
        return f"step0/layer{layer}/{name}" in self.arrays

    def iterations(self, layer: int) -> int:
        return 1 if self.authors else int(self.arrays[f"step0/layer{layer}/n_power_iterations"])

    def scale(self, layer: int) -> float:
        return float(self.arrays["meta/scale" if self.authors else f"step0/layer{layer}/factor"])

    def sigmas(self, step: int, layer: int) -> Tensor:
        """Of the directions; records of two begin with their mean."""
        found = self(step, layer, "sigma")
        return found[1:] if len(found) == 3 else found

    def sides(self, layer: int) -> list[str]:
        return ["out", "in"] if self.has(layer, "u_in_before") else ["out"]


def test_the_records_are_all_there():
    """Three steps each; what a step left is what the next one began with."""
    for file in FILES:
        records = Records(file, torch.float64)
        assert (records.steps, records.layers) == (3, 8 if records.authors else 6)
        for layer in range(records.layers):
            for side in records.sides(layer):
                for step in range(records.steps - 1):
                    after, before = (
                        records(step, layer, f"u_{side}_after"),
                        records(step + 1, layer, f"u_{side}_before"),
                    )
                    assert relative(after, before) < 1e-6
    assert any(Records("miyato_sn", torch.float64).has(i, "gamma") for i in range(6))
    assert Records("authors_bssn", torch.float64).sides(0) == ["out", "in"]


@pytest.fixture(autouse=True)
def few_in_the_interpreter(request):
    """Every file through the functional form, one of each kind through modules, in single precision."""
    chosen = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if interpreted(chosen.get("backend", "")):
        usual = chosen["dtype"] == torch.float32 and chosen.get("i", 0) == 0
        if not usual or ("modules" in request.node.name and chosen.get("file", "authors_bssn") != "authors_bssn"):
            pytest.skip("Triton's interpreter takes half a minute for each: some are checked")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("file", FILES)
def test_functional(backend, file, dtype):
    """All layers in one call; each step begins with the vectors of ours that the step before left."""
    records, tolerance = Records(file, dtype), bound(dtype)
    layers = range(records.layers)
    plan, vectors = None, []
    for step in range(records.steps):
        weights = [records(step, i, "weight").requires_grad_() for i in layers]
        gains = [records(step, i, "gamma").requires_grad_() for i in layers if records.has(i, "gamma")]
        if plan is None:
            specs = [
                LayerSpec.of(
                    weight,
                    name=f"layer{i}",
                    variant=resolve_variant(records.variant, records.scale(i)),
                    semantics=records.semantics,
                    gain=records.has(i, "gamma"),
                )
                for i, weight in enumerate(weights)
            ]
            plan = functional.make_plan(specs, backend)
            for i, spec in enumerate(specs):
                for side, (u_shape, v_shape) in zip(records.sides(i), zip(*[iter(spec.vector_shapes)] * 2)):
                    u, v = records(0, i, f"u_{side}_before"), torch.full(v_shape, torch.nan, dtype=dtype)
                    assert u.shape == u_shape
                    vectors += [u, v]  # order vu begins with u: v is never read
        iterations = [records.iterations(i) for i in layers]
        result = functional.spectral_normalize(weights, vectors, plan, iterations, gains=gains)
        torch.autograd.backward(result.weights, [records(step, i, "grad_output") for i in layers])
        old, new, own_gains = iter(vectors[::2]), iter(result.vectors[::2]), iter(gains)
        for i in layers:
            assert relative(result.weights[i], records(step, i, "weight_normalized")) <= tolerance
            assert relative(weights[i].grad, records(step, i, records.grad_name)) <= tolerance
            for side in records.sides(i):
                assert relative(next(old), records(step, i, f"u_{side}_before")) <= tolerance
                assert relative(next(new), records(step, i, f"u_{side}_after")) <= tolerance
            if records.authors:
                found = plan.sigmas_of(result.saved, directions=True)[i]
                assert found.shape == records.sigmas(step, i).shape
                assert relative(found, records.sigmas(step, i)) <= tolerance
                assert relative(result.sigmas[i], records(step, i, "sigma")[0]) <= tolerance
            if records.has(i, "gamma"):
                assert relative(next(own_gains).grad, records(step, i, "grad_gamma")) <= tolerance
        vectors = result.vectors


class Weights(nn.Module):
    """Layers with the shapes of the records; the forward reads the weights."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        made = []
        for weight in weights:
            rows, columns, *kernel = weight.shape
            kind = nn.Conv2d(columns, rows, kernel, bias=False) if kernel else nn.Linear(columns, rows, bias=False)
            made.append(kind.to(weight.dtype))
        self.layers = nn.ModuleList(made)

    def forward(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]


def prefix(i: int) -> str:
    return f"layers.{i}.parametrizations.weight"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("file", AUTHORS)
def test_modules_with_the_semantics_of_the_paper(backend, file, dtype):
    records, tolerance = Records(file, dtype), bound(dtype)
    layers = range(records.layers)
    model = Weights([records(0, i, "weight") for i in layers])
    group = bk.normalize(model, records.variant, scale=records.scale(0), semantics="paper", backend=backend)
    suffix = {"out": "_u", "in": "_u_in"}
    for step in range(records.steps):
        state = model.state_dict()
        for i in layers:
            state[f"{prefix(i)}.original"] = records(step, i, "weight")
            for side in records.sides(i) if step == 0 else ():
                state[f"{prefix(i)}.0.{suffix[side]}"] = records(0, i, f"u_{side}_before")
        model.load_state_dict(state)
        model.zero_grad()
        outs = model()
        torch.autograd.backward(outs, [records(step, i, "grad_output") for i in layers])
        sigmas, means = group.sigmas(directions=True), group.sigmas()
        for moment in ("before", "after"):  # a forward moves nothing: only update() does
            state = model.state_dict()
            for i in layers:
                for side in records.sides(i):
                    u = state[f"{prefix(i)}.0.{suffix[side]}"]
                    assert relative(u, records(step, i, f"u_{side}_{moment}")) <= tolerance
            if moment == "before":
                group.update()
        for i in layers:
            assert relative(outs[i], records(step, i, "weight_normalized")) <= tolerance
            grad = model.layers[i].parametrizations.weight.original.grad
            assert relative(grad, records(step, i, records.grad_name)) <= tolerance
            assert relative(sigmas[f"layers.{i}"], records.sigmas(step, i)) <= tolerance
            assert relative(means[f"layers.{i}"], records(step, i, "sigma")[0]) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("i", range(6))
def test_modules_with_the_semantics_of_miyato(backend, i, dtype):
    records, tolerance = Records("miyato_sn", dtype), bound(dtype)
    model, gain = Weights([records(0, i, "weight")]), records.has(i, "gamma")
    bk.normalize(
        model,
        "sn",
        scale=records.scale(i),
        n_power_iterations=records.iterations(i),
        semantics="miyato",
        learnable_gain=gain,
        backend=backend,
    )
    for step in range(records.steps):
        state = model.state_dict()
        state[f"{prefix(0)}.original"] = records(step, i, "weight")
        if step == 0:
            state[f"{prefix(0)}.0._u"] = records(0, i, "u_out_before")
        if gain:
            state[f"{prefix(0)}.0._gain"] = records(step, i, "gamma")
        model.load_state_dict(state)
        model.zero_grad()
        (out,) = model()
        out.backward(records(step, i, "grad_output"))
        weight = model.layers[0].parametrizations.weight
        assert relative(out, records(step, i, "weight_normalized")) <= tolerance
        assert relative(weight.original.grad, records(step, i, records.grad_name)) <= tolerance
        assert relative(weight[0]._u, records(step, i, "u_out_after")) <= tolerance
        if gain:
            assert relative(weight[0]._gain.grad, records(step, i, "grad_gamma")) <= tolerance
