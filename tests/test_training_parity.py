"""Twenty optimizer steps beside native torch: the same losses, weights and vectors."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as native_hook
from torch.nn.utils.parametrizations import spectral_norm as native_parametrization
from truth import relative
from zoo import interpreted

import bssn_kernels as bk

NATIVE = {"parametrization": native_parametrization, "hook": native_hook}
STEPS = 20


def steps(backend: str) -> int:
    """Fewer in Triton's interpreter, which takes a second for each."""
    return 2 if interpreted(backend) else STEPS


class Discriminator(nn.Module):
    """Every kind of layer; a branch that is read twice would count twice, so each is read once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.shortcut = nn.Conv2d(3, 6, 1)
        self.embedding = nn.Embedding(5, 6)
        self.bilinear = nn.Bilinear(6, 6, 4)
        self.linear = nn.Linear(10, 1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        act = torch.nn.functional.leaky_relu
        h = self.up(act(self.grouped(act(self.conv(x), 0.1)), 0.1)) + self.shortcut(x)
        h = act(h, 0.1).mean((2, 3))
        return self.linear(torch.cat([h, self.bilinear(h, self.embedding(label))], 1))


def build(form: str, dtype: torch.dtype, n_power_iterations: int = 1, norm=None, **kwargs) -> Discriminator:
    torch.manual_seed(1)
    model = Discriminator().to(dtype)
    for module in model.children():
        (norm or NATIVE[form])(module, n_power_iterations=n_power_iterations, **kwargs)
    return model


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    real = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    fake = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64) * 0.5
    return real.to(dtype), fake.to(dtype), torch.randint(5, (6,), generator=generator)


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, dtype: torch.dtype) -> Tensor:
    """Two training forwards, one backward: the discriminator's logistic loss."""
    real, fake, label = batch(step, dtype)
    optimizer.zero_grad()
    softplus = torch.nn.functional.softplus
    loss = softplus(-model(real, label)).mean() + softplus(model(fake, label)).mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def evaluate(model: nn.Module, dtype: torch.dtype) -> Tensor:
    real, _, label = batch(-1, dtype)
    model.eval()
    out = model(real, label).detach()
    model.train()
    return out


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.5, 0.999))


def assert_close(ours: nn.Module, theirs: nn.Module, bound: float) -> None:
    """Weights and vectors, and the gradients that led to them."""
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    for key in state:
        assert relative(state[key], expected[key]) <= bound, key
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert relative(a.grad, b.grad) <= bound, f"gradient of {name}"


@pytest.mark.parametrize("n_power_iterations", [1, 2])
@pytest.mark.parametrize("form", NATIVE)
def test_twenty_steps_in_double_precision(backend, form, n_power_iterations):
    dtype = torch.float64
    theirs, ours = (build(form, dtype, n_power_iterations) for _ in range(2))
    group = bk.fuse(ours, backend=backend)
    assert len(group.layers) == 7
    optimizers = adam(ours), adam(theirs)
    for step in range(steps(backend)):
        found, expected = (step_once(m, o, step, dtype) for m, o in zip((ours, theirs), optimizers))
        assert relative(found, expected) <= 1e-9
        assert_close(ours, theirs, 1e-9)
        assert relative(evaluate(ours, dtype), evaluate(theirs, dtype)) <= 1e-9
    assert not torch.equal(found, step_once(ours, optimizers[0], 0, dtype)), "something was learned"


def test_twenty_steps_of_layers_alone(backend):
    """``spectral_norm`` on each layer, no group."""
    dtype = torch.float64
    theirs = build("parametrization", dtype)
    ours = build("", dtype, norm=bk.spectral_norm, backend=backend)
    optimizers = adam(ours), adam(theirs)
    assert_same_start(ours, theirs)
    for step in range(steps(backend)):
        found, expected = (step_once(m, o, step, dtype) for m, o in zip((ours, theirs), optimizers))
        assert relative(found, expected) <= 1e-9
        assert_close(ours, theirs, 1e-9)
        assert relative(evaluate(ours, dtype), evaluate(theirs, dtype)) <= 1e-9


def assert_same_start(ours: nn.Module, theirs: nn.Module) -> None:
    """One seed gives torch's start."""
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    assert all(relative(state[key], expected[key]) < 1e-12 for key in state)


@pytest.mark.parametrize("form", NATIVE)
def test_each_step_in_single_precision(backend, form):
    """From the same state each time: longer runs are chaotic."""
    dtype = torch.float32
    theirs, ours = (build(form, dtype) for _ in range(2))
    bk.fuse(ours, backend=backend)
    for step in range(steps(backend)):
        ours.load_state_dict(theirs.state_dict())
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (ours, theirs)]
        found, expected = (step_once(m, o, step, dtype) for m, o in zip((ours, theirs), optimizers))
        assert relative(found, expected) <= 1e-5
        assert_close(ours, theirs, 1e-5)
        assert relative(evaluate(ours, dtype), evaluate(theirs, dtype)) <= 1e-5


@pytest.mark.parametrize("form", NATIVE)
def test_handing_over_in_mid_training(backend, form):
    """Ten native steps, ten fused, ten native again with the same optimizer."""
    dtype = torch.float64
    theirs, ours = (build(form, dtype) for _ in range(2))
    optimizers = adam(ours), adam(theirs)
    group = None
    for step in range(3 * steps(backend) // 2):
        if step == steps(backend) // 2:
            group = bk.fuse(ours, backend=backend)
        if step == steps(backend):
            group.restore()
        found, expected = (step_once(m, o, step, dtype) for m, o in zip((ours, theirs), optimizers))
        assert relative(found, expected) <= 1e-9
        assert_close(ours, theirs, 1e-9)


@pytest.mark.parametrize("form", NATIVE)
def test_gradient_penalty(backend, form):
    """A penalty on the gradient of the input, through the fused weights."""
    dtype = torch.float64
    theirs, ours = (build(form, dtype) for _ in range(2))
    bk.fuse(ours, backend=backend)
    real, _, label = batch(0, dtype)
    for model in (ours, theirs):
        x = real.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x, label).sum(), x, create_graph=True)
        slope.square().sum((1, 2, 3)).sub(1).square().mean().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if b.grad is None or not b.grad.any():
            assert a.grad is None or not a.grad.any(), name
        else:
            assert relative(a.grad, b.grad) <= 1e-9, name


def test_a_copy_trains_as_the_original(backend):
    dtype = torch.float64
    ours = build("parametrization", dtype)
    bk.fuse(ours, backend=backend)
    step_once(ours, adam(ours), 0, dtype)
    twin = copy.deepcopy(ours)
    optimizers = adam(ours), adam(twin)
    for step in range(3):
        a, b = (step_once(m, o, step, dtype) for m, o in zip((ours, twin), optimizers))
        assert torch.equal(a, b)
