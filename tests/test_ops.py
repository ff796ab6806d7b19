"""The two torch.library ops: opcheck, fakes, and what the autograd Function around them does not change."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from zoo import LAYERS, SHORT, Case, build, layouts

from bssn_kernels import functional
from bssn_kernels.variants import semantics_names

normalize = torch.ops.bssn_kernels.normalize.default
normalize_backward = torch.ops.bssn_kernels.normalize_backward.default

GROUPS = {
    "one": [Case("linear")],
    "mixed": [
        Case("conv2d", "channels_last", variant="bssn", gain=True),
        Case("linear", "exchanged", semantics="torch_hook", iterations=3),
        Case("vector"),
        Case("transposed2d", "offset", variant="custom", semantics="paper", gain=True),
        Case("conv3d", "channels_last", variant="capped_below", iterations=0),
        Case("one_element4", variant="bsn", semantics="paper", iterations=3),
    ],
    "half": [Case("conv2d", "channels_last", torch.bfloat16, "bsn"), Case("embedding", "contiguous", torch.bfloat16)],
    "double": [Case("depthwise", "contiguous", torch.float64, "bssn", "paper", gain=True)],
}


def arguments(group: str, backend: str, output_dtype: torch.dtype | None = None) -> tuple:
    """Of the forward op, with nothing that requires grad."""
    layers = [build(case, i) for i, case in enumerate(GROUPS[group])]
    plan = functional.make_plan([layer.spec for layer in layers], backend)
    weights = [layer.weight.detach() for layer in layers]
    vectors = plan.op_vectors([x for layer in layers for x in layer.vectors])
    gains = [layer.gain.detach() for layer in layers if layer.gain is not None]
    iterations = plan.op_iterations([layer.case.iterations for layer in layers])
    return weights, vectors, gains, plan.tables, iterations, plan.layout.numel, output_dtype, plan.backend.name


def backward_arguments(group: str, backend: str, output_dtype: torch.dtype | None, layers: list[int]) -> tuple:
    forward = arguments(group, backend, output_dtype)
    outs, saved = normalize(*forward)
    grads = [torch.randn_like(outs[i]) for i in layers]
    return grads, [forward[0][i] for i in layers], saved, forward[3], layers, forward[7]


@pytest.mark.parametrize("output_dtype", [None, torch.float16], ids=["same", "fp16"])
@pytest.mark.parametrize("group", GROUPS)
def test_opcheck_forward(backend, group, output_dtype):
    results = torch.library.opcheck(normalize, arguments(group, backend, output_dtype))
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize("output_dtype", [None, torch.float16], ids=["same", "fp16"])
@pytest.mark.parametrize("group", GROUPS)
def test_opcheck_backward(backend, group, output_dtype):
    count = len(GROUPS[group])
    for layers in {tuple(range(count)), (count - 1,), tuple(range(0, count, 2))}:
        given = backward_arguments(group, backend, output_dtype, list(layers))
        results = torch.library.opcheck(normalize_backward, given)
        assert set(results.values()) == {"SUCCESS"} and len(results) == 4


def looks(x: torch.Tensor) -> tuple:
    return tuple(x.shape), x.stride(), x.dtype, x.device


@pytest.mark.parametrize("output_dtype", [None, torch.float32, torch.bfloat16], ids=["same", "fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=SHORT.get)
def test_fakes_look_like_the_results(backend, dtype, output_dtype):
    """Shapes, dtypes and strides, in every memory format that a layer can have."""
    names = ["linear", "conv2d", "conv3d", "transposed2d", "bilinear", "vector", "one_column", "one_row"]
    cases = [Case(name, layout, dtype, "bssn") for name in names for layout in layouts(LAYERS[name][0])]
    layers = [build(case) for case in cases]
    plan = functional.make_plan([layer.spec for layer in layers], backend)
    weights = [layer.weight.detach() for layer in layers]
    vectors = plan.op_vectors([x for layer in layers for x in layer.vectors])
    rest = plan.tables, plan.op_iterations([1] * len(cases)), plan.layout.numel, output_dtype, backend
    outs, saved = normalize(weights, vectors, [], *rest)
    indices = list(range(0, len(cases), 2))
    chosen = [weights[i] for i in indices], saved, plan.tables, indices, backend
    grads, gains = normalize_backward([outs[i] for i in indices], *chosen)
    with FakeTensorMode() as mode:

        def fake(tensors):
            return [mode.from_tensor(x) for x in tensors]

        fake_outs, fake_saved = normalize(fake(weights), fake(vectors), [], fake(plan.tables), *rest[1:])
        fake_chosen = [fake_outs[i] for i in indices], fake([weights[i] for i in indices])
        fake_grads, fake_gains = normalize_backward(*fake_chosen, fake_saved, fake(plan.tables), indices, backend)
    for found, true in zip((*fake_outs, fake_saved, *fake_grads, fake_gains), (*outs, saved, *grads, gains)):
        assert looks(found) == looks(true)


def test_meta_weights_need_no_backend_of_their_device():
    """The fakes serve the meta device too, as used to size a model before it is built."""
    weight = torch.empty(6, 5, device="meta")
    plan = functional.plan_for([weight], backend="reference")
    vectors = [torch.empty(n, device="meta") for n in plan.sizes]
    result = functional.spectral_normalize([weight], vectors, plan)
    assert looks(result.weights[0]) == looks(weight) and result.vectors[1].shape == (5,)


@pytest.mark.parametrize("group", GROUPS)
def test_op_and_function_agree(backend, group):
    """What the direct way to the backend gives is what the op gives, bit for bit; also with a dispatch mode on."""
    forward = arguments(group, backend)
    layers = [build(case, i) for i, case in enumerate(GROUPS[group])]
    plan = functional.make_plan([layer.spec for layer in layers], backend)
    call = forward[0], [x for layer in layers for x in layer.vectors], plan, [c.iterations for c in GROUPS[group]]
    outs, _ = normalize(*forward)
    for found in (functional.spectral_normalize(*call, gains=forward[2]).weights, watched(call, forward[2])):
        assert all(map(torch.equal, found, outs))


def watched(call: tuple, gains: list[torch.Tensor]) -> list[torch.Tensor]:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        outs = functional.spectral_normalize(*call, gains=gains).weights
    assert normalize in seen, "who watches the dispatcher sees the op"
    return outs


def test_outputs_alias_nothing(backend):
    forward = arguments("mixed", backend)
    outs, saved = normalize(*forward)
    places = [x.untyped_storage().data_ptr() for x in (*outs, saved)]
    given = {x.untyped_storage().data_ptr() for x in (*forward[0], *forward[1], *forward[2], *forward[3])}
    assert len(set(places)) == len(places) and not given & set(places)


def test_empty_is_filled_with_nan():
    """Otherwise the whole suite would not see an element that no kernel writes."""
    for x in (torch.empty(3), torch.empty_like(torch.ones(2, 2)), torch.ones(1).new_empty(2, dtype=torch.bfloat16)):
        assert x.isnan().all()


@pytest.mark.parametrize("semantics", semantics_names())
@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend, mode, semantics):
    """Dynamo traces a function that normalizes, with its gradients, without a graph break."""
    torch._dynamo.reset()
    layers = [build(Case(kind, variant="bssn", semantics=semantics), i) for i, kind in enumerate(("linear", "conv2d"))]
    plan = functional.make_plan([layer.spec for layer in layers], backend)
    weights = [layer.weight for layer in layers]
    vectors = [x for layer in layers for x in layer.vectors]

    def loss(weights: list[torch.Tensor], vectors: list[torch.Tensor]) -> tuple:
        result = functional.spectral_normalize(weights, vectors, plan)
        return sum(w.square().mean() for w in result.weights), result.vectors

    compiled = torch.compile(loss, fullgraph=True, backend=mode)
    (expected, new), (found, found_new) = loss(weights, vectors), compiled(weights, vectors)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found_new, new, rtol=0, atol=0)
    grads = torch.autograd.grad(expected, weights), torch.autograd.grad(found, weights)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)
