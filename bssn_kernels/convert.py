"""Adopt layers under torch's spectral norm, either form, give them back, and fold."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as TorchParametrization
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook

from bssn_kernels import functional
from bssn_kernels.frame import Member
from bssn_kernels.parametrizations import SpectralNorm, install_getter, torchs_property
from bssn_kernels.parts import Source
from bssn_kernels.rule import Rule
from bssn_kernels.variants import Variant, resolve_semantics

_OWN = ("variant", "semantics", "backend", "output_dtype", "label", "_member", "_plan", "_last", "_last_after")


class FusedHook(Rule, TorchHook):
    """torch's old hook, reading the frame. The same object in the same place, so ``remove_spectral_norm`` finds it."""

    def __call__(self, module: nn.Module, inputs) -> None:
        weight, member = getattr(module, self.name + "_orig"), self._member
        frame = None if member is None else member.frame()
        if frame is not None and frame.serves(member.index, weight):
            out = frame.read(member.index)
        else:
            vectors = [getattr(module, self.name + "_u"), getattr(module, self.name + "_v")]
            out = self.normalize_alone(weight, vectors, None, module.training, self.backend)
        if torch.compiler.is_compiling():  # the dynamo of torch 2.6 does not write to a __dict__
            setattr(module, self.name, out)
        else:  # in a tenth of the time
            module.__dict__[self.name] = out

    def __deepcopy__(self, memo: dict) -> FusedHook:
        """Natively a module whose weight has a place in the graph cannot be copied; its copy gets the value."""
        if self._member is not None:
            module = self._member.group.layers[self._member.index].module
            weight = module.__dict__.get(self.name)
            if weight is not None and weight.requires_grad:  # copied later than the hooks, by the order of __dict__
                memo[id(weight)] = weight.detach().clone()
        replica = FusedHook.__new__(FusedHook)
        memo[id(self)] = replica
        replica.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return replica


class Layer:
    """What the two kinds of layer of a group share.

    Attributes:
        rule: how it is normalized.
        names: of the layer; several where it shares Parameter and rule with others.
        index: its place in the group.
        hooked: it is under torch's old hook.
        torchs: it was torch's and can be given back.
    """

    rule: Rule
    names: list[str]
    index = -1
    hooked = torchs = False

    def join(self, group, index: int) -> None:
        """Become a layer of a group."""
        self.index, self.rule.label = index, self.names[0]
        self.rule._member = Member(group, index)

    def draw(self) -> None:
        """Draw the vectors anew, as their semantics start."""
        weight = self.weight().detach()
        for vector, start in zip(self.vectors(), functional.initial_vectors(weight, self.rule.spec(weight))):
            vector.copy_(start)


