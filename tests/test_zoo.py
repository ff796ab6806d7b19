"""Every kind of layer, dtype, memory format, variant and semantics on every backend, against float64."""

import itertools
import os
import zlib

import pytest
import torch
import truth
from zoo import (
    DTYPES,
    HALVES,
    HUGE,
    LAYERS,
    LONG,
    ROWS,
    SHORT,
    SMALL,
    VARIANTS,
    Case,
    build,
    check,
    home,
    interpreted,
    lay_out,
    layouts,
    on_threads,
    played,
)

from bssn_kernels import functional
from bssn_kernels.backends import cpu
from bssn_kernels.backends._geometry import WHOLE_ROWS
from bssn_kernels.backends._schedule import ForwardSchedule
from bssn_kernels.plan import LayerSpec, Layout, layer_rows, layer_table
from bssn_kernels.variants import semantics_names

pytestmark = pytest.mark.device

ITERATIONS = (1, 0, 3)


EVERY_CASE = os.environ.get("BSSN_EVERY_CASE") == "1"


def fitting(cases: list[Case], backend: str, most: int = 4) -> list[Case]:
    """All cases, but for Triton's interpreter, which takes half a second for each: some of them, others in every test
    (BSSN_EVERY_CASE=1: all, an hour of one core).
    """
    if not interpreted(backend) or EVERY_CASE:
        return cases
    apart = -(-len(cases) // most)
    return cases[zlib.crc32(cases[0].name.encode()) % apart :: apart]


def only_on_a_device(backend: str, why: str, dtype: torch.dtype | None = None) -> None:
    """Not in Triton's interpreter; on a model of a device in float32 alone, which has the tiles of the others."""
    if interpreted(backend):
        pytest.skip(f"Triton's interpreter would take minutes: {why}")
    if played(backend) and dtype != torch.float32:
        pytest.skip(f"the model of a device would take half a minute: {why}")


def rotated(layer: str, dtype: torch.dtype, turn: int = 0) -> list[Case]:
    """All semantics in all memory formats; variants, iterations and gains take turns."""
    start, names = list(LAYERS).index(layer), list(VARIANTS)
    cases = []
    for n, (layout, semantics) in enumerate(itertools.product(layouts(LAYERS[layer][0]), semantics_names())):
        n += start
        variant, iterations = names[(n * 4 + turn * 5) % len(names)], ITERATIONS[(n + n // 5 + turn) % 3]
        cases.append(Case(layer, layout, dtype, variant, semantics, iterations, gain=(n + turn) % 2 == 1))
    return cases


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("layer", SMALL)
def test_every_layer(backend, layer, dtype):
    large = layer.endswith("_large")
    slow = large or layer == "patch"  # whose 256 classes Triton's interpreter takes one by one
    for turn in (0,) if slow and interpreted(backend) else range(3):
        cases = rotated(layer, dtype, turn)
        # In one dtype, and so on every backend: every layer in every memory format under every semantics.
        whole = dtype == torch.float32 and turn == 0 and not large
        check(cases if whole else fitting(cases, backend, 1 if large else 2), backend)


@pytest.mark.parametrize("two_directions", [False, True], ids=["alone", "beside_two_directions"])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_rows_that_a_program_holds(backend, dtype, two_directions):
    """Every length of rows, in every memory format, after one and more iterations, with all that W_bar is made of."""
    cases = []
    layers = [layer for layer in ROWS if layer != "rows_transposed" or two_directions]
    kinds = [(layer, layout) for layer in layers for layout in layouts(LAYERS[layer][0])]
    for layer, layout in kinds:
        n = len(cases)
        if layout == "exchanged" and not two_directions:
            continue  # along its rows in memory the weight is another matrix, of which u is the spread
        variant, iterations = ("sn", "ssn", "capped_above")[n % 3], (1, 3, 2, 1)[n % 4]
        cases.append(Case(layer, layout, dtype, variant, "torch", iterations, gain=n % 2 == 1))
    cases = cases[::4] if two_directions else cases
    cases = cases if dtype == torch.float32 else fitting(cases, backend)
    cases += [Case("conv2d", dtype=dtype, variant="bssn")] * two_directions
    specs = [build(case).spec for case in cases]
    rows = layer_rows(layer_table(specs, Layout(specs)))
    schedule = ForwardSchedule(rows, [1] * len(rows), dtype.itemsize, whole_rows=[True] * len(rows))
    lengths = {WHOLE_ROWS[dtype.itemsize][1] // 4 < g.L for g in schedule.geometries if g.whole}
    assert schedule.general == two_directions
    assert lengths == {False, True} or dtype != torch.float32, "one row at once, and four"
    check(cases, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("layer", LONG)
def test_100_000_columns_or_rows(backend, layer, dtype):
    wanted = [
        ("torch", 1, "sn", "contiguous"),
        ("paper", 1, "bssn", "exchanged"),
        ("miyato", 3, "capped_above", "offset"),
    ]
    only_on_a_device(backend, "200 tiles of short rows, or 400 of a long one", dtype)
    check([Case(layer, layout, dtype, v, s, n, gain=n > 1) for s, n, v, layout in wanted], backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("layer", HUGE)
def test_a_million_elements(backend, layer, dtype):
    only_on_a_device(backend, "hundreds of tiles a case", dtype)
    cases = rotated(layer, dtype, HUGE.index(layer))
    whole = dtype == torch.float32 and backend != "reference" and not played(backend)
    check(cases if whole else cases[::3], backend)


@pytest.mark.slow
def test_more_than_caches_hold(fused_backend):
    """Kernels may write such groups past the caches."""
    only_on_a_device(fused_backend, "thousands of tiles")
    check([Case("uncached", "contiguous", torch.float32), Case("linear")], fused_backend)
    check([Case("conv2d"), Case("uncached", "exchanged", torch.float32, "ssn", "paper")], fused_backend)


@pytest.mark.parametrize("layer", LONG)
def test_long_sums_keep_their_accuracy(backend, layer):
    """Of numbers of one sign, where adding one by one in fp32 loses three digits and more."""
    if layer == "tall":
        only_on_a_device(backend, "200 row blocks of short rows; wide takes the same sums the other way", torch.float32)
    check([Case(layer, semantics=s, iterations=n) for s, n in (("torch", 1), ("torch_hook", 0))], backend, mean=1.0)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=SHORT.get)
@pytest.mark.parametrize("layer", ("linear", "conv2d", "transposed2d", "vector"))
def test_every_variant_under_every_semantics(backend, layer, dtype):
    product = itertools.product(VARIANTS, semantics_names(), ITERATIONS)
    cases = [Case(layer, "contiguous", dtype, v, s, n, gain=len(v) % 2 == 0) for v, s, n in product]
    whole = layer in ("linear", "conv2d") and dtype == torch.float32  # on every backend
    check(cases if whole else fitting(cases, backend, 9), backend)


@pytest.mark.parametrize("output_dtype", (torch.float32, *HALVES), ids=SHORT.get)
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_output_dtype(backend, dtype, output_dtype):
    layers = ("linear", "conv2d_large", "transposed2d", "bilinear", "vector", "primes")
    cases = [
        Case(layer, layout, dtype, variant, semantics)
        for layer, variant, semantics in zip(
            layers, itertools.cycle(("bssn", "sn")), itertools.cycle(semantics_names())
        )
        for layout in layouts(LAYERS[layer][0])
    ]
    check(fitting(cases, backend), backend, output_dtype=output_dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=SHORT.get)
@pytest.mark.parametrize("eps", (1e-3, 0.3, 3.0))
def test_eps_that_counts(backend, dtype, eps):
    """eps above, amid and below the norms of the products."""
    cases = [
        Case(layer, "contiguous", dtype, variant, semantics, n, eps=eps)
        for layer, variant in (("linear", "sn"), ("conv2d", "bssn"), ("transposed2d", "custom"))
        for semantics in semantics_names()
        for n in ITERATIONS
    ]
    check(fitting(cases, backend), backend)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_every_instruction_set(monkeypatch, isa, dtype):
    monkeypatch.setenv("BSSN_CPU_ISA", isa)
    check([case for layer in SMALL for case in rotated(layer, dtype)], "cpu")
    check([case for layer in HUGE for case in rotated(layer, dtype)[::4]], "cpu")


@pytest.mark.parametrize("count", (1, 2, 3, 7))
def test_every_number_of_threads(backend, count):
    with on_threads(count):
        cases = [case for layer in SMALL for case in rotated(layer, torch.float32)[count % 3 :: 3]]
        check(fitting(cases, backend, 10), backend)


@pytest.mark.parametrize("semantics", semantics_names())
def test_below_the_cap_nothing_but_a_factor(backend, semantics):
    """The weight comes out as it went in, bit for bit, and the gradient has no rank term."""
    layer = build(Case("conv2d", variant="capped_below", semantics=semantics), device=home(backend))
    plan = functional.make_plan([layer.spec], backend)
    out = functional.spectral_normalize([layer.weight], layer.vectors, plan).weights[0]
    grad = torch.randn_like(out)
    out.backward(grad)
    assert torch.equal(out, layer.weight) and torch.equal(layer.weight.grad, grad)


def test_vectors_in_the_weights_dtype(backend):
    """As buffers of a module that was moved to bfloat16 are."""
    weight = torch.randn(20, 30).to(home(backend), torch.bfloat16)
    vectors = [torch.randn(n).to(home(backend), torch.bfloat16) for n in (20, 30)]
    plan = functional.plan_for([weight], backend=backend)
    result = functional.spectral_normalize([weight], vectors, plan)
    expected = truth.normalize(weight.double().cpu(), [x.double().cpu() for x in vectors], variant=VARIANTS["sn"])
    assert all(x.dtype == torch.float32 for x in result.vectors)
    assert truth.relative(result.vectors[1].cpu(), expected.vectors[1]) <= 1e-5


@pytest.mark.parametrize("layout", ("reversed", "gaps"))
def test_memory_that_only_the_reference_reads(layout):
    """A fused backend says why not; by default the reference takes the group, with the same numbers."""
    values = torch.randn(3, 4, 2, 5, 6)
    weight = values.permute(4, 3, 2, 1, 0) if layout == "reversed" else lay_out(values, "contiguous")[..., ::2]
    spec = LayerSpec.of(weight, name="odd one")
    reason = "does not merge" if layout == "reversed" else "not dense"
    if not cpu.CpuBackend().unsupported():
        with pytest.raises(RuntimeError, match=f"'cpu' cannot take this group.*'odd one'.*{reason}"):
            functional.make_plan([spec], "cpu")
    plan = functional.make_plan([spec], "reference")
    vectors = [torch.randn(n) for (n,) in spec.vector_shapes]
    expected = truth.normalize(weight.double(), [x.double() for x in vectors], variant=VARIANTS["sn"])
    assert truth.relative(functional.spectral_normalize([weight], vectors, plan).weights[0], expected.weight) < 1e-6
