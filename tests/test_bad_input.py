"""Bad input gets an error that names the layer, what was expected and what came, and changes nothing."""

import itertools

import pytest
import torch
import torch.nn as nn
from nets import images, native, plain, same, state

from bssn_kernels import backends, group
from bssn_kernels.group import fuse, group_of, normalize
from bssn_kernels.parametrizations import spectral_norm


class TestBadInput:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"variant": "nope"}, r"variant: expected one of \['sn', 'ssn', 'bsn', 'bssn', 'capped'\].*got 'nope'"),
            ({"semantics": "nope"}, r"semantics: expected one of \['torch', 'torch_hook', .*got 'nope'"),
            ({"scale": -1.0}, "scale: expected a positive and finite number, got -1.0"),
            ({"scale": float("inf")}, "scale: expected a positive and finite number, got inf"),
            ({"n_power_iterations": 0}, "n_power_iterations to be positive, but got n_power_iterations=0"),
            ({"eps": -1.0}, "eps: expected a finite number from 0 on, got -1.0"),
            ({"eps": float("nan")}, "eps: expected a finite number from 0 on, got nan"),
            ({"eps": "small"}, "eps: expected a finite number from 0 on, got 'small'"),
            ({"learnable_gain": "mean"}, "learnable_gain: expected False, True or 'sigma', got 'mean'"),
            ({"where": lambda name, module: False}, "no layer found in Sequential: expected layers that `where`"),
        ],
    )
    def test_arguments(self, kwargs, message):
        net = plain()
        with pytest.raises(ValueError, match=message):
            normalize(net, **kwargs)
        assert type(net[0]) is nn.Conv2d and not net._forward_pre_hooks

    @pytest.mark.parametrize("iterations", [1.5, "two"])
    def test_iterations_that_are_no_whole_number(self, iterations):
        for make in (normalize, lambda net, **k: spectral_norm(net[0], **k)):
            with pytest.raises(TypeError, match=f"n_power_iterations: expected a whole number, got {iterations!r}"):
                make(plain(), n_power_iterations=iterations)

    @pytest.mark.parametrize("call", [fuse, normalize, group_of])
    def test_no_module(self, call):
        with pytest.raises(TypeError, match=f"{call.__name__}: expected a torch.nn.Module, got list"):
            call([plain()])

    def test_an_error_halfway_leaves_plain_layers(self, monkeypatch):
        net, count = plain(), itertools.count()
        register = group.register

        def fail_at_the_third(*args, **kwargs):
            if next(count) == 2:
                raise MemoryError
            register(*args, **kwargs)

        before = state(net)
        monkeypatch.setattr(group, "register", fail_at_the_third)
        with pytest.raises(MemoryError):
            normalize(net)
        assert [type(layer) for layer in net] == [type(layer) for layer in plain()] and same(state(net), before)
        assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain().named_parameters()]
        monkeypatch.undo()
        normalize(net)

    def test_no_layer(self):
        with pytest.raises(ValueError, match="no layer found in Sequential: expected conv, linear or embedding layers"):
            normalize(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))

    def test_twice(self):
        net = plain()
        normalize(net)
        with pytest.raises(ValueError, match="layer '0': expected a plain weight, got one that is normalized already"):
            normalize(net)

    @pytest.mark.parametrize(("form", "name"), [("parametrization", "0"), ("hook", "0")])
    def test_under_torchs(self, form, name):
        with pytest.raises(ValueError, match=rf"layer '{name}': .*torch's spectral_norm: use fuse\(\)"):
            normalize(native(form))

    @pytest.mark.parametrize(
        ("spoil", "error", "message"),
        [
            (lambda m: setattr(m, "weight", None), ValueError, "layer '2': expected a Parameter 'weight', got None"),
            (
                lambda m: setattr(m, "weight", nn.Parameter(torch.ones(2, 2, dtype=torch.int32), False)),
                TypeError,
                "layer '2': expected a dense floating or complex weight, got torch.int32",
            ),
            (
                lambda m: setattr(m, "weight", nn.Parameter(torch.eye(2).to_sparse(), False)),
                TypeError,
                "layer '2': .*got torch.sparse_coo one",
            ),
            (
                lambda m: setattr(m, "weight", nn.Parameter(torch.ones(0, 2))),
                ValueError,
                r"layer '2': .*got one without elements, of shape \(0, 2\)",
            ),
            (lambda m: nn.utils.parametrizations.weight_norm(m), ValueError, "layer '2': .*got a parametrized one"),
        ],
    )
    def test_weights(self, spoil, error, message):
        net = plain()
        spoil(net[2])
        with pytest.raises(error, match=message):
            normalize(net)
        assert type(net[0]) is nn.Conv2d

    def test_quantized(self):
        net = plain()
        weight = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
        net[2].weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(TypeError, match="layer '2': .*got a quantized one"):
            normalize(net)

    @pytest.mark.parametrize("where", [None, lambda name, module: True])
    def test_lazy(self, where):
        with pytest.raises(ValueError, match="layer '0': .*got an uninitialized one"):
            normalize(nn.Sequential(nn.LazyConv2d(4, 3)), where=where)

    def test_state_of_a_wrong_size(self):
        net = plain()
        normalize(net)
        wrong = net.state_dict() | {"2.parametrizations.weight.0._v_in": torch.ones(3)}
        with pytest.raises(RuntimeError, match="size mismatch for 2.parametrizations.weight.0._v_in"):
            net.load_state_dict(wrong)

    def test_a_backend_that_cannot_run_is_refused_at_once(self, monkeypatch):
        class Nowhere:
            name = "nowhere"

            def unsupported(self, specs=None):
                return ["there is none"]

        monkeypatch.setitem(backends._BACKENDS, "nowhere", Nowhere())
        makers = normalize, lambda net, **k: spectral_norm(net[0], **k), lambda net, **k: fuse(native("hook"), **k)
        for make in makers:
            net = plain()
            with pytest.raises(RuntimeError, match="nowhere.*there is none"):
                make(net, backend="nowhere")
            assert type(net[0]) is nn.Conv2d

    def test_a_backend_that_cannot_take_the_layers_says_so_at_the_first_forward(self, monkeypatch):
        class Elsewhere(type(backends.get("reference"))):
            name = "elsewhere"

            def unsupported(self, specs=None):
                return [f"layer {spec.name!r} is on {spec.device}" for spec in specs or ()]

        monkeypatch.setitem(backends._BACKENDS, "elsewhere", Elsewhere())
        net = plain()
        made = normalize(net, backend="elsewhere")
        before = state(net)
        with pytest.raises(RuntimeError, match="'elsewhere' cannot take this group: layer '0' is on cpu"):
            net(images())
        assert same(before, state(net)) and "cannot take this group" in repr(made)