class ParametrizedLayer(Layer):
    """One weight under our parametrization; ``places`` are the (module, tensor name) that share it."""

    def __init__(self, rule: SpectralNorm, module: nn.Module, tensor: str, name: str, torchs: bool = False) -> None:
        self.rule, self.places, self.names, self.torchs = rule, [(module, tensor)], [name], torchs

    def share(self, module: nn.Module, name: str) -> None:
        """Another module with the same Parameter and parametrization."""
        self.places.append((module, self.places[0][1]))
        self.names.append(name)

    def modules(self) -> list[nn.Module]:
        return [module for module, _ in self.places]

    def lists(self) -> Iterator[tuple[nn.Module, str, parametrize.ParametrizationList]]:
        """The places where the parametrization still is."""
        for module, name in self.places:
            lists = module._modules.get("parametrizations")
            weights = None if lists is None else lists._modules.get(name)
            if weights is not None and weights._modules.get("0") is self.rule:
                yield module, name, weights

    def weight(self) -> Tensor | None:
        """The raw weight as it stands; None if the layer is gone."""
        return next((weights.original for _, _, weights in self.lists()), None)

    def vectors(self) -> list[Tensor]:
        return [self.rule._buffers[name] for name in self.rule.vector_names]

    def gain(self) -> Tensor | None:
        return self.rule._gain if self.rule.learnable_gain else None

    def source(self) -> Source:
        rule = self.rule
        module, name, weights = next(self.lists())
        gains = rule._parameters if rule.learnable_gain else None
        container = next(c for c in ("_parameters", "_buffers", "__dict__") if "original" in getattr(weights, c))
        owner = module._modules["parametrizations"]._modules
        return Source(owner, name, container, "original", rule._buffers, rule.vector_names, gains, rule.__dict__)

    def unwrap(self) -> None:
        """Leave a plain module with the raw weight. Works on the instance: deep copies share the generated class."""
        for module, name, weights in list(self.lists()):
            if len(weights) > 1:  # what was registered on top of ours stays
                del weights[0]
                continue
            original, lists = weights.original, module._modules["parametrizations"]._modules
            del lists[name]
            if lists:
                _fresh_class(module, name, None)
            else:
                del module._modules["parametrizations"]
                module.__class__ = type(module).__bases__[0]
            if isinstance(original, nn.Parameter):
                module.register_parameter(name, original)
            else:
                module.register_buffer(name, original)
        self.rule._member = None

    def leave(self) -> None:
        """Leave the group; what was torch's becomes torch's again."""
        self.rule._member = None
        if self.torchs:
            for module, name, _ in self.lists():
                _fresh_class(module, name, torchs_property(module, name))
            _give_back(self.rule, TorchParametrization)


class HookedLayer(Layer):
    """One weight under torch's old hook."""

    hooked = torchs = True

    def __init__(self, rule: FusedHook, module: nn.Module, name: str) -> None:
        self.rule, self.module, self.names = rule, module, [name]

    def modules(self) -> list[nn.Module]:
        return [self.module]

    def weight(self) -> Tensor | None:
        if all(hook is not self.rule for hook in self.module._forward_pre_hooks.values()):
            return None
        return getattr(self.module, self.rule.name + "_orig")

    def vectors(self) -> list[Tensor]:
        return [getattr(self.module, self.rule.name + suffix) for suffix in ("_u", "_v")]

    def gain(self) -> None:
        return None

    def source(self) -> Source:
        module, name = self.module, self.rule.name
        container = next(c for c in ("_parameters", "_buffers", "__dict__") if name + "_orig" in getattr(module, c))
        vectors = [name + "_u", name + "_v"]
        return Source({"": module}, "", container, name + "_orig", module._buffers, vectors, None, module.__dict__)

    def unwrap(self) -> None:
        """Leave a plain module with the raw weight."""
        module, name, hook = self.module, self.rule.name, self.rule
        weight = self.weight()
        if weight is not None:
            for key in [k for k, h in module._forward_pre_hooks.items() if h is hook]:
                del module._forward_pre_hooks[key]
            for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
                for key in [k for k, h in hooks.items() if _speaks_for(h, hook)]:
                    del hooks[key]
            for attribute in (name, name + "_u", name + "_v", name + "_orig"):
                delattr(module, attribute)
            module.register_parameter(name, weight)
        hook._member = None

    def leave(self) -> None:
        """Leave the group and become torch's again. The weight of the last forward leaves its graph, so that the module
        can be copied.
        """
        attributes, name = self.module.__dict__, self.rule.name
        if name in attributes and attributes[name].requires_grad:
            attributes[name] = attributes[name].detach()
        self.rule._member = None
        _give_back(self.rule, TorchHook)


def _speaks_for(state_hook, hook: TorchHook) -> bool:
    state_hook = getattr(state_hook, "hook", state_hook)  # torch wraps those of load_state_dict
    return (
        isinstance(state_hook, (SpectralNormStateDictHook, SpectralNormLoadStateDictPreHook)) and state_hook.fn is hook
    )


def _give_back(rule: Rule, cls: type) -> None:
    for name in _OWN:
        rule.__dict__.pop(name, None)
    object.__setattr__(rule, "__class__", cls)


