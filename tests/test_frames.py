"""Frames: one computation per forward of the root, whatever else happens in it."""

import gc
import threading
import timeit
import weakref

import pytest
import torch
import torch.nn as nn
from nets import FORMS, LAYERS, close, gradients, images, native, plain, same, state, twin, vectors

from bssn_kernels.group import fuse, normalize


class Stop(BaseException):
    """Not an Exception, as KeyboardInterrupt, but harmless for pytest."""


def raising(error):
    def hook(module, args, out):
        raise error

    return hook


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), Stop()])
def test_a_forward_that_raises_moves_nothing(form, error):
    net, expected = native(form), native(form)
    group = fuse(net)
    for model in (net, expected):
        model(images(seed=5))
    before = state(net)
    handle = net[4].register_forward_hook(raising(error))
    for _ in range(2):
        with pytest.raises(type(error)):
            net(images())
        assert same(before, state(net))
    if isinstance(error, Exception):
        assert group._local.frame is None
    handle.remove()
    for model in (net, expected):
        for weight in model.parameters():
            weight.data.mul_(1 + weight.data)  # unseen by version counters: the next forward must look for itself
    for _ in range(2):
        out, wanted = net(images()), expected(images())
        close(out, wanted)
    out.sum().backward(), wanted.sum().backward()
    close(gradients(net), gradients(expected))
    close(vectors(net), vectors(expected))


