"""All normalized layers of a model in one fused call per forward: ``fuse`` and ``normalize``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bssn_kernels import backends
from bssn_kernels.convert import IN_GROUP, ParametrizedLayer, adopt, find
from bssn_kernels.keeper import RootHook
from bssn_kernels.parametrizations import SpectralNorm, default_dim, register
from bssn_kernels.rule import check_eps, check_gain, check_iterations, check_model, check_output_dtype, check_weight
from bssn_kernels.spectral_group import SpectralGroup
from bssn_kernels.variants import Semantics, Variant, resolve_semantics, resolve_variant


def fuse(
    model: nn.Module,
    *,
    update: str | None = None,
    output_dtype: torch.dtype | str | None = None,
    backward_buckets: int | str = "auto",
    backend: str | None = None,
) -> SpectralGroup:
    """Compute all layers of a model that are under torch's spectral norm, either form, in one call per forward.

    Numbers, buffers and state_dict keys stay torch's. Only layers whose parametrization or hook is exactly torch's, or
    made by :func:`spectral_norm` of this package, are adopted; the group's repr names the others.

    Args:
        model: its forward makes the calls.
        update: "manual": training forwards follow the eval rule, and only ``group.update()`` moves the vectors.
        output_dtype: of the normalized weights; "autocast" is autocast's as found when the forward begins.
        backward_buckets: number of autograd nodes that deliver the gradients; "auto" is 1, or 4 when torch.distributed
            is initialized.
        backend: who computes; default the best that can.

    Returns:
        The group; the model keeps it, and :func:`group_of` finds it again.

    Raises:
        ValueError: nothing to adopt; unknown names.
        TypeError: no module.
        RuntimeError: a backend that cannot run on this machine.
    """
    check_model(model, "fuse")
    _check_group_arguments(update, output_dtype, backward_buckets, backend)
    found = find(model)
    fit = [finding for finding in found if finding.problem is None]
    if not fit:
        seen = "; ".join(f"{finding.name}: {finding.problem}" for finding in found)
        raise ValueError(
            f"fuse: expected layers under torch's spectral_norm in {type(model).__name__}, got none"
            + (f" to adopt ({seen})" if seen else "; for a plain model use normalize()")
        )
    native = {f.name: f.problem for f in found if f.problem not in (None, IN_GROUP)}
    layers = [adopt(finding, backend, output_dtype) for finding in fit]
    return SpectralGroup(
        model, layers, update=update, backward_buckets=backward_buckets, native=native, fused=True
    )


def normalize(
    model: nn.Module,
    variant: str | Variant = "bssn",
    *,
    scale: float = 1.0,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    semantics: str | Semantics = "torch",
    where: Callable[[str, nn.Module], bool] | None = None,
    learnable_gain: bool | str = False,
    update: str | None = None,
    output_dtype: torch.dtype | str | None = None,
    backward_buckets: int | str = "auto",
    backend: str | None = None,
) -> SpectralGroup:
    """Normalize the weights of a plain model, all in one call per forward.

    Args:
        model: its forward makes the calls.
        variant: a name of :func:`bssn_kernels.variants` or a Variant.
        scale: factor of the normalized weights; for "capped", the cap.
        n_power_iterations: per forward.
        eps: smallest norm that is divided by.
        semantics: a name or a Semantics.
        where: called with the name and the module of every conv, linear and embedding layer, and of every other module
            with a ``weight`` of two dimensions or more; True chooses it. Default: every conv, linear and embedding
            layer.
        learnable_gain: True adds a parameter ``_gain`` (1,) per layer that starts at 1, "sigma" starts it such that
            W_bar = W.
        update, output_dtype, backward_buckets, backend: as in :func:`fuse`.

    Returns:
        The group. Layers that share a Parameter share vectors in it and are computed once.

    Raises:
        ValueError: no layer found; a layer that is normalized already; missing or uninitialized weights; unknown names;
            numbers out of range.
        TypeError: an integer, sparse or quantized weight; no module.
        RuntimeError: a backend that cannot run on this machine.

    Source: Miyato et al. 2018 (arXiv 1802.05957); Lin, Sekar, Fanti 2021 (arXiv 2009.02773).
    """
    check_model(model, "normalize")
    _check_group_arguments(update, output_dtype, backward_buckets, backend)
    check_iterations(n_power_iterations)
    check_eps(eps)
    check_gain(learnable_gain)
    rule = {
        "variant": resolve_variant(variant, scale),
        "semantics": resolve_semantics(semantics),
        "learnable_gain": bool(learnable_gain),
        "backend": backend,
        "output_dtype": output_dtype,
    }
    chosen = _choose(model, where)
    norms: dict[tuple[int, int], SpectralNorm] = {}
    for name, module in chosen:
        weight, dim = module._parameters["weight"], default_dim(module)
        if (id(weight), dim) not in norms:
            norms[id(weight), dim] = SpectralNorm(weight, n_power_iterations, dim, eps, label=name, **rule)
    layers: dict[tuple[int, int], ParametrizedLayer] = {}
    order = [list(module._parameters) for _, module in chosen]
    try:
        for name, module in chosen:
            key = id(module._parameters["weight"]), default_dim(module)
            register(module, "weight", norms[key], first=key not in layers)
            if key in layers:
                layers[key].share(module, name)
            else:
                layers[key] = ParametrizedLayer(norms[key], module, "weight", name)
        if learnable_gain == "sigma":
            for layer in layers.values():
                layer.rule.start_gain_at_sigma(layer.weight().detach())
    except BaseException:
        for layer in layers.values():
            layer.unwrap()
        for (_, module), names in zip(chosen, order):
            for name in names:
                module._parameters[name] = module._parameters.pop(name)
        raise
    return SpectralGroup(model, list(layers.values()), update=update, backward_buckets=backward_buckets)


_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag),
)


def _choose(model: nn.Module, where: Callable[[str, nn.Module], bool] | None) -> list[tuple[str, nn.Module]]:
    """The layers to normalize, all of them fit for it."""
    taken = {id(finding.module): finding for finding in find(model) if finding.tensor == "weight"}
    chosen = []
    for name, module in model.named_modules():
        usual, label = isinstance(module, _LAYERS), name or "weight"
        if not (usual or _has_matrix(module)) or not (usual if where is None else where(name, module)):
            continue
        weight = module._parameters.get("weight")
        if id(module) in taken:
            if isinstance(taken[id(module)].rule, SpectralNorm):
                raise ValueError(f"layer {label!r}: expected a plain weight, got one that is normalized already")
            raise ValueError(
                f"layer {label!r}: expected a plain weight, got one under torch's spectral_norm: use fuse()"
            )
        if weight is None:
            given = "a parametrized one" if "parametrizations" in module._modules else "None"
            raise ValueError(f"layer {label!r}: expected a Parameter 'weight', got {given}")
        check_weight(weight, label)
        chosen.append((label, module))
    if not chosen:
        rule = "conv, linear or embedding layers" if where is None else "layers that `where` chooses"
        raise ValueError(f"normalize: no layer found in {type(model).__name__}: expected {rule}")
    return chosen


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and (is_lazy(weight) or weight.ndim > 1)


def _check_group_arguments(update, output_dtype, backward_buckets, backend) -> None:
    if update not in (None, "manual"):
        raise ValueError(f"update: expected None or 'manual', got {update!r}")
    whole = isinstance(backward_buckets, int) and not isinstance(backward_buckets, bool)
    if backward_buckets != "auto" and not (whole and backward_buckets >= 1):
        raise ValueError(f"backward_buckets: expected 'auto' or a whole number >= 1, got {backward_buckets!r}")
    check_output_dtype(output_dtype)
    backends.check_name(backend)


def group_of(model: nn.Module) -> SpectralGroup | None:
    """The newest group whose root is this model, or a module in it (as in a DistributedDataParallel), or None."""
    check_model(model, "group_of")
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, RootHook):
                return hook.keeper
    return None
