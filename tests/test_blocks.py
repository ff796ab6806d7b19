"""Frames for more than one forward or none: blocks, hold, parametrize.cached; and buckets of the backward."""

import copy

import pytest
import torch
import torch.nn as nn
from nets import FORMS, close, gradients, images, native, same, state, vectors
from torch.nn.utils import parametrize

from bssn_kernels.group import fuse, normalize


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
