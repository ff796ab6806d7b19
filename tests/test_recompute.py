"""Layers read inside a backward: activation checkpointing gives what there would be without it, and moves nothing."""

import pytest
import torch
import torch.nn as nn
from nets import FORMS, close, gradients, images, native, state, vectors
from torch.utils.checkpoint import checkpoint

from bssn_kernels.group import fuse, group_of, normalize
from bssn_kernels.parametrizations import spectral_norm


class Checkpointed(nn.Module):
    """Its middle is recomputed; ``where`` says how."""

    def __init__(self, form, reentrant, contexts=False):
        super().__init__()
        self.net, self.reentrant, self.contexts = native(form), reentrant, contexts

    def forward(self, x):
        kwargs = {"use_reentrant": self.reentrant}
        if self.contexts:
            kwargs["context_fn"] = group_of(self).checkpoint_contexts
        x = checkpoint(self.net[:2], x, **kwargs)
        return self.net[5:](checkpoint(self.net[2:5], x, **kwargs))


def fused(module):
    fuse(module)
    return module


def compare(model, other, steps=3, forwards=1):
    """Train two models in step, each with several forwards per backward; keys of ``other`` are without "net."."""
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (model, other)]
    for step in range(steps):
        for m, optimizer in zip((model, other), optimizers):
            optimizer.zero_grad()
            outs = [m(images(seed=10 * step + k).requires_grad_()).square().sum() * (k + 1) for k in range(forwards)]
            sum(outs).backward()
        close(gradients(model), gradients(other))
        for optimizer in optimizers:
            optimizer.step()
    close(list(state(model).values()), list(state(other).values()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_inside(form, reentrant):
    compare(fused(Checkpointed(form, reentrant)), fused(native(form)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_root(form, reentrant):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = fused(native(form))

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=reentrant)

    compare(Outer(), fused(native(form)))


@pytest.mark.parametrize("form", FORMS)
def test_contexts_for_several_forwards_in_one_backward(form):
    compare(fused(Checkpointed(form, False, contexts=True)), fused(native(form)), forwards=3)


def test_without_contexts_the_last_forward_is_recomputed():
    """Why the contexts exist, and that the test above can fail."""
    with pytest.raises(AssertionError):
        compare(fused(Checkpointed("parametrization", False)), fused(native("parametrization")), forwards=3)


@pytest.mark.parametrize("form", FORMS)
def test_contexts_around_the_root(form):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = fused(native(form))

        def forward(self, x):
            contexts = group_of(self.net).checkpoint_contexts
            return checkpoint(self.net, x, use_reentrant=False, context_fn=contexts)

    compare(Outer(), fused(native(form)), forwards=2)


@pytest.mark.parametrize("contexts", [True, False])
def test_a_checkpoint_walked_twice(contexts):
    model, other = fused(Checkpointed("mixed", False, contexts)), fused(native("mixed"))
    for m in (model, other):
        out = m(images().requires_grad_()).square().sum()
        for _ in range(2):
            out.backward(retain_graph=True)
    close(gradients(model), gradients(other))
    close(list(state(model).values()), list(state(other).values()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_without_a_group(reentrant):
    """Natively a recomputed layer iterates once more; ours gives the weight of its forward."""

    def make():
        torch.manual_seed(0)
        layers = nn.Linear(4, 5), nn.Linear(5, 3)
        return nn.Sequential(*(spectral_norm(layer.double(), learnable_gain=True) for layer in layers))

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make()

        def forward(self, x):
            return self.net[1](checkpoint(self.net[0], x, use_reentrant=reentrant))

    model, other = Inner(), make()
    for step in range(3):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step)).double()
        for m in (model, other):
            m.zero_grad()
            m(x.clone().requires_grad_()).square().sum().backward()
        close(gradients(model), gradients(other))
    close(list(state(model).values()), list(state(other).values()))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"learnable_gain": True}, {"semantics": "paper"}, {"update": "manual"}])
def test_every_semantics(reentrant, options):
    def make(kind):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(36, 1)).double()

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, x):
                return kind(self.net[:3], self.net[3:], x)

        model = Model()
        normalize(model, "bssn", **options)
        return model

    model = make(lambda first, rest, x: rest(checkpoint(first, x, use_reentrant=reentrant)))
    other = make(lambda first, rest, x: rest(first(x)))
    compare(model, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_weight_is_the_same_bit_for_bit(dtype, output_dtype, backend):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 9, 3), nn.Linear(7, 5)).to(dtype)
    group = normalize(net, "bssn", learnable_gain=True, output_dtype=output_dtype, backend=backend)
    with group:
        first = [net[k].weight for k in range(2)]
    again = [group._record.replay(k, net[k].parametrizations.weight.original, group.layers[k].gain()) for k in range(2)]
    for a, b in zip(first, again):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
        losses = (t.float().square().sum() for t in (a, b))
        grads = [torch.autograd.grad(loss, list(net.parameters()), allow_unused=True) for loss in losses]
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(*grads))


@pytest.mark.parametrize("contexts", [True, False])
def test_complex_weights(contexts):
    """The composed path saves tensors; checkpointing must not count them."""

    class Model(nn.Module):
        def __init__(self, recompute):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(torch.complex128)
            self.recompute = recompute
            self.group = normalize(self, "sn", backend="reference")

        def forward(self, x):
            if not self.recompute:
                return self.net(x)
            kwargs = {"context_fn": self.group.checkpoint_contexts} if contexts else {}
            return self.net[1](checkpoint(self.net[0], x, use_reentrant=False, **kwargs))

    results = []
    for recompute in (True, False):
        model = Model(recompute)
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(2, 3, dtype=torch.complex128, generator=generator).requires_grad_()
            model.zero_grad()
            model(x).abs().square().sum().backward()
        results.append((gradients(model), vectors(model)))
    close(results[0], results[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_frame_of_hold_is_recomputed_without_gradient(reentrant):
    model = fused(Checkpointed("parametrization", reentrant))
    group, x = group_of(model), images().requires_grad_()
    with group.hold():
        out = model(x)
    out.sum().backward()
    assert x.grad is not None and all(layer.weight().grad is None for layer in group.layers)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_newest_of_a_read_outside_and_a_forward_is_recomputed(reentrant):
    results = []
    for recompute in (True, False):
        model = fused(Checkpointed("parametrization", reentrant))
        net, last = model.net, []
        for step in range(3):
            x = images(seed=step).requires_grad_()
            if step == 1:
                net[0](images())  # alone, before the forward
            if step == 2:  # alone, after it, and this is what is recomputed
                model(images())
                last = [checkpoint(net[0], x, use_reentrant=reentrant) if recompute else net[0](x)]
            out = last[0] if last else (model if recompute else net_forward(model))(x)
            out.square().sum().backward()
        results.append((gradients(model), vectors(model)))
    close(results[0], results[1])


def net_forward(model):
    """The same forward without recomputation."""

    def forward(x):
        with group_of(model):
            return model.net(x)

    return forward


@pytest.mark.parametrize("form", ["parametrization", "hook"])
def test_a_first_forward_in_a_backward_moves_nothing(form):
    net = fused(native(form))
    before = vectors(net)

    class Call(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                assert net(images()).requires_grad
                net[0](images())
            return grad

    Call.apply(torch.ones(1, requires_grad=True)).backward()
    close(vectors(net), before, 0)
    net(images()).sum().backward()
