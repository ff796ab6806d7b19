"""What users do with a model under torch's spectral norm beside plain training, done to a native and a fused one."""

import copy
import functools

import pytest
import torch
from nets import FORMS, both, close, images, pair, raw
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad
from torch.nn.utils import prune
from torch.nn.utils import spectral_norm as torch_hook
from torch.nn.utils.parametrizations import spectral_norm as torch_parametrization
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from bssn_kernels.group import fuse, group_of


class Heads(nn.Module):
    """Layers side by side, so that some may be left unused; input (n, 6)."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        wrap = torch_hook if form == "hook" else torch_parametrization
        self.layers = nn.ModuleList(wrap(nn.Linear(6, 6)) for _ in range(3)).double()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


def rows(seed: int = 1) -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
def test_a_default_device(form):
    """It is where torch makes new tensors, not where ours have to be."""

    def act(net):
        x, wanted = images(), torch.ones(4, 1, dtype=torch.float64)
        with torch.device("meta"):
            out = net(x)
            grads = torch.autograd.grad(out, [raw(net[0]), raw(net[6])], wanted)
        return [out.detach(), *grads]

    both(act, form)


@pytest.mark.parametrize("form", FORMS)
def test_forward_mode_gradients(form):
    def act(net):
        net.eval()
        with forward_ad.dual_level():
            duals = {k: forward_ad.make_dual(p.detach(), torch.ones_like(p)) for k, p in net.named_parameters()}
            of_weights = forward_ad.unpack_dual(functional_call(net, duals, (images(),)).sum()).tangent
            x = forward_ad.make_dual(images(), torch.ones_like(images()))
            (dw,) = torch.autograd.grad(net(x).square().sum(), raw(net[0]))
            return [of_weights, dw.detach(), forward_ad.unpack_dual(dw).tangent.detach()]

    both(act, form)


@pytest.mark.parametrize("form", ["parametrization", "hook"])
def test_hooks_of_weights_of_unused_layers(form):
    """They are not called with None."""

    def act(net):
        for p in net.parameters():
            p.register_hook(lambda g: g.clamp(-0.1, 0.1))
        u, v, _ = net(rows())
        (u + v).sum().backward()
        return [p.grad for p in net.parameters()]

    both(act, form, Heads)


@pytest.mark.parametrize("form", ["parametrization", "hook"])
def test_a_step_of_one_head_before_the_backward_of_another(form):
    def act(net):
        u, v, _ = net(rows())
        u.sum().backward()
        with torch.no_grad():
            raw(net.layers[0]).sub_(0.1)
        v.sum().backward()
        return [p.grad for p in net.parameters()]

    both(act, form, Heads)


def test_computed_weights_keep_their_graphs_apart():
    def act(net):
        z = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        u, v, _ = functional_call(net, {k: p * z for k, p in net.named_parameters()}, (rows(),))
        u.sum().backward()
        v.sum().backward()
        return [z.grad]

    both(act, "parametrization", Heads)


def test_pruned_weights():
    def act(net):
        torch.manual_seed(1)
        prune.random_unstructured(net.layers[1].parametrizations.weight, "original", 0.3)
        for _ in range(2):
            net.zero_grad()
            sum(out.square().sum() for out in net(rows())).backward()
        return [p.grad for p in net.parameters()]

    both(act, "parametrization", Heads)


@pytest.mark.parametrize("form", FORMS)
def test_selective_checkpoints(form):
    kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])

    def act(net):
        net.eval()
        checkpoint(net, images().requires_grad_(), use_reentrant=False, context_fn=kept).sum().backward()
        return [p.grad for p in net.parameters()]

    both(act, form)


@pytest.mark.parametrize("form", FORMS)
def test_vmap_over_a_backward(form):
    def act(net):
        out, parameters = net(images()).flatten(), list(net.parameters())
        return torch.vmap(lambda v: torch.autograd.grad(out, parameters, v, retain_graph=True))(torch.eye(4).double())

    both(act, form)


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_of_a_weight_after_the_forward(form):
    """Under the old hook it is the weight of that forward, with its graph."""

    def act(net):
        loss = net(images()).sum()
        for layer in (net[0], net[6]):
            w = layer.weight.flatten(1)
            loss = loss + (w @ w.T - torch.eye(len(w))).square().sum()
        loss.backward()
        return [p.grad for p in net.parameters()]

    nets = pair(form)
    for net in nets:
        net.eval()  # under the parametrization natively each read in training is an iteration
    close(act(nets[1]), act(nets[0]))


def test_the_weight_after_a_forward_can_be_copied():
    net = pair("hook")[1]
    net(images())
    assert net[0].weight.requires_grad and net[0].weight.grad_fn is not None
    for other in (copy.deepcopy(net), nn.Sequential(*[copy.deepcopy(layer) for layer in net])):
        close(other.eval()(images()), net.eval()(images()).detach())
        net.train()


@pytest.mark.parametrize("form", FORMS)
def test_parameters_frozen_between_forward_and_backward(form):
    def act(net):
        x = images().requires_grad_()
        out = net(x)
        net.requires_grad_(False)
        out.sum().backward(create_graph=True)
        return [x.grad.detach()]

    both(act, form)


def test_sigmas_after_a_transform():
    net = pair("parametrization")[1].eval()
    group = group_of(net)
    grad(lambda p: functional_call(net, p, (images(),)).sum())({k: p.detach() for k, p in net.named_parameters()})
    for sigma in group.sigmas().values():
        assert sigma > 0 and not torch._C._functorch.is_functorch_wrapped_tensor(sigma)


def test_a_complex_vector_first_read_in_inference_mode():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, dtype=torch.complex128))

        def forward(self) -> torch.Tensor:
            return self.weight

    model = torch_parametrization(Model())
    fuse(model)
    with torch.inference_mode():
        model()
    model().abs().sum().backward()
    assert model.parametrizations.weight.original.grad is not None
