"""What torch's own tests check of its parametrization, with ours in its place; and each against the other."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from nets import close, same, state
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as torchs

from bssn_kernels.parametrizations import SpectralNorm, spectral_norm
from bssn_kernels.variants import Variant

LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 6, (2, 3), groups=3), (2, 3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, (5, 6)), (2, 3, 5, 5)),
    "embedding": (lambda: nn.Embedding(6, 5), None),
}


def pair(layer: str, **kwargs) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    make, shape = LAYERS[layer]
    result = []
    for norm in (spectral_norm, torchs):
        torch.manual_seed(3)
        result.append(norm(make().double(), **kwargs))
    x = torch.randint(6, (4,)) if shape is None else torch.randn(shape, dtype=torch.float64)
    return *result, x


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("n", [1, 3])
def test_equals_native(layer, n):
    ours, native, x = pair(layer, n_power_iterations=n)
    assert list(ours.state_dict()) == list(native.state_dict())
    close(state(ours), state(native), 1e-12)
    for training in (True, True, False, True, False):
        ours.train(training), native.train(training)
        out, expected = ours(x), native(x)
        close(out, expected)
        out.square().sum().backward(), expected.square().sum().backward()
        close([p.grad for p in ours.parameters()], [p.grad for p in native.parameters()])
    close(state(ours), state(native))


@pytest.mark.parametrize("training", [True, False])
def test_one_seed_gives_torchs_draws(training):
    start = []
    for norm in (spectral_norm, torchs):
        torch.manual_seed(7)
        start.append(norm(nn.Conv2d(3, 5, 3).train(training)))
        start.append(torch.get_rng_state())
    assert torch.equal(start[1], start[3])
    if not training:  # in training the check forward moves them, to the same numbers
        assert same(state(start[0]), state(start[2]))
    close(state(start[0]), state(start[2]), 1e-6)


@pytest.mark.parametrize("dim", [0, 1, -1, 2])
def test_dim(dim):
    ours, native, x = pair("conv2d", dim=dim)
    assert ours.parametrizations.weight[0].dim == native.parametrizations.weight[0].dim
    close(ours(x), native(x))


def test_transposed_convolution_uses_its_output_channels():
    layer = spectral_norm(nn.ConvTranspose2d(3, 4, (5, 6)))
    assert layer(torch.randn(2, 3, 10, 12)).shape[1] == 4
    assert layer.parametrizations.weight[0]._u.shape == layer.parametrizations.weight.original[0, :, 0, 0].shape


@pytest.mark.parametrize("kwargs", [{"dim": 2}, {"dim": -3}, {"n_power_iterations": 0}, {"n_power_iterations": -1}])
def test_errors_are_torchs(kwargs):
    errors = []
    for norm in (spectral_norm, torchs):
        with pytest.raises((ValueError, IndexError)) as error:
            norm(nn.Linear(3, 4), **kwargs)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", ["nothing", "forward"])
def test_error_of_a_missing_tensor_is_torchs(name):
    errors = []
    for norm in (spectral_norm, torchs):
        with pytest.raises(ValueError) as error:
            norm(nn.Linear(3, 4), name)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_registers_buffers_and_leaves_a_plain_attribute():
    layer = spectral_norm(nn.Linear(5, 7))
    norm = layer.parametrizations.weight[0]
    assert isinstance(norm, SpectralNorm) and (norm.n_power_iterations, norm.eps, norm.dim) == (1, 1e-12, 0)
    assert norm._u.shape == (7,) and norm._v.shape == (5,) and set(norm._buffers) == {"_u", "_v"}
    assert "original" in layer.parametrizations.weight._parameters
    assert "weight" not in layer._parameters and "weight" not in layer._buffers
    assert layer.weight.stride() == layer.parametrizations.weight.original.stride()
    assert "SpectralNorm(n_power_iterations=1, dim=0)" in repr(layer)


def test_removed_by_torch():
    layer = spectral_norm(nn.Linear(5, 7)).eval()
    parameter, normalized = layer.parametrizations.weight.original, layer.weight
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear and layer.weight is parameter and torch.equal(layer.weight, normalized)


def test_twice_on_one_weight_and_on_the_bias():
    torch.manual_seed(0)
    native = torchs(torchs(torchs(nn.Linear(5, 7).double())), "bias")
    torch.manual_seed(0)
    ours = spectral_norm(spectral_norm(spectral_norm(nn.Linear(5, 7).double())), "bias")
    assert list(ours.state_dict()) == list(native.state_dict()) and not ours.parametrizations.bias[0]._buffers
    x = torch.randn(3, 5, dtype=torch.float64)
    for _ in range(2):
        out, expected = ours(x), native(x)
        close(out, expected)
        out.sum().backward(), expected.sum().backward()
        close([p.grad for p in ours.parameters()], [p.grad for p in native.parameters()])
    parametrize.remove_parametrizations(ours, "bias")
    assert "bias" in ours._parameters and parametrize.is_parametrized(ours, "weight")
    parametrize.remove_parametrizations(ours, "weight")
    assert type(ours) is nn.Linear


def test_moves_at_every_access_in_training_only():
    layer, native, _ = pair("linear")
    norm = layer.parametrizations.weight[0]
    for training in (True, False):
        layer.train(training), native.train(training)
        for _ in range(2):
            before = norm._u.clone()
            close(layer.weight, native.weight)
            assert torch.equal(before, norm._u) != training
    close(state(layer), state(native))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_training_and_eval(requires_grad):
    """The course of torch's test: steps, two forwards in one graph, removal, eval."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, dtype=torch.float64)

    def make():
        layer = nn.Linear(3, 4).double()
        layer.weight.requires_grad_(requires_grad)
        return spectral_norm(layer)

    layer = make()
    norm = layer.parametrizations.weight[0]
    u, v = norm._u.clone(), norm._v.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).sum().backward()
    optimizer.step()
    out = layer(x)
    if requires_grad:
        assert not torch.equal(u, norm._u) and not torch.equal(v, norm._v)
        torch.autograd.grad(out.sum(), layer.parametrizations.weight.original)

    saved = norm._u.clone(), norm._v.clone()

    def forwards(*modes):
        def run(x):
            norm._u.data.copy_(saved[0]), norm._v.data.copy_(saved[1])
            return sum(layer.train(mode)(x) for mode in modes)

        return run

    forwards(True, True)(x.clone().requires_grad_()).sum().backward()
    assert gradcheck(forwards(True, True), (x.clone().requires_grad_(),), check_batched_grad=False)
    assert gradcheck(forwards(True, False, True, False), (x.clone().requires_grad_(),))
    if requires_grad:
        layer.eval()
        assert gradcheck(lambda weight: layer(x), (layer.parametrizations.weight.original,), check_batched_grad=True)

    layer = make()
    for _ in range(3):
        before = layer(x)
    parametrize.remove_parametrizations(layer.eval(), "weight")
    close(layer(x), before, 1e-12)

    layer = make()
    last, norm = layer(x), layer.parametrizations.weight[0]
    u, v = norm._u.clone(), norm._v.clone()
    layer.eval()
    close(layer(x), last, 1e-12)
    assert torch.equal(layer(x), layer(x)) and torch.equal(norm._u, u) and torch.equal(norm._v, v)


