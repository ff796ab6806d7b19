"""fuse: the numbers, keys and objects of a model under torch's spectral norm, and the way back."""

import copy

import pytest
import torch
import torch.nn as nn
from nets import FORMS, LAYERS, close, gradients, images, native, same, state, twin, vectors
from torch.nn.utils import parametrize, remove_spectral_norm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrizations import spectral_norm as torch_parametrization
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook
from torch.nn.utils.spectral_norm import spectral_norm as torch_hook

from bssn_kernels.group import fuse, group_of, normalize
from bssn_kernels.parametrizations import spectral_norm

BACKENDS = ("reference", None)


def train(net, steps, dtype=torch.float64, optimizer=None):
    """Steps of D(real), D(fake), one backward; with an eval forward now and then. Returns the losses."""
    optimizer = optimizer or torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        real, fake = net(images(seed=step, dtype=dtype)), net(images(seed=step + 1000, dtype=dtype))
        loss = torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 5 == 2:
            net.eval()
            losses.append(net(images(seed=step, dtype=dtype)).mean().detach())
            net.train()
    return torch.stack(losses)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_training_equals_native(form, backend):
    """20 Adam steps in float64: losses, weights and vectors to 1e-9."""
    expected, fused = native(form), native(form)
    fuse(fused, backend=backend)
    close(train(fused, 20), train(expected, 20))
    assert state(fused).keys() == state(expected).keys()
    close(state(fused), state(expected))


@pytest.mark.parametrize("form", FORMS)
def test_each_single_precision_step_equals_native(form):
    """fp32 runs are chaotic, so both start every step from the same state."""
    expected, fused = native(form, torch.float32), native(form, torch.float32)
    fuse(fused)
    for step in range(20):
        fused.load_state_dict(expected.state_dict())
        for net in (expected, fused):
            net.zero_grad()
            nn.functional.softplus(net(images(seed=step, dtype=torch.float32))).mean().backward()  # well conditioned
        close(gradients(fused), gradients(expected), 1e-5)
        close(vectors(fused), vectors(expected), 1e-5)
        torch.optim.SGD(expected.parameters(), lr=1e-2).step()


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_drawn_moved_or_replaced(form):
    net = native(form)
    before, tensors, keys = state(net), [*net.parameters(), *net.buffers()], list(net.state_dict())
    rng = torch.get_rng_state()
    group = fuse(net)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(a is b for a, b in zip(tensors, [*net.parameters(), *net.buffers()]))
    assert keys == list(net.state_dict()) and same(before, state(net))
    net(images()), net.eval()(images()), group.restore()
    assert all(a is b for a, b in zip(tensors, [*net.parameters(), *net.buffers()]))


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_go_both_ways(form):
    trained = native(form)
    train(trained, 3)
    fused = native(form, seed=5)
    fuse(fused)
    assert fused.load_state_dict(trained.state_dict(), strict=True)
    close(fused.eval()(images()), trained.eval()(images()))
    train(fused.train(), 3)
    back = native(form, seed=6)
    assert back.load_state_dict(fused.state_dict(), strict=True)
    assert back.state_dict()._metadata == fused.state_dict()._metadata
    close(back.eval()(images()), fused.eval()(images()))


