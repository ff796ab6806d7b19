"""How gradients arrive and leave: any strides, None, sparse; several forwards, several backwards, changed weights."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from truth import relative
from zoo import LAYERS, Built, Case, build, layouts

from bssn_kernels import functional

KINDS = ("linear", "conv2d", "conv3d", "transposed2d", "vector", "one_column")


def layers_of(kinds=KINDS, **case) -> list[Built]:
    return [build(Case(kind, variant="bssn", **case), seed) for seed, kind in enumerate(kinds)]


def normalize(layers: list[Built], backend: str, **kwargs):
    plan = functional.make_plan([layer.spec for layer in layers], backend)
    weights, vectors = [layer.weight for layer in layers], [x for layer in layers for x in layer.vectors]
    gains = [layer.gain for layer in layers if layer.gain is not None]
    return functional.spectral_normalize(weights, vectors, plan, gains=gains, **kwargs)


def restrided(grad: Tensor, how: str) -> Tensor:
    """The same numbers with other strides."""
    if how == "reversed":
        return grad.permute(*reversed(range(grad.ndim))).contiguous().permute(*reversed(range(grad.ndim)))
    if how == "gaps":
        return torch.stack([grad, grad], dim=-1)[..., 0]
    if how == "offset":
        return torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(grad.shape)
    if how == "negative order":
        return grad.flip(0).flip(0)
    raise ValueError(how)


@pytest.mark.parametrize("how", ["reversed", "gaps", "offset", "negative order"])
@pytest.mark.parametrize("layout", ["contiguous", "exchanged", "channels_last"])
def test_gradients_of_any_strides(backend, layout, how):
    kinds = [kind for kind in KINDS if layout in layouts(LAYERS[kind][0])]
    layers = [build(Case(kind, layout, variant="bssn"), seed) for seed, kind in enumerate(kinds)]
    outs = normalize(layers, backend).weights
    grads = [torch.randn_like(out) for out in outs]
    expected = torch.autograd.grad(outs, [layer.weight for layer in layers], grads, retain_graph=True)
    found = torch.autograd.grad(outs, [layer.weight for layer in layers], [restrided(g, how) for g in grads])
    assert all(map(torch.equal, found, expected))
    assert all(g.stride() == layer.weight.stride() for g, layer in zip(found, layers))


def test_expanded_gradients(backend):
    """Of stride 0, as the backward of a sum is."""
    layers = layers_of()
    outs = normalize(layers, backend).weights
    expected = torch.autograd.grad(outs, [layer.weight for layer in layers], list(map(torch.ones_like, outs)), True)
    sum(out.sum() for out in outs).backward()
    assert all(torch.equal(layer.weight.grad, grad) for layer, grad in zip(layers, expected))


@pytest.mark.parametrize("output_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_arrive_in_the_output_dtype(backend, output_dtype):
    layers = layers_of(gain=True)
    outs = normalize(layers, backend, output_dtype=output_dtype).weights
    same = normalize(layers, backend).weights
    grads = [torch.randn_like(out) for out in outs]
    inputs = [t for layer in layers for t in (layer.weight, layer.gain)]
    found = torch.autograd.grad(outs, inputs, grads)
    expected = torch.autograd.grad(same, inputs, [g.float() for g in grads])
    for x, true in zip(found, expected):
        assert x.dtype == torch.float32 and relative(x, true) <= 1e-5


def test_unused_layers_keep_no_gradient(backend):
    layers = layers_of(gain=True)
    outs = normalize(layers, backend).weights
    used, inputs = outs[1::2], [layer.weight for layer in layers[1::2]]
    expected = torch.autograd.grad(used, inputs, list(map(torch.ones_like, used)), retain_graph=True)
    sum(out.sum() for out in used).backward()
    for i, layer in enumerate(layers):
        if i % 2 == 0:
            assert layer.weight.grad is None and layer.gain.grad is None
        else:
            assert torch.equal(layer.weight.grad, expected[i // 2]) and layer.gain.grad is not None


def test_frozen_weights_and_gains(backend):
    """Each combination of a weight and a gain that want a gradient; the numbers do not depend on it."""
    layers = layers_of(("linear",) * 4, gain=True)
    for layer in layers[1:]:
        layer.weight, layer.gain, layer.vectors = layers[0].weight, layers[0].gain, layers[0].vectors
    wants = [(w, g) for w in (True, False) for g in (True, False)]
    for layer, (w, g) in zip(layers, wants):
        layer.weight = layer.weight.detach().clone().requires_grad_(w)
        layer.gain = layer.gain.detach().clone().requires_grad_(g)
    outs = normalize(layers, backend).weights
    assert [out.requires_grad for out in outs] == [True, True, True, False]
    torch.autograd.backward(outs[:3], [torch.ones_like(out) for out in outs[:3]])
    for layer, (w, g) in zip(layers, wants):
        assert (layer.weight.grad is not None) == w and (layer.gain.grad is not None) == g
    assert torch.equal(layers[0].weight.grad, layers[1].weight.grad)
    assert torch.equal(layers[0].gain.grad, layers[2].gain.grad)


def test_nothing_to_differentiate(backend):
    layers = layers_of(("linear", "conv2d"))
    with torch.no_grad():
        outs = normalize(layers, backend).weights
    assert not any(out.requires_grad for out in outs)
    with torch.inference_mode():
        outs = normalize(layers, backend).weights
    assert all(out.is_inference() for out in outs)
    for layer in layers:
        layer.weight.requires_grad_(False)
    assert not any(out.requires_grad for out in normalize(layers, backend).weights)


def test_sparse_gradients(backend):
    """As an embedding with sparse=True sends them; repeated rows add up."""
    layers = layers_of(("embedding", "linear"))
    weight = layers[0].weight
    indices = torch.tensor([3, 7, 3, 0])
    plan = functional.make_plan([layer.spec for layer in layers], backend)
    grads = []
    for sparse in (True, False):
        outs = functional.spectral_normalize(
            [layer.weight for layer in layers], [x for layer in layers for x in layer.vectors], plan
        ).weights
        rows = torch.nn.functional.embedding(indices, outs[0], sparse=sparse)
        loss = rows.pow(3).sum() + outs[1].square().sum()
        grads.append(torch.autograd.grad(loss, [weight, layers[1].weight]))
    assert grads[0][0].layout == torch.strided
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-7)


def test_two_forwards_one_backward(backend):
    """Each forward's gradient is that of its own vectors."""
    layers = layers_of(("linear", "conv2d"))
    weights = [layer.weight for layer in layers]
    first = normalize(layers, backend)
    grads = [torch.randn_like(out) for out in first.weights]
    alone = [torch.autograd.grad(first.weights, weights, grads, retain_graph=True)]
    for layer, vectors in zip(layers, (first.vectors[:2], first.vectors[2:])):
        layer.vectors = vectors
    second = normalize(layers, backend)
    alone.append(torch.autograd.grad(second.weights, weights, grads, retain_graph=True))
    torch.autograd.backward([*first.weights, *second.weights], [*grads, *grads])
    for weight, a, b in zip(weights, *alone):
        assert not torch.equal(a, b) and torch.equal(weight.grad, a + b)


