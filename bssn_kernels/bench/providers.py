"""Who normalizes: torch's own spectral_norm, or one of our backends, all behind the same root module and call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize, remove_spectral_norm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

import bssn_kernels
from bssn_kernels.bench.task import Task
from bssn_kernels.rule import Rule

PLAIN_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Site:
    """A normalized weight: where it is, in which ``form`` ("parametrization" or "hook"), and its settings."""

    module: str
    tensor: str
    form: str
    semantics: str
    axis: int
    eps: float
    n_power_iterations: int

    @property
    def name(self) -> str:
        return f"{self.module}.{self.tensor}" if self.module else self.tensor


def native_sites(model: nn.Module) -> list[Site]:
    """All weights of the model under torch's spectral_norm, in either form."""
    sites = []
    for module_name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for tensor, stack in module.parametrizations.items():
                for norm in stack if stack.is_tensor else ():
                    if type(norm) is _SpectralNorm:
                        settings = norm.dim, norm.eps, getattr(norm, "n_power_iterations", 1)
                        sites.append(Site(module_name, tensor, "parametrization", "torch", *settings))
        for hook in module._forward_pre_hooks.values():
            if type(hook) is SpectralNorm:
                settings = hook.dim, hook.eps, hook.n_power_iterations
                sites.append(Site(module_name, hook.name, "hook", "torch_hook", *settings))
    return sites


class Root(nn.Module):
    """A model whose forward does nothing but read all its normalized weights, in the order of ``sites``.

    Calling it is what is timed: one forward of the root, whoever normalizes below.

    Raises:
        ValueError: no sites, so that nothing would be timed.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        super().__init__()
        if not sites:
            raise ValueError(f"{type(model).__name__}: no normalized weight to read")
        self.model = model
        self.sites = tuple(sites)
        self._reads = [(model.get_submodule(site.module), site.tensor, site.form == "hook") for site in sites]

    def forward(self) -> list[Tensor]:
        weights = []
        for module, tensor, by_hook in self._reads:
            if by_hook:
                # Under the old hook the weight is an attribute that the layer's forward sets before it begins.
                for hook in module._forward_pre_hooks.values():
                    if isinstance(hook, SpectralNorm) and hook.name == tensor:
                        hook(module, ())
            weights.append(getattr(module, tensor))
        return weights

    def originals(self) -> list[Tensor]:
        """The weight before normalization of every site."""
        return [
            getattr(module, tensor + "_orig") if by_hook else module.parametrizations[tensor].original
            for module, tensor, by_hook in self._reads
        ]

    def vectors(self) -> list[list[Tensor]]:
        """The stored u, v[, u_in, v_in] of every site; none for 1-D weights."""
        return self._held("_u", "_v", "_u_in", "_v_in")

    def gains(self) -> list[Tensor | None]:
        """The learnable gain of every site, shape (1,), or None."""
        return [held[0] if held else None for held in self._held("_gain")]

    def _held(self, *endings: str) -> list[list[Tensor]]:
        """Of every site what its normalization keeps under these names."""
        found = []
        for module, tensor, by_hook in self._reads:
            holders = [module] if by_hook else module.parametrizations[tensor]
            names = [(tensor if by_hook else "") + ending for ending in endings]
            found.append([x for holder in holders for name in names if (x := getattr(holder, name, None)) is not None])
        return found


class Subject:
    """A model to be normalized in several ways, and its layers.

    Args:
        name: for the table.
        model: an nn.Module, whose layers under torch's spectral_norm are taken, or, where it has none, all its
            convolutions, linear layers and embeddings. It is not copied but changed.
        learnable_gain: ours have one per layer (native has no counterpart).
        device: of the copies and the gradients; the model itself has to be on the CPU.

    Raises:
        ValueError: no such layer, or weights that are not real floating point numbers on the CPU.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        learnable_gain: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name = name
        for module in model.modules():
            _refuse(name, module)
            for key, value in vars(module).items():  # as weight_norm and pruning leave; it could not be copied
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    vars(module)[key] = value.detach()
        self.learnable_gain = learnable_gain
        self.device = torch.device(device)
        if not native_sites(model):
            for module in list(model.modules()):
                if isinstance(module, PLAIN_LAYERS) and isinstance(getattr(module, "weight", None), nn.Parameter):
                    parametrizations.spectral_norm(module)
        self.native = model.train().requires_grad_()
        self.sites = native_sites(model)
        if not self.sites:
            raise ValueError(f"{name}: no layer under spectral_norm and no convolution, linear layer or embedding")
        self.weights = [weight.detach() for weight in Root(model, self.sites).originals()]
        for site, weight in zip(self.sites, self.weights):
            if not weight.is_floating_point() or weight.device.type != "cpu":
                raise ValueError(
                    f"{name}: {site.name} is {weight.dtype} on {weight.device}, expected real numbers on cpu"
                )

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.nbytes for weight in self.weights)

    def copy(self) -> Root:
        """A fresh copy of the model under torch's spectral_norm, on the device."""
        return Root(copy.deepcopy(self.native).to(self.device), self.sites)

    def grads(self) -> list[Tensor]:
        """N(0, 1) gradients of the normalized weights, the same every time, in their shapes and strides."""
        # Another seed than that of the weights: gradients in their direction would be nothing but cancellation.
        generator = torch.Generator(self.device).manual_seed(1)
        return [torch.empty_like(w, device=self.device).normal_(generator=generator) for w in self.weights]


