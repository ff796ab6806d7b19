"""Frames: one computation per forward of the root, whatever else happens in it."""

import copy
import pickle
import threading
import timeit

import pytest
import torch
import torch.nn as nn
from nets import FORMS, LAYERS, close, gradients, images, native, plain, same, state, twin, vectors
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as torch_parametrization

from bssn_kernels.group import fuse, group_of, normalize


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
            weight.data.mul_(1.5)  # unseen by version counters: the next forward must look for itself
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


@pytest.mark.parametrize("count", [1, 2, 4])
def test_buckets_deliver_their_gradients_as_the_backward_walks_back(count):
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    group = normalize(net, backward_buckets=count)
    order = []
    for k in range(4):
        net[k].parametrizations.weight.original.register_post_accumulate_grad_hook(lambda p, k=k: order.append(k))
        net[k].register_full_backward_hook(lambda *_, k=k: order.append(f"module {k}"))
    net(torch.randn(2, 8, requires_grad=True)).sum().backward()
    for k in range(4):  # with b layers per bucket, layer k has its gradient when the bucket's first module is through
        first = k - k % (4 // count)
        later = [f"module {j}" for j in range(first)]
        assert all(order.index(k) < order.index(module) for module in later), order
        if k > first:
            assert order.index(k) > order.index(f"module {first + 1}"), order
    assert len(group.layers) == 4


def test_buckets_are_cut_by_size_and_auto_is_one():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 64), nn.Linear(64, 64))
    cuts = {1: [[0, 1, 2, 3]], "auto": [[0, 1, 2, 3]], 2: [[0, 1, 2], [3]], 100: [[0], [1], [2], [3]]}
    for count, expected in cuts.items():
        group = normalize(copy.deepcopy(net), backward_buckets=count)
        group.root(torch.randn(2, 8))
        cut = [group._arrangement.bucket(0, j)[0] for j in range(4)]
        assert [b for k, b in enumerate(cut) if b not in cut[:k]] == expected


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


def test_a_replica_computes_alone():
    """What DataParallel makes: copies whose parameters are plain attributes, and whose buffers may be shared."""
    net, expected = native("mixed"), native("mixed")
    group = fuse(net)

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicate(child)
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                object.__setattr__(replica, name, parameter.view_as(parameter))
        return replica

    results = []
    for model in (net, expected):
        out = replicate(model)(images())
        out.sum().backward()
        results.append((out, gradients(model), vectors(model)))
    close(results[0], results[1])
    assert group._record is None and group._arrangement is None


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_is_independent(form):
    net = native(form)
    group = fuse(net)
    net(images()).sum().backward()
    replica = copy.deepcopy(net)
    copied = group_of(replica)
    assert copied is not group and copied.root is replica
    assert all(layer.rule._member.group is copied and layer.weight() is not None for layer in copied.layers)
    before = state(net)
    replica(images())
    assert same(before, state(net)) and not same(before, state(replica))
    net(images())
    close(state(net), state(replica))
    group_of(replica).remove()
    assert type(replica[0]) is nn.Conv2d and len(group.layers) == 4
    expected = native(form)
    expected.load_state_dict(net.state_dict())
    for model in (net, expected):
        model.zero_grad(), model(images()).sum().backward()
    close(gradients(net), gradients(expected))


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_made_in_mid_forward_and_folded_leaves_the_original_training(form):
    net, expected = native(form), native(form)
    fuse(net)
    copies = []
    for model in (net, expected):
        if form == "parametrization" or model is net:
            model[3].register_forward_pre_hook(lambda module, args, model=model: copies.append(copy.deepcopy(model)))
    for step in range(2):
        out, wanted = net(images(seed=step)), expected(images(seed=step))
        close(out, wanted)
        replica = copies[0]
        group_of(replica).remove()
        assert torch.isfinite(replica.eval()(images())).all()
        copies.clear()
        net.zero_grad(), expected.zero_grad()
        out.sum().backward(), wanted.sum().backward()
        close(gradients(net), gradients(expected))
    close(state(net), state(expected))


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_of_a_layer_leaves_the_group(form):
    net = native(form)
    group = fuse(net)
    layer = copy.deepcopy(net[2])
    net(images())
    before = state(net)
    x = torch.randn(1, 6, 3, 3, dtype=torch.float64)
    for _ in range(2):
        layer(x).sum().backward()
    assert same(before, state(net)) and group_of(layer) is None
    rules = [*layer._forward_pre_hooks.values(), *(m for m in layer.modules() if hasattr(m, "semantics"))]
    assert [rule._member for rule in rules] == [None]
    assert len(copy.deepcopy([net[0], net])[1]) == 7 and len(group.layers) == 4