@pytest.mark.parametrize("variant", ["sn", "bssn", Variant(0.3, 0.7, 0.5, 1.1)])
def test_gradients_of_the_weight(variant):
    layer = spectral_norm(nn.Conv2d(2, 3, 2).double(), variant=variant, learnable_gain=True).eval()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    tensors = (layer.parametrizations.weight.original, layer.parametrizations.weight[0]._gain)
    assert gradcheck(lambda *_: layer(x), tensors, check_batched_grad=True)
    assert gradgradcheck(lambda *_: layer(x), tensors)


def test_load_state_dict():
    x = torch.randn(2, 3)
    for times in (0, 3):
        layer = spectral_norm(nn.Linear(3, 5))
        for _ in range(times):
            layer(x)
        saved = copy.deepcopy(layer.state_dict())
        keys = {f"parametrizations.weight.{key}" for key in ("original", "0._u", "0._v")}
        assert set(saved) == keys | {"bias"}
        partial = copy.deepcopy(saved)
        partial["nonsense"] = "nonsense"
        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "nonsense"'):
            layer.load_state_dict(partial, strict=True)
        layer.load_state_dict(partial, strict=False)
        for gone in ("parametrizations.weight.original", "parametrizations.weight.0._u"):
            del partial[gone]
            layer.load_state_dict(partial, strict=False)
        with pytest.raises(RuntimeError, match="size mismatch for parametrizations.weight.0._u"):
            layer.load_state_dict(saved | {"parametrizations.weight.0._u": torch.ones(4)})

        rewrapped = spectral_norm(parametrize.remove_parametrizations(layer, "weight"))
        rewrapped.load_state_dict(saved)
        native = torchs(nn.Linear(3, 5))
        native.load_state_dict(saved)
        for training in (False, True, True, False):
            close(rewrapped.train(training)(x), native.train(training)(x), 1e-5)


