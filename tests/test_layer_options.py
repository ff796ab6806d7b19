"""What our spectral_norm of one layer offers beyond torch's: semantics, gains, dtypes, backends, errors."""

import pytest
import torch
import torch.nn as nn
from nets import close, same, state

from bssn_kernels import backends
from bssn_kernels.parametrizations import spectral_norm


@pytest.mark.parametrize("gain", [True, "sigma"])
@pytest.mark.parametrize("semantics", ["torch", "torch_hook", "biggan", "paper"])
def test_learnable_gain(gain, semantics):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3)
    weight = layer.weight.detach().clone()
    spectral_norm(layer, variant="bssn", scale=1.5, learnable_gain=gain, semantics=semantics).eval()
    parameter = layer.parametrizations.weight[0]._gain
    assert isinstance(parameter, nn.Parameter) and parameter.shape == (1,)
    if gain == "sigma":
        torch.testing.assert_close(layer.weight, weight)
    else:
        assert parameter.item() == 1
    before = layer.weight
    with torch.no_grad():
        parameter.mul_(2)
    torch.testing.assert_close(layer.weight, 2 * before)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_backend(backend):
    """The check at registration runs anywhere; what is read later, on the backend that was asked for or the best."""
    layer = spectral_norm(nn.Linear(3, 4), backend=backend)
    norm = layer.parametrizations.weight[0]
    assert norm._plan is None
    layer(torch.randn(2, 3))
    best = backends.select([norm.spec(layer.parametrizations.weight.original)])[0].name
    assert norm._plan.backend.name == (backend or best)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_full_precision_under_autocast(backend):
    layer = spectral_norm(nn.Conv2d(3, 8, 3), variant="bssn", backend=backend).eval()
    expected = layer.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, expected)
        layer.weight.square().sum().backward()
    grad = layer.parametrizations.weight.original.grad.clone()
    layer.zero_grad()
    expected.square().sum().backward()
    close(grad, layer.parametrizations.weight.original.grad, 1e-6)


def test_semantics_of_a_layer_alone():
    """Which vectors move, and which weight is seen, per semantics, in training and eval."""
    for semantics, moves, refreshes in [
        ("torch", True, False),
        ("torch_hook", True, False),
        ("miyato", True, False),
        ("biggan", True, True),
        ("paper", False, True),
    ]:
        torch.manual_seed(0)
        layer = spectral_norm(nn.Conv2d(3, 4, 3).double(), variant="bsn", semantics=semantics)
        start = state(layer)
        assert {k.rpartition(".")[2] for k in start} == {"original", "_u", "_v", "_u_in", "_v_in", "bias"}
        layer.weight  # noqa: B018
        assert same(start, state(layer)) != moves, semantics
        stored = state(layer)
        rested = layer.eval().weight.detach()
        assert same(stored, state(layer)), semantics
        layer.train().weight  # noqa: B018
        settled = layer.eval().weight.detach()
        assert torch.equal(rested, settled) != moves, semantics
        if refreshes:
            torch.manual_seed(0)
            other = spectral_norm(nn.Conv2d(3, 4, 3).double(), variant="bsn", semantics=semantics, n_power_iterations=5)
            other.load_state_dict(stored)
            assert not torch.equal(other.eval().weight, rested)


def test_output_dtype():
    layer = spectral_norm(nn.Linear(3, 4), output_dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    layer.weight.float().sum().backward()
    assert layer.parametrizations.weight.original.grad.dtype == torch.float32
    layer = spectral_norm(nn.Linear(3, 4), output_dtype="autocast")
    assert layer.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="output_dtype: expected None"):
        spectral_norm(nn.Linear(3, 4), output_dtype="float16")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"variant": "nope"}, r"variant: expected one of \['sn'"),
        ({"semantics": "nope"}, r"semantics: expected one of \['torch'"),
        ({"scale": 0.0}, "scale: expected a positive and finite number, got 0.0"),
        ({"scale": float("nan")}, "scale: expected a positive and finite"),
        ({"backend": "nope"}, r"backend: expected None or one of \["),
        ({"learnable_gain": "nope"}, "learnable_gain: expected False, True or 'sigma'"),
    ],
)
def test_bad_arguments(kwargs, message):
    layer = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=message):
        spectral_norm(layer, **kwargs)
    assert type(layer) is nn.Linear


def test_bad_weights_name_the_layer():
    with pytest.raises(ValueError, match="layer 'LazyLinear.weight': expected .*uninitialized"):
        spectral_norm(nn.LazyLinear(4))
    for weight in (torch.ones(2, 3, dtype=torch.long), torch.eye(3).to_sparse()):
        layer = nn.Linear(3, 2)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(TypeError, match="layer 'Linear.weight': expected a dense floating or complex weight, got"):
            spectral_norm(layer)
    layer = nn.Linear(3, 2)
    layer.weight = None
    with pytest.raises(ValueError, match="has no parameter or buffer with name 'weight'"):
        spectral_norm(layer)
