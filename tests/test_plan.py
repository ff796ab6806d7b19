"""The tables that describe a group of layers, and what the compiled part says of them."""

import pytest
import torch

from bssn_kernels import functional
from bssn_kernels.backends import cpu
from bssn_kernels.plan import FLOAT_FIELDS, INTEGER_FIELDS, SCALARS, LayerSpec, layer_rows
from bssn_kernels.variants import Variant, resolve_variant

WEIGHTS = (torch.empty(4, 3, 2, 2), torch.empty(5, 6), torch.empty(7))


def specs(**rule) -> list[LayerSpec]:
    return [LayerSpec.of(w, name=str(i), **rule) for i, w in enumerate(WEIGHTS)]


@pytest.mark.skipif(not cpu.isas(), reason="the compiled part was not built")
def test_python_and_cpp_name_the_same_fields():
    module, _ = cpu._load()
    assert tuple(module.fields()) == INTEGER_FIELDS + FLOAT_FIELDS
    assert tuple(module.scalars()) == SCALARS


def test_vector_shapes():
    bssn, sn = resolve_variant("bssn"), Variant()
    assert [spec.vector_shapes for spec in specs(variant=bssn)] == [((4,), (12,), (3,), (16,)), ((5,), (6,)), ()]
    assert [spec.vector_shapes for spec in specs(variant=sn)] == [((4,), (12,)), ((5,), (6,)), ()]
    assert specs(semantics="torch_hook")[2].vector_shapes == ((7,), (1,))
    assert LayerSpec.of(WEIGHTS[0], axis=1, variant=bssn).vector_shapes == ((3,), (16,), (4,), (12,))
    assert LayerSpec.of(WEIGHTS[0], axis=-3).axis == 1


def test_layer_table_reads_back():
    variant = Variant(0.25, 0.75, 0.125, 3.0)
    plan = functional.make_plan(specs(variant=variant, semantics="paper", eps=1e-3, gain=True), "reference")
    rows = layer_rows(plan.tables[0])
    assert [row.directions for row in rows] == [2, 1, 1]
    assert all(row.has_gain and row.norm_adds and row.through and row.eps == 1e-3 for row in rows)
    first = rows[0]
    assert (first.rows_out, first.cols_out, first.rows_in, first.cols_in) == (4, 12, 3, 16)
    assert (first.weight_out, first.weight_in, first.floor, first.gain) == (0.25, 0.75, 0.125, 3.0)
    assert rows[1].weight_out == 1.0, "one direction counts for both"


def test_layout_of_saved():
    """Vectors, numbers and starts tile the flat tensor without gap or overlap."""
    plan = functional.make_plan(specs(variant=resolve_variant("bsn"), semantics="paper"), "reference")
    saved = torch.arange(plan.layout.numel, dtype=torch.float64)
    starts = [x for i in range(len(WEIGHTS)) for x in plan.layout.starts(saved, i)]
    pieces = [*plan.layout.vectors(saved), plan.layout.scalars(saved).flatten(), *starts]
    assert torch.equal(torch.cat(pieces), saved)
    rows = layer_rows(plan.tables[0])
    assert [row.vector_offset for row in rows] == [0, 35, 46]
    assert [row.scalar_offset for row in rows] == [54 + i * len(SCALARS) for i in range(3)]
    assert rows[0].start_offset_out == starts[0][0].item() and rows[0].start_offset_in == starts[1][0].item()


def test_matches():
    plan = functional.make_plan(specs(), "reference")
    assert plan.matches(WEIGHTS)
    assert not plan.matches(WEIGHTS[:2])
    assert not plan.matches((WEIGHTS[0].to(memory_format=torch.channels_last), *WEIGHTS[1:]))
    assert not plan.matches([w.double() for w in WEIGHTS])
    assert not plan.matches([w.to("meta") for w in WEIGHTS])


def test_readers_of_saved(backend):
    variant = resolve_variant("bssn", 2.0)
    weights = [torch.randn_like(w) for w in WEIGHTS]
    made = [LayerSpec.of(w, name=str(i), variant=variant) for i, w in enumerate(weights)]
    plan = functional.make_plan(made, backend)
    vectors = [x for w, spec in zip(weights, made) for x in functional.initial_vectors(w, spec)]
    result = functional.spectral_normalize(weights, vectors, plan)
    pairs = plan.sigmas_of(result.saved, directions=True)
    assert [len(pair) for pair in pairs] == [2, 1, 1]
    for mean, pair, multiplier in zip(plan.sigmas_of(result.saved), pairs, plan.multipliers_of(result.saved)):
        assert mean.shape == multiplier.shape == ()
        torch.testing.assert_close(pair.mean(), mean)
        torch.testing.assert_close(2.0 / mean, multiplier)
    assert [x.numel() for x in result.vectors] == plan.sizes == [4, 12, 3, 16, 5, 6]