def test_a_checkpoint_of_the_old_hooks_first_version_loads():
    """torch solves for v in its load hook; that hook still works under fuse."""
    net = native("hook")
    fuse(net)
    net(images()).sum().backward()
    old = copy.deepcopy(net.state_dict())
    for name in LAYERS:
        old[f"{name}.weight"] = net[int(name)].weight.detach().clone()
        del old[f"{name}.weight_v"]
        del old._metadata[name]["spectral_norm"]
    before = net.eval()(images())
    net.load_state_dict(old)
    close(net(images()), before, 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_restore_continues_as_native_bit_for_bit(form):
    """The state after fused steps, loaded into a native model, and restored in place: the same from there."""
    net = native(form)
    group = fuse(net)
    train(net, 3)
    reference = native(form, seed=9)
    reference.load_state_dict(net.state_dict())
    group.restore()
    assert group_of(net) is None and not net._forward_hooks and "removed" in repr(group)
    for m in net.modules():
        assert all(type(hook) is TorchHook for hook in m._forward_pre_hooks.values())
        assert [type(m).__module__, "SpectralNorm" in type(m).__name__].count(True) == (type(m) is _SpectralNorm)
    close(train(net, 3), train(reference, 3), 0)
    assert same(state(net), state(reference))
    with pytest.raises(RuntimeError, match="removed"):
        group.update()


def test_fuse_restore_fuse():
    net = native("mixed")
    for _ in range(2):
        fuse(net).restore()
    fuse(net)
    assert torch.isfinite(net(images())).all()


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_remove(form, fold):
    net = native(form)
    group = fuse(net)
    net(images()).sum().backward()
    parameters = {id(p) for p in net.parameters()}
    raw = [layer.weight().detach().clone() for layer in group.layers]
    stored, expected = vectors(net), twin(net).eval()(images())
    group.remove(fold=fold)
    assert {type(m) for m in net} == {nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.LeakyReLU, nn.Flatten}
    assert {id(p) for p in net.parameters()} == parameters and stored and not list(net.buffers())
    assert set(net.state_dict()) == {f"{n}.{k}" for n in LAYERS for k in ("weight", "bias")} - {"4.bias"}
    assert not any(m._forward_pre_hooks or m._state_dict_hooks or m._load_state_dict_pre_hooks for m in net.modules())
    if fold:
        close(net(images()), expected, 1e-12)
    else:
        assert all(torch.equal(net[int(n)].weight, w) for n, w in zip(LAYERS, raw))
    net.load_state_dict(net.state_dict())


def test_folding_in_training_mode_does_not_iterate():
    net = native("parametrization")
    expected = twin(net).eval()(images())
    fuse(net).remove()
    close(net(images()), expected, 1e-12)


def test_layers_removed_by_torchs_functions_leave_the_group():
    net = native("mixed")
    group = fuse(net)
    net(images())
    expected = twin(net).eval()(images())
    net.eval()
    parametrize.remove_parametrizations(net[0], "weight")
    remove_spectral_norm(net[2])
    close(net(images()), expected, 1e-12)
    assert set(group.sigmas()) == {"4", "6"}
    assert "2 layers" in repr(group)
    net.train()(images()).sum().backward()
    group.update(), group.reset(), group.remove()
    assert type(net[4]) is nn.Conv2d and not any(m._forward_pre_hooks for m in net)


class OwnNorm(_SpectralNorm):
    pass


class OwnHook(TorchHook):
    pass


def test_only_exactly_torchs_layers_are_adopted():
    net, expected = native("mixed"), native("mixed")
    for model in (net, expected):
        model[0].parametrizations.weight[0].__class__ = OwnNorm
        next(iter(model[2]._forward_pre_hooks.values())).__class__ = OwnHook
        torch.manual_seed(0)
        torch_parametrization(model[4])
    group = fuse(net)
    assert group.native == {
        "0": "its parametrization is a OwnNorm",
        "2": "its hook is a OwnHook",
        "4": "it has several parametrizations",
    }
    assert "native: 0, its parametrization is a OwnNorm" in repr(group) and len(group.layers) == 1
    close(train(net, 3), train(expected, 3))
    close(state(net), state(expected))


def test_our_own_layers_are_adopted_with_their_rule():
    net, alone = (native("parametrization") for _ in range(2))
    for model in (net, alone):
        torch.manual_seed(0)
        model[0] = spectral_norm(nn.Conv2d(3, 6, 3, padding=1).double(), variant="bssn", scale=1.3, learnable_gain=True)
        model[2] = spectral_norm(nn.ConvTranspose2d(6, 4, 2, stride=2).double(), semantics="biggan")
    group = fuse(net)
    assert len(group.layers) == 4
    close(train(net, 4), train(alone, 4))
    close(state(net), state(alone))
    group.restore()
    close(train(net, 2), train(alone, 2))


def test_nothing_to_adopt():
    with pytest.raises(ValueError, match="fuse: expected layers under torch's spectral_norm in Sequential, got none"):
        fuse(nn.Sequential(nn.Linear(2, 2)))
    net = native("mixed")
    fuse(net)
    with pytest.raises(ValueError, match="0: it belongs to a group"):
        fuse(net)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"update": "never"}, "update: expected None or 'manual', got 'never'"),
        ({"backward_buckets": 0}, "backward_buckets: expected 'auto' or a whole number"),
        ({"output_dtype": torch.int32}, "output_dtype: expected None, a floating"),
        ({"backend": "abacus"}, "backend: expected None or one of"),
    ],
)
def test_bad_arguments_change_nothing(kwargs, message):
    net = native("mixed")
    for make in (fuse, normalize):
        with pytest.raises(ValueError, match=message):
            make(net, **kwargs)
    assert type(net[0].parametrizations.weight[0]) is _SpectralNorm and not net._forward_pre_hooks


