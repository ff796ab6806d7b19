"""Copies, pickles and replicas of a fused model are independent; objects that torch swaps are looked up anew."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn
from nets import FORMS, close, gradients, images, native, same, state, vectors
from torch.nn.utils.parametrizations import spectral_norm as torch_parametrization

from bssn_kernels.group import fuse, group_of


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
        net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).double()
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
            model.zero_grad(), model(x).square().sum().backward()
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