def test_retain_graph_twice(backend):
    layers = layers_of()
    outs, inputs = normalize(layers, backend).weights, [layer.weight for layer in layers]
    grads = [torch.randn_like(out) for out in outs]
    found = [torch.autograd.grad(outs, inputs, grads, retain_graph=True) for _ in range(3)]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found))


def test_stored_vectors_may_change_before_the_backward(backend):
    """The caller stores the new vectors at once: the backward reads its own copy."""
    layers = layers_of(("linear", "conv2d"), semantics="paper")
    result, inputs = normalize(layers, backend), [layer.weight for layer in layers]
    grads = [torch.randn_like(out) for out in result.weights]
    before = torch.autograd.grad(result.weights, inputs, grads, retain_graph=True)
    stored = [x for layer in layers for x in layer.vectors]
    torch._foreach_copy_(stored, result.vectors)
    torch._foreach_mul_(stored, 3.0)
    assert all(map(torch.equal, before, torch.autograd.grad(result.weights, inputs, grads)))


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_weight_changed_in_place(backend, kind):
    """An optimizer step between forward and backward is an error that names the layer, not a wrong gradient."""
    layers = layers_of(("embedding", kind))
    outs = normalize(layers, backend).weights
    with torch.no_grad():
        layers[1].weight.mul_(2)
    message = rf"layer '{kind}/.*': its weight was changed in place between forward and backward"
    with pytest.raises(RuntimeError, match=message):
        sum(out.sum() for out in outs).backward()


def test_outputs_may_be_changed_in_place_after_use(backend):
    """They belong to the user; the backward does not read them."""
    layers = layers_of(("linear",))
    (out,) = normalize(layers, backend).weights
    (expected,) = torch.autograd.grad(out, layers[0].weight, torch.ones_like(out), retain_graph=True)
    with torch.no_grad():
        out.zero_()
    out.backward(torch.ones_like(out))
    assert torch.equal(layers[0].weight.grad, expected)


def test_non_leaf_weights(backend):
    layers = layers_of(("linear", "conv2d"))
    factors = [torch.full((), 1.5, requires_grad=True) for _ in layers]
    leaves = [layer.weight for layer in layers]
    for layer, factor in zip(layers, factors):
        layer.weight = layer.weight * factor
    outs = normalize(layers, backend).weights
    grads = torch.autograd.grad([out.pow(2).sum() for out in outs], [*leaves, *factors])
    assert all(g.norm() > 1e-2 for g in grads[:2])
    assert all(g.abs() < 1e-4 for g in grads[2:]), "W_bar does not feel the length of W"


def test_one_weight_in_two_layers(backend):
    """Each use has its own vectors; the gradients add up."""
    layers = layers_of(("linear", "linear"))
    layers[1].weight = layers[0].weight
    outs = normalize(layers, backend).weights
    grads = [torch.randn_like(out) for out in outs]
    alone = [torch.autograd.grad(out, layers[0].weight, grad, retain_graph=True)[0] for out, grad in zip(outs, grads)]
    torch.autograd.backward(outs, grads)
    assert not torch.equal(*outs) and torch.equal(layers[0].weight.grad, alone[0] + alone[1])


def test_vectors_and_gains_may_be_views(backend):
    """With any strides, as slices of somebody's flat state are."""
    layers = layers_of(gain=True)
    expected = normalize(layers, backend).weights
    for layer in layers:
        layer.vectors = [torch.stack([x, x], 1)[:, 1] for x in layer.vectors]
        layer.gain = layer.gain.detach().expand(3)[1:2].requires_grad_()
    found = normalize(layers, backend).weights
    assert all(map(torch.equal, found, expected))


def test_backward_leaves_no_cycle(backend):
    """A graph that is dropped goes at once, without the garbage collector."""
    layers = layers_of(("linear", "conv2d"))
    gc.collect()
    gc.disable()
    try:
        result = normalize(layers, backend)
        sum(out.sum() for out in result.weights).backward()
        saved = weakref.ref(result.saved)
        del result
        assert saved() is None
    finally:
        gc.enable()