def test_a_frame_left_by_an_interrupt_is_not_read_after_a_step():
    net = native("parametrization")
    fuse(net)
    handle = net[6].register_forward_hook(raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        net(images())
    handle.remove()
    with torch.no_grad():
        net[0].parametrizations.weight.original.mul_(3).add_(0.1)
    expected = twin(net)
    close(net.eval()[0].weight, expected.eval()[0].weight)


class Reader(nn.Module):
    """Reads the weight of its layer more than once."""

    def __init__(self, form):
        super().__init__()
        self.net, self.seen = native(form), []

    def forward(self, x):
        self.seen = [self.net[0].weight, self.net[0].weight]
        return self.net(x) + self.net[0].weight.sum()


def test_reading_twice_iterates_once():
    model = Reader("parametrization")
    fuse(model)
    before = state(model)
    out = model(images())
    assert model.seen[0] is model.seen[1] and model.seen[0].requires_grad
    moved = state(model)
    other = native("parametrization")
    other.load_state_dict({k.removeprefix("net."): v for k, v in before.items()})
    other(images())
    close({k.removeprefix("net."): v for k, v in moved.items()}, state(other))
    out.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_read_outside_computes_alone(form):
    net, expected = native(form), native(form)
    fuse(net)
    for training in (True, False, True):
        for model in (net, expected):
            model.train(training)
        x = images()
        for model_layer in zip(net, expected):
            out, wanted = (layer(x) for layer in model_layer)
            close(out, wanted)
            x = wanted.detach()
    out.sum().backward(), wanted.sum().backward()
    close(gradients(net), gradients(expected))
    close(vectors(net), vectors(expected))


def test_gradient_mode_at_the_read_decides():
    seen = {}

    class Model(nn.Sequential):
        def forward(self, x):
            with torch.no_grad():
                seen["plain"] = self[0].weight
            seen["graph"] = self[0].weight
            with torch.no_grad():
                seen["later"] = self[0].weight, self[2].weight
            seen["other"] = self[2].weight
            return super().forward(x)

    for outside in (True, False):
        model = Model(*native("parametrization"))
        fuse(model)
        with torch.set_grad_enabled(outside):
            model(images())
            with torch.enable_grad():
                out = model(images())
        for name in ("graph", "other"):
            assert seen[name].requires_grad
        assert not any(t.requires_grad for t in (seen["plain"], *seen["later"]))
        assert torch.equal(seen["plain"], seen["graph"])
        out.sum().backward()
        assert model[0].parametrizations.weight.original.grad is not None


def test_enable_grad_inside_a_forward_without():
    net = native("mixed")
    fuse(net)
    inner = {}

    def check(module, args):
        with torch.enable_grad():
            inner["weight"] = module.weight

    net[0].register_forward_pre_hook(check)
    with torch.no_grad():
        net.eval()(images())
    inner["weight"].sum().backward()
    assert net[0].parametrizations.weight.original.grad is not None
    with torch.inference_mode():
        net(images())
    assert inner["weight"].is_inference()


def test_a_gradient_asked_for_inside_inference_mode():
    """The frame's tensors are inference tensors then; the read gives a normal one."""

    class Model(nn.Sequential):
        def forward(self, x):
            with torch.inference_mode(False), torch.enable_grad():
                self[0].weight.sum().backward()
            return super().forward(x)

    results = []
    for ours in (True, False):
        model = Model(*native("parametrization")).eval()
        if ours:
            fuse(model)
        with torch.inference_mode():
            model(images())
        results.append(model[0].parametrizations.weight.original.grad)
    close(results[0], results[1])


@pytest.mark.parametrize("form", FORMS)
def test_no_grad_and_inference_mode_between_training_forwards(form):
    net, expected = native(form), native(form)
    fuse(net)
    for model in (net, expected):
        with torch.inference_mode():
            model(images(seed=1))
        with torch.no_grad():
            model(images(seed=2))
        model(images()).sum().backward()
    close(gradients(net), gradients(expected))
    close(vectors(net), vectors(expected))


@pytest.mark.parametrize("form", FORMS)
def test_unused_and_frozen_layers(form):
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = native(form)
            self.net[2].requires_grad_(False)

        def forward(self, x):
            return self.net[3:](self.net[2](x[:, :1].expand(-1, 6, -1, -1)))

    net, expected = Partial(), Partial()
    fuse(net)
    for model in (net, expected):
        model(images()).sum().backward()
    close(gradients(net), gradients(expected))
    assert gradients(net).count(None) == 4


@pytest.mark.parametrize("form", FORMS)
def test_retain_graph_gradient_penalty_and_double_backward(form):
    results = []
    for fused in (True, False):
        net = native(form)
        if fused:
            fuse(net)
        x = images().requires_grad_()
        out = net(x)
        out.sum().backward(retain_graph=True)
        out.sum().backward()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().sum()
        weights = torch.autograd.grad(net(x).sum(), list(net.parameters()), create_graph=True, allow_unused=True)
        (penalty + sum(w.square().sum() for w in weights if w is not None)).backward()
        results.append((gradients(net), x.grad, vectors(net)))
    close(results[0], results[1])


def test_a_gain_learns_while_its_weight_is_frozen():
    net = plain()
    normalize(net, "bssn", learnable_gain=True)
    for name in LAYERS:
        net[int(name)].parametrizations.weight.original.requires_grad_(name == "0")
    net(images()).sum().backward()
    for name in LAYERS:
        weights = net[int(name)].parametrizations.weight
        assert weights[0]._gain.grad is not None and (weights.original.grad is None) == (name != "0")


def test_an_optimizer_step_before_the_backward_is_an_error_that_names_the_layer():
    net = native("parametrization")
    fuse(net)
    out = net(images())
    with torch.no_grad():
        net[2].parametrizations.weight.original.add_(1)
    with pytest.raises(RuntimeError, match="layer '2': its weight was changed in place"):
        out.sum().backward()


def test_100_threads_on_one_eval_model():
    """Half of them without gradient; each sees the same numbers and loses no gradient."""
    net = native("parametrization").eval()
    fuse(net)
    weights = [net[int(name)].parametrizations.weight.original for name in LAYERS]
    expected = native("parametrization").eval()
    wanted = expected(images())
    wanted.sum().backward()
    wanted_grads = [expected[int(name)].parametrizations.weight.original.grad for name in LAYERS]
    problems, barrier = [], threading.Barrier(100)

    def work(k):
        try:
            barrier.wait()
            for _ in range(3):
                with torch.set_grad_enabled(k % 2 == 0):
                    out = net(images())
                close(out, wanted)
                if k % 2 == 0:
                    close(list(torch.autograd.grad(out.sum(), weights)), wanted_grads)
                else:
                    assert not out.requires_grad
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(100)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not problems, problems[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_frame_dies_with_its_graph(form):
    """Without the garbage collector: weights of a large model must not wait for it. Under the old hook the last weight
    is the module's attribute, as natively.
    """
    net = native(form)
    fuse(net)
    seen = []
    for layer in (net[0], net[2]):
        layer.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(module.weight)))
    gc.collect()
    gc.disable()
    try:
        for backward in (True, False):
            out = net(images())
            assert all(ref() is not None for ref in seen)
            if backward:
                out.sum().backward()
            del out
            before = seen.copy()
            if form != "parametrization":
                with torch.no_grad():
                    net(images())
            assert all(ref() is None for ref in before)
            seen.clear()
    finally:
        gc.enable()


def test_reading_in_a_frame_is_fast():
    """DESIGN: under 2 us. torch's property takes ten times as long."""
    net = native("parametrization")
    group = fuse(net)
    with group:
        layer = net[0]
        best = min(timeit.repeat(lambda: layer.weight, number=1000, repeat=20)) / 1000
    assert best < 2e-6


def test_layers_of_a_plain_model_match_their_keys():
    net = plain()
    normalize(net, "sn")
    assert set(net.state_dict()) == set(native("parametrization").state_dict())
