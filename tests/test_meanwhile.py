"""What is written, removed or put on top while a fused model is in use: as natively."""

import copy

import pytest
import torch
from nets import FORMS, both, close, images, native, pair, raw, state
from torch import nn
from torch.nn.utils import parametrize, remove_spectral_norm
from torch.nn.utils import spectral_norm as torch_hook
from torch.nn.utils.parametrizations import spectral_norm as torch_parametrization

from bssn_kernels.group import fuse, group_of


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_written_within_the_forward(form):
    """Then the layer computes by itself, and moves its vectors, which the frame leaves alone."""

    def act(net):
        def clip(module, args) -> None:
            with torch.no_grad():
                raw(module).clamp_(-0.2, 0.2)

        net[2].register_forward_pre_hook(clip, prepend=True)
        return [net(images()).detach(), net(images()).detach()]

    both(act, form)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_and_what_moves_within_them(form):
    expected, ours = pair(form)
    group = group_of(ours)
    expected(images()), expected(images())
    with group:
        ours(images()), ours(images())
    close(state(ours), state(expected))
    with group:
        group.update()
        moved = state(ours)
    close(state(ours), moved, 0)
    before = copy.deepcopy(expected.state_dict())
    with group.hold():
        ours(images())
        ours.load_state_dict(before)
    close(state(ours), before, 0)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_in_blocks(form):
    ours, expected = native(form), native(form)
    group, x = fuse(ours, backend="cpu"), images()
    with group.hold():
        with group:
            ours[0](x)
        out = ours(x)
    close(out, expected(x).detach())
    with parametrize.cached():
        with group:
            ours[0](x)
        ours(x)

    def fail(module, args):
        raise OSError("out of ideas")

    with group:
        with pytest.raises(OSError, match="out of ideas"):
            handle = ours.register_forward_pre_hook(fail, prepend=True)
            ours(x)
        handle.remove()
        ours[0](x)


@pytest.mark.parametrize("form", ["parametrization", "hook"])
def test_vectors_that_are_views_of_one_tensor(form):
    """As of a user who keeps all state in one buffer: they count writes together, and move all the same."""
    net = native(form)
    places = [(module, name) for module in net.modules() for name in module._buffers]
    vectors = [module._buffers[name] for module, name in places]
    flat = torch.randn(sum(v.numel() for v in vectors), dtype=torch.float64)
    for (module, name), part in zip(places, flat.split([v.numel() for v in vectors])):
        module._buffers[name] = part
    fuse(net, backend="cpu")

    def clip(module, args) -> None:
        with torch.no_grad():
            raw(module).clamp_(-0.2, 0.2)

    net[2].register_forward_pre_hook(clip, prepend=True)
    before = state(net)
    net(images())
    assert not any(torch.equal(v, before[name]) for name, v in net.named_buffers())


def test_a_hook_is_gone_and_weights_are_cached():
    def act(net):
        remove_spectral_norm(net[2])
        with parametrize.cached():
            return [net(images()).detach() for _ in range(2)]

    both(act, "mixed")


def test_a_layer_is_gone_in_inference_mode():
    with torch.inference_mode():
        net = pair("parametrization")[1]
        parametrize.remove_parametrizations(net[0], "weight")
        assert net(images()).shape == (4, 1)


def test_a_restored_hook_can_be_copied():
    net = pair("hook")[1]
    out = net(images())
    group_of(net).restore()
    other = copy.deepcopy(net)
    close(state(other), state(net), 0)
    out.sum().backward()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_cached_weights(form, first):
    def act(net):
        with parametrize.cached():
            read = [net[0].weight.detach().clone()] if first else []
            outs = [net(images()).detach() for _ in range(2)]
        return [*read, *outs, net(images()).detach()]

    both(act, form)


def test_a_layer_is_removed():
    """The others are served as before: a changed weight is never read as it was."""

    def act(net):
        parametrize.remove_parametrizations(net[2], "weight")

        def change(module, args) -> None:
            with torch.no_grad():
                raw(module).mul_(0.5).add_(1.0)

        net[4].register_forward_pre_hook(change)
        return [net(images()).detach()]

    both(act, "parametrization")


def test_a_hook_in_the_place_of_one_that_was_removed():
    def act(net):
        net(images())
        remove_spectral_norm(net[0])
        torch.manual_seed(3)
        torch_hook(net[0], n_power_iterations=4)
        return [net(images()).detach()]

    both(act, "hook")


def test_a_parametrization_on_top_stays():
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    for fold in (True, False):
        net = pair("parametrization")[1]
        group = group_of(net)
        parametrize.register_parametrization(net[2], "weight", Double())
        expected = net.eval()(images()).detach()
        group.remove(fold=fold)
        assert [type(p) for p in net[2].parametrizations.weight] == [Double]
        if fold:
            close(net(images()).detach(), expected)
        else:
            close(net[2].weight, 2 * raw(net[2]), 0)


def test_what_cannot_be_adopted_stays_native():
    net = nn.Sequential(*[torch_parametrization(nn.Linear(4, 4)) for _ in range(2)])
    net.append(torch_parametrization(nn.Linear(4, 0)))
    net[1].__class__ = type("Injected", (type(net[1]),), {})
    group = fuse(net)
    assert [layer.names for layer in group.layers] == [["0"]] and set(group.native) == {"1", "2"}
    assert net(torch.randn(3, 4)).shape == (3, 0)
    group.restore()
    assert net(torch.randn(3, 4)).shape == (3, 0)