def _refuse(name: str, module: nn.Module) -> None:
    """What could only be measured as something else, or not at all."""
    lists = module.parametrizations.values() if parametrize.is_parametrized(module) else ()
    norms = [*(norm for stack in lists for norm in stack), *module._forward_pre_hooks.values()]
    if any(isinstance(norm, Rule) for norm in norms):
        raise ValueError(f"{name}: expected a model as it is without this package, got one fused or normalized by it")
    if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
        kind = type(module).__name__
        raise ValueError(f"{name}: expected initialized weights, got those of a {kind}: run a forward first")


def tasks_of(
    root: nn.Module, grads: Sequence[Tensor], call: Callable[[], list[Tensor]] | None = None
) -> dict[str, Task]:
    """"forward" alone, and "both": forward with backward from given gradients of every normalized weight.

    Args:
        call: the forward, where it is not the root itself.
    """
    parameters, forward = list(root.parameters()), call or root

    def both() -> list[Tensor]:
        outputs = forward()
        torch.autograd.backward(outputs, grads)
        return outputs

    def clear() -> None:
        for parameter in parameters:
            parameter.grad = None

    return {"forward": Task(forward), "both": Task(both, clear)}


@dataclass(frozen=True)
class Provider:
    """One way to normalize a model.

    Args:
        name: for the table.
        variants: names of what it can do; None means every variant.
        make: makes a root from a subject and a variant's name.
        tasks: what is timed of it, from the root and the gradients.
        backend: the name of ours, empty for others. graph, compiled: runs as a CUDA graph; under torch.compile.
        left_out: why it cannot run here, if so.
    """

    name: str
    variants: tuple[str, ...] | None
    make: Callable[[Subject, str], Root]
    tasks: Callable[[Root, Sequence[Tensor]], dict[str, Task]] = tasks_of
    backend: str = ""
    graph: bool = False
    compiled: bool = False
    left_out: str = ""


def make_native(subject: Subject, variant: str) -> Root:
    """torch's spectral_norm, in the form that the model has."""
    return subject.copy()


def make_fused(backend: str | None, subject: Subject, variant: str) -> Root:
    """``fuse`` for plain SN, which is what a user does with a model that has it; else ``normalize`` of a plain copy."""
    root = subject.copy()
    if variant == "sn" and not subject.learnable_gain:
        bssn_kernels.fuse(root, backend=backend)
        return root
    settings = {(site.semantics, site.eps, site.n_power_iterations) for site in subject.sites}
    if len(settings) > 1:
        raise ValueError(f"{variant}: the layers differ in form, eps or n_power_iterations: {sorted(settings)}")
    ((semantics, eps, n_power_iterations),) = settings
    modules = [root.model.get_submodule(site.module) for site in subject.sites]
    for module, site in zip(modules, subject.sites):
        strip(module, site)
    root = Root(root.model, [replace(site, form="parametrization") for site in subject.sites])
    bssn_kernels.normalize(
        root,
        variant,
        n_power_iterations=n_power_iterations,
        eps=eps,
        semantics=semantics,
        where=lambda name, module: module in modules,
        learnable_gain=subject.learnable_gain,
        backend=backend,
    )
    return root


def strip(module: nn.Module, site: Site) -> None:
    """Make a layer of a copied model plain again, its weight as before normalization.

    torch's ``remove_parametrizations`` takes the weight's property from the class, which copies of a module share: it
    would break the original too.
    """
    if site.form == "hook":
        remove_spectral_norm(module, site.tensor)
        return
    if len(module.parametrizations) > 1 or len(module.parametrizations[site.tensor]) > 1:
        raise ValueError(f"{site.name}: expected no parametrization beside spectral_norm")
    weight = module.parametrizations[site.tensor].original
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module.register_parameter(site.tensor, weight)


NATIVE = Provider("native", ("sn",), make_native)


def fused(backend: str) -> Provider:
    """The provider of one of our backends."""
    return Provider(backend, None, lambda subject, variant: make_fused(backend, subject, variant), backend=backend)