def test_folding_a_copy_works_on_the_instance_not_on_the_class_that_copies_share():
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1)).double()
        for layer in net:
            torch_parametrization(torch_parametrization(layer), "bias")
        return net

    net, expected, x = make(), make(), torch.randn(3, 6, dtype=torch.float64)
    fuse(net)
    for leave in ("remove", "restore"):
        replica = copy.deepcopy(net)
        assert type(replica[0]) is type(net[0])
        getattr(group_of(replica), leave)()
        assert type(net[0]).__dict__["weight"].fget.__name__ == "get" and type(replica[0]) is not type(net[0])
        for model in (net, expected):
            model.zero_grad(), model(x).sum().backward()
        close(gradients(net), gradients(expected))
        assert torch.isfinite(replica(x)).all()
    group_of(net).remove()
    assert type(net[0]) is nn.Linear and set(net[0]._parameters) == {"weight", "bias"}


@pytest.mark.parametrize("form", FORMS)
def test_the_group_and_a_parent_may_be_copied(form):
    class Trainer:
        def __init__(self):
            self.net = native(form)
            self.group = fuse(self.net)

    trainer = Trainer()
    for subject in (trainer, copy.deepcopy(trainer)):
        other = copy.deepcopy(subject)
        assert other.group is group_of(other.net) and other.group is not subject.group
        before = state(subject.net)
        other.net(images())
        other.group.remove()
        assert same(before, state(subject.net)) and len(subject.group.sigmas()) == 4


def test_pickle():
    """Possible where natively: not for parametrizations."""
    net = native("hook")
    group = fuse(net)
    net(images())
    other = pickle.loads(pickle.dumps(net))
    assert group_of(other) is not group and group_of(other).root is other
    close(other(images()), net(images()))
    close(state(other), state(net))
    trained = pickle.loads(pickle.dumps(group))
    close(trained.root(images()), net(images()))
    net = native("mixed")
    fuse(net)
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(net)


@pytest.mark.parametrize("form", FORMS)
def test_loading_with_assign(form):
    net, source = native(form), native(form, seed=8)
    fuse(net)
    net(images())
    net.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    for _ in range(2):
        close(net(images()), source(images()))
    close(state(net), state(source))


def test_a_vector_of_the_wrong_size_is_refused():
    net = native("parametrization")
    fuse(net)
    net[2].parametrizations.weight[0]._u = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"layer '2': expected _u of shape \(4,\) on cpu, got \(3,\) on cpu"):
        net(images())


@pytest.mark.parametrize("training", [True, False])
def test_parametrize_cached_shares_one_frame(training):
    net, expected = native("parametrization").train(training), native("parametrization").train(training)
    fuse(net)
    results = []
    for model in (net, expected):
        with parametrize.cached():
            out = model(images(seed=1)) - model(images(seed=2))
            weight = model[0].weight
            assert weight is model[0].weight
        out.sum().backward()
        results.append((out, weight.detach(), gradients(model), vectors(model)))
    close(results[0], results[1])
    close(net(images()), expected(images()))
    close(vectors(net), vectors(expected))


@pytest.mark.parametrize("form", FORMS)
def test_with_group(form):
    """A frame for what is not the root's forward."""
    net, expected = native(form), native(form)
    group = fuse(net)
    with group as entered:
        assert entered is group
        out = net[3:](net[:3](images()))
        again = net[:3](images())
    wanted = expected(images())
    close(out, wanted)
    (out.sum() + again.sum()).backward()
    close(vectors(net), vectors(expected))
    before = state(net)
    with pytest.raises(ZeroDivisionError), group:
        net[:3](images())
        raise ZeroDivisionError
    assert same(before, state(net)) and group._local.frame is None
    with group:  # the root's forward inside makes its own frame, and gives the block's back
        block = group._local.frame
        close(net(images()), expected(images()))
        assert group._local.frame is block


@pytest.mark.parametrize("form", FORMS)
def test_hold(form):
    net = native(form)
    group = fuse(net)
    launches = []
    frame = group._frame
    group._frame = lambda **how: launches.append(1) or frame(**how)
    before = state(net)
    expected = native(form)
    expected.load_state_dict(before)
    wanted = expected(images(seed=1))
    with group.hold() as held:
        assert held is group
        outs = [net(images(seed=k)) for k in (1, 2)] + [net[:3](images())]
        assert len(launches) == 1 and same(before, state(net))
        x = images().requires_grad_()
        net(x).sum().backward()
    close(outs[0], wanted)
    assert x.grad is not None and all(layer.weight().grad is None for layer in group.layers)
    close(vectors(net), vectors(expected))
    net(images())
    assert len(launches) == 2
    before = state(net)
    with pytest.raises(ZeroDivisionError), group.hold():
        raise ZeroDivisionError
    assert same(before, state(net))


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