def _fresh_class(module: nn.Module, name: str, attribute: property | None) -> None:
    """A class of its own for this instance, with another property, or none, under ``name``."""
    cls = type(module)
    members = {k: v for k, v in cls.__dict__.items() if k not in (name, "__dict__", "__weakref__")}
    if attribute is not None:
        members[name] = attribute
    module.__class__ = type(cls)(cls.__name__, cls.__bases__, members)


def layer_name(module_name: str, tensor: str) -> str:
    """A module's name; with the tensor's where that is not "weight" or the module is the root."""
    return module_name if module_name and tensor == "weight" else f"{module_name}.{tensor}".lstrip(".")


class Finding(NamedTuple):
    """A weight under spectral norm: ``problem`` says why it cannot be adopted, None if it can."""

    name: str
    module: nn.Module
    tensor: str
    rule: nn.Module | TorchHook
    problem: str | None


def find(model: nn.Module) -> list[Finding]:
    """All weights of a model under spectral norm, torch's or ours, in the order of its modules."""
    found = []
    for module_name, module in model.named_modules():
        lists = module._modules.get("parametrizations") if parametrize.is_parametrized(module) else None
        for tensor, weights in lists.items() if lists is not None else ():
            for norm in weights:
                if isinstance(norm, (TorchParametrization, SpectralNorm)):
                    problem = _problem_of_parametrization(norm, weights, module, tensor)
                    found.append(Finding(layer_name(module_name, tensor), module, tensor, norm, problem))
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, TorchHook):
                problem = _problem_of_hook(hook, module)
                found.append(Finding(layer_name(module_name, hook.name), module, hook.name, hook, problem))
    owners = Counter(id(finding.rule) for finding in found)
    return [
        f._replace(problem="its parametrization is shared") if owners[id(f.rule)] > 1 and f.problem is None else f
        for f in found
    ]


IN_GROUP, EMPTY = "it belongs to a group", "it has no elements"


def _problem_of_parametrization(
    norm: nn.Module, weights: parametrize.ParametrizationList, module: nn.Module, tensor: str
) -> str | None:
    if getattr(norm, "_member", None) is not None:
        return IN_GROUP
    if type(norm) not in (TorchParametrization, SpectralNorm):
        return f"its parametrization is a {type(norm).__name__}"
    if len(weights) > 1 or not weights.is_tensor:
        return "it has several parametrizations"
    if tensor not in type(module).__dict__:
        return "its class is derived from the one that torch made for its parametrization"
    if weights.original.numel() == 0:
        return EMPTY
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in (norm, weights)):
        return "its parametrization has hooks"
    return None


def _problem_of_hook(hook: TorchHook, module: nn.Module) -> str | None:
    if getattr(hook, "_member", None) is not None:
        return IN_GROUP
    if type(hook) not in (TorchHook, FusedHook):
        return f"its hook is a {type(hook).__name__}"
    weight = getattr(module, hook.name + "_orig")
    if weight.is_complex():
        return "torch's old hook does not conjugate its complex weight"
    if weight.numel() == 0:
        return EMPTY
    return None


def adopt(finding: Finding, backend: str | None, output_dtype: torch.dtype | str | None) -> Layer:
    """Make a layer of ours of a weight under torch's spectral norm.

    The object that did it natively changes its class and stays where it is: buffers, hooks and keys are the same
    objects before and after, nothing is drawn and nothing moves.
    """
    name, module, tensor, rule, _ = finding
    torchs = not isinstance(rule, Rule)
    hooked = isinstance(rule, TorchHook)
    if torchs:
        rule.__class__ = FusedHook if hooked else SpectralNorm
        rule.variant, rule.semantics = Variant(), resolve_semantics("torch_hook" if hooked else "torch")
    if backend is not None:
        rule.backend = backend
    if output_dtype is not None:
        rule.output_dtype = output_dtype
    if hooked:
        return HookedLayer(rule, module, name)
    install_getter(module, tensor)
    return ParametrizedLayer(rule, module, tensor, name, torchs)
