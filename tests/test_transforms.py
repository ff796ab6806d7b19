"""functional_call, functorch transforms and forward-mode gradients through fused models, against native ones."""

import pytest
import torch
import torch.nn as nn
from nets import FORMS, close, images, native, state, vectors
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

from bssn_kernels.group import fuse, normalize

PAIR = ("parametrization", "mixed")


def pair(form):
    net, expected = native(form), native(form)
    fuse(net)
    return net, expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_functional_call(form, training):
    results = []
    for net in pair(form):
        net.train(training)
        parameters = {k: (p.detach() * 1.5).requires_grad_() for k, p in net.named_parameters()}
        buffers = {k: b.clone() for k, b in net.named_buffers()}
        before = state(net)
        out = functional_call(net, {**parameters, **buffers}, (images(),))
        grads = torch.autograd.grad(out.sum(), list(parameters.values()))
        close(state(net), before, 0)
        results.append((out, list(grads), buffers))
    close(results[0], results[1])


def test_functional_call_of_a_layer_within_a_forward():
    """The frame holds W_bar of the weights that it was computed from, and of no others."""

    class Model(nn.Sequential):
        def forward(self, x):
            doubled = {k: 2 * p + 1 for k, p in self[0].named_parameters()}
            return super().forward(x), functional_call(self[0], doubled, (x,))

    results = []
    for ours in (True, False):
        net = Model(*native("parametrization")).eval()
        if ours:
            fuse(net)
        results.append(net(images()))
    close(results[0], results[1])


@pytest.mark.parametrize("form", PAIR)
def test_jacrev_and_per_sample_gradients(form):
    results = []
    for net in pair(form):
        net.eval()
        parameters = {k: p.detach() for k, p in net.named_parameters()}

        def loss(parameters, x, net=net):
            return functional_call(net, parameters, (x.unsqueeze(0),)).sum()

        jacobian = jacrev(lambda p, net=net: functional_call(net, p, (images(),)))(parameters)
        per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, images())
        results.append((jacobian, per_sample))
    close(results[0], results[1])


@pytest.mark.parametrize("form", PAIR)
def test_training_under_a_transform(form):
    results = []
    for net in pair(form):
        parameters = {k: p.detach() for k, p in net.named_parameters()}
        grads = grad(lambda p, net=net: functional_call(net, p, (images(),)).sum())(parameters)
        assert not any(torch._C._functorch.is_functorch_wrapped_tensor(b) for b in net.buffers())
        net(images()).sum().backward()
        results.append((grads, vectors(net), [p.grad for p in net.parameters()]))
    close(results[0], results[1])


def test_an_ensemble_by_vmap():
    nets = [native("parametrization", seed=k).eval() for k in range(3)]
    expected = torch.stack([net(images()) for net in nets])
    for net in nets:
        fuse(net)
    parameters, buffers = stack_module_state(nets)
    x = images()
    out = vmap(lambda p, b: functional_call(nets[0], (p, b), (x,)))(parameters, buffers)
    close(out, expected)
    out.sum().backward()
    assert all(p.grad is not None for p in parameters.values())


def test_vmap_over_a_layer_within_a_forward():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 3).double()
            self.group = normalize(self, "bssn", learnable_gain=True)

        def forward(self, x):
            return vmap(self.layer)(x)

    model, other = Model(), Model()
    x = torch.randn(5, 4, dtype=torch.float64)
    for _ in range(2):
        out = model(x)
        out.square().sum().backward()
        with other.group:
            other.layer(x).square().sum().backward()
    close([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])
    close(state(model), state(other))


def test_batched_gradients():
    results = []
    for net in pair("parametrization"):
        net.eval()
        out = net(images())
        rows = torch.eye(out.numel(), dtype=torch.float64).reshape(-1, *out.shape)
        weights = list(net.parameters())
        results.append(torch.autograd.grad(out, weights, rows, is_grads_batched=True))
    close(list(results[0]), list(results[1]))


def test_forward_mode_gradients():
    results = []
    for net in pair("parametrization"):
        net.eval()
        parameters = {k: p.detach() for k, p in net.named_parameters()}
        tangents = {k: torch.ones_like(p) for k, p in parameters.items()}
        call = lambda p, net=net: functional_call(net, p, (images(),))  # noqa: E731
        results.append(torch.func.jvp(call, (parameters,), (tangents,)))
    close(results[0], results[1])