def test_tied_parameters_keep_their_own_vectors():
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
        net[2].weight = net[0].weight
        torch_parametrization(net[0]), torch_hook(net[2])
        return net

    net, expected = make(), make()
    assert len(fuse(net).layers) == 2
    for model in (net, expected):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step)).double()
            model(x).square().sum().backward()
            optimizer.step()
    close(state(net), state(expected))


@pytest.mark.parametrize("norm", [torch_parametrization, torch_hook])
def test_the_root_may_be_the_layer(norm):
    torch.manual_seed(0)
    layer = norm(nn.Linear(4, 3).double())
    expected = twin(layer) if norm is torch_parametrization else None
    group = fuse(layer)
    assert list(group.sigmas()) == ["weight"]
    x = torch.randn(2, 4, dtype=torch.float64)
    out = layer(x)
    if expected is not None:
        close(out, expected(x))
    out.sum().backward()
    group.restore()
    layer(x)


def test_several_dtypes_in_one_model():
    net = nn.Sequential(native("mixed"), nn.Identity())
    net[0][6].float()
    expected = native("mixed")
    expected[6].float()
    net[0].insert(6, cast := nn.Identity()), expected.insert(6, nn.Identity())
    for model in (net[0], expected):
        model[6].register_forward_hook(lambda module, args, out: args[0].float())
    group = fuse(net)
    assert isinstance(cast, nn.Identity) and "2 layers" not in repr(group) and repr(group).count("backend") == 2
    for _ in range(3):
        out, wanted = net(images()), expected(images())
        close(out, wanted, 1e-5)
        out.sum().backward(), wanted.sum().backward()
    close(gradients(net), gradients(expected), 1e-4)
    close(list(vectors(net).values()), list(vectors(expected).values()), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_layers_in_eval_within_a_training_root(form):
    net, expected = native(form), native(form)
    fuse(net)
    for model in (net, expected):
        model[0].eval(), model[2].eval()
    close(train(net, 2), train(expected, 2))
    close(state(net), state(expected))


@pytest.mark.parametrize("form", FORMS)
def test_moving_and_casting_after_fuse(form):
    net, expected = native(form), native(form)
    fuse(net)
    for dtype in (torch.float64, torch.float32, torch.float64):
        for model in (net, expected):
            model.to(dtype)
        close(net(images(dtype=dtype)), expected(images(dtype=dtype)), 1e-5)
    net.load_state_dict(expected.state_dict())
    for model in (net, expected):
        model.to(memory_format=torch.channels_last)
    out, wanted = net(images()), expected(images())
    close(out, wanted)
    out.sum().backward(), wanted.sum().backward()
    close(gradients(net), gradients(expected))
    weight = net[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_half():
    net = native("mixed", torch.float32)
    group = fuse(net)
    net.bfloat16()
    net(images(dtype=torch.bfloat16)).sum().backward()
    assert all(v.dtype == torch.bfloat16 for v in net.buffers())
    assert all(s.dtype == torch.float32 for s in group.sigmas().values())