def test_a_naive_forward_gives_the_same():
    layer = spectral_norm(nn.Linear(5, 7))
    norm, weight = layer.parametrizations.weight[0], layer.parametrizations.weight.original.detach()
    u = F.normalize(weight @ norm._v, dim=0)
    v = F.normalize(weight.T @ u, dim=0)
    x = torch.randn(3, 5)
    close(layer(x), F.linear(x, weight / torch.dot(u, weight @ v), layer.bias), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float, torch.cfloat])
def test_spectral_norm_of_a_diagonal_matrix(dtype):
    layer = nn.Linear(2, 2, dtype=dtype)
    with torch.no_grad():
        x = torch.diagonal(layer.weight)
        layer.weight = nn.Parameter(torch.diag(x))
        spectral_norm(layer)
        torch.testing.assert_close(layer.weight.data, torch.diag(x / x.abs().max()))


@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 2)])
def test_complex(shape):
    results = []
    for norm in (spectral_norm, torchs):
        torch.manual_seed(0)
        module = nn.Module()
        module.weight = nn.Parameter(torch.randn(shape, dtype=torch.complex128))
        norm(module)
        for _ in range(3):
            module.zero_grad()
            (module.weight * (1 + 2j)).abs().square().sum().backward()
        results.append([module.weight.detach(), module.parametrizations.weight.original.grad])
        results[-1] += list(module.buffers())
    close(results[0], results[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights(dtype):
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(16, 8).to(dtype))
    norm = layer.parametrizations.weight[0]
    layer(torch.randn(2, 16, dtype=dtype)).sum().backward()
    assert norm._u.dtype == layer.weight.dtype == layer.parametrizations.weight.original.grad.dtype == dtype
    for _ in range(20):
        layer(torch.randn(2, 16, dtype=dtype))
    assert torch.linalg.matrix_norm(layer.weight.float(), 2).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("where", ["apply", "convert"])
def test_swap_tensors(where):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer = spectral_norm(nn.Linear(3, 4))
        x = torch.randn(2, 3)
        before = layer.eval()(x).detach()
        if where == "convert":
            layer.train()(x).sum().backward()
            layer.eval().double()
            before = layer(x.double()).detach()
            x = x.double()
        parametrize.remove_parametrizations(layer, "weight")
        torch.testing.assert_close(layer(x).detach(), before)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_pickle_is_refused_as_by_torch_and_copies_are_independent():
    layer = spectral_norm(nn.Linear(3, 4))
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(layer)
    replica = copy.deepcopy(layer)
    u = layer.parametrizations.weight[0]._u.clone()
    replica(torch.randn(2, 3))
    assert torch.equal(u, layer.parametrizations.weight[0]._u)
    torch.save(layer.state_dict(), file := io.BytesIO())
    file.seek(0)
    replica.load_state_dict(torch.load(file, weights_only=True))
    assert same(state(replica), state(layer))


def test_cached():
    layer = spectral_norm(nn.Linear(3, 4))
    with parametrize.cached():
        assert layer.weight is layer.weight
    assert layer.weight is not layer.weight


def test_rule_may_be_changed_later():
    ours, native, x = pair("linear")
    for layer in (ours, native):
        layer(x)
        layer.parametrizations.weight[0].n_power_iterations = 4
        layer.parametrizations.weight[0].eps = 1e-3
    close(ours(x), native(x))
    close(state(ours), state(native))
