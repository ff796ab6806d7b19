"""Lists of tensors in, lists of tensors out: spectral normalization of many weights without modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from bssn_kernels import algebra, backends, ops
from bssn_kernels.backends.reference import compose, full_precision
from bssn_kernels.plan import FLOATS, GroupPlan, LayerSpec, accumulation_dtype, untraced
from bssn_kernels.variants import Semantics, Variant
from bssn_kernels.views import matrix


class Normalized(NamedTuple):
    """Result of :func:`spectral_normalize`.

    Attributes:
        weights: W_bar of each layer, shapes and strides of the weights, differentiable.
        vectors: the new vectors, flat in plan order, accumulation dtype, no gradient; store them with
            ``torch._foreach_copy_(stored, result.vectors)``.
        sigmas: mean sigma of each layer, 0-dimensional, no gradient.
        saved: the state of the call as one flat tensor, read by ``GroupPlan``; None on the composed path.
        directions: on the composed path the sigmas of each layer by direction, (directions,); else None, since
            ``plan.sigmas_of(saved, directions=True)`` has them.
    """

    weights: list[Tensor]
    vectors: list[Tensor]
    sigmas: list[Tensor]
    saved: Tensor | None
    directions: list[Tensor] | None = None


def make_plan(specs: Sequence[LayerSpec], backend: str | None = None) -> GroupPlan:
    """The plan of a group of layers of one device and dtype.

    Args:
        specs: made by ``LayerSpec.of(weight, ...)``, in the order in which the tensors will be passed.
        backend: name, or None for the best that can run.

    Raises:
        ValueError: no layers, mixed devices or dtypes, an axis out of range, unknown backend.
        TypeError: a weight that is not of a floating or complex dtype.
        RuntimeError: the named backend cannot take these layers.
    """
    if not specs:
        raise ValueError("make_plan: expected at least one layer, got none")
    first = specs[0]
    for spec in specs:
        if (spec.dtype, spec.device) != (first.dtype, first.device):
            raise ValueError(
                f"layer {spec.name!r}: expected {first.dtype} on {first.device} as the first layer of the group, "
                f"got {spec.dtype} on {spec.device}"
            )
        if not spec.shape or not 0 <= spec.axis < len(spec.shape):
            raise ValueError(f"layer {spec.name!r}: expected an axis of the weight {spec.shape}, got {spec.axis}")
        if 0 in spec.shape:
            raise ValueError(f"layer {spec.name!r}: expected a weight with elements, got shape {spec.shape}")
        if spec.dtype not in FLOATS and not spec.dtype.is_complex:
            raise TypeError(f"layer {spec.name!r}: expected a floating or complex weight, got {spec.dtype}")
    with _unwatched():
        return GroupPlan(specs, *backends.select(specs, backend))


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    """For tables, which outlive the transform, mode or trace that happens to be active when they are made."""
    if torch.compiler.is_dynamo_compiling():
        with torch._C._DisableFuncTorch():
            yield
        return
    with untraced(), torch._C._DisableFuncTorch(), torch.inference_mode(False), _disable_current_modes():
        yield


def plan_for(
    weights: Sequence[Tensor],
    *,
    variant: Variant = Variant(),
    semantics: Semantics | str = "torch",
    axes: Sequence[int] | None = None,
    eps: float = 1e-12,
    gain: bool = False,
    backend: str | None = None,
) -> GroupPlan:
    """The plan of weights that all follow one rule.

    Args:
        weights: of one device and dtype.
        axes: row axis of each weight's out-direction, default 0; 1 for transposed convolutions.
        gain: whether every layer has a learnable gain.
    """
    axes = [0] * len(weights) if axes is None else axes
    rule = {"variant": variant, "semantics": semantics, "eps": eps, "gain": gain}
    specs = [LayerSpec.of(w, name=str(i), axis=a, **rule) for i, (w, a) in enumerate(zip(weights, axes))]
    return make_plan(specs, backend)


@full_precision
def initial_vectors(weight: Tensor, spec: LayerSpec, generator: torch.Generator | None = None) -> list[Tensor]:
    """Vectors to start from: u, v of the out-direction, then of the in-direction, in the weight's dtype.

    Drawn in the order in which torch draws them, so that one seed gives torch's start. None for a layer that keeps
    no vectors.
    """
    if not spec.stores_vectors:
        return []
    start, vectors = spec.semantics.start, []
    with torch.no_grad():
        for d, axis in enumerate(algebra.row_axes(weight.ndim, spec.axis, spec.directions)):
            m = matrix(weight.detach(), axis)
            u, v = (_draw(m, n, start, generator) for n in m.shape)
            if start in ("warm", "unit"):
                u, v = algebra.unit(u, spec.eps, "max"), algebra.unit(v, spec.eps, "max")
            if start == "warm":
                order, n = spec.semantics.order_of(d), algebra.WARM_UP_ITERATIONS
                u, v = algebra.power_iterate(
                    m, u, v, n_power_iterations=n, order=order, eps=spec.eps, norm=spec.semantics.norm
                )
            vectors += [u, v]
    return vectors


def _draw(m: Tensor, n: int, start: str, generator: torch.Generator | None) -> Tensor:
    x = m.new_empty(n)
    if start == "truncated":
        return torch.nn.init.trunc_normal_(x, 0.0, 1.0, -2.0, 2.0, generator=generator)
    return x.normal_(0, 1, generator=generator)


def needs_composed(weights: Sequence[Tensor]) -> bool:
    """Whether a fused kernel cannot take these weights: functorch transforms, complex numbers, tensor subclasses.

    Nor can ``torch.jit.trace``, which records single operations of PyTorch.
    """
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return True
    if forward_ad._current_level >= 0:  # tangents of weights
        return True
    if not ops.are_plain(weights) and any(map(_is_foreign, weights)):
        return True
    return weights[0].dtype.is_complex


def _is_foreign(weight: Tensor) -> bool:
    """Subclasses whose meaning we do not know; those by which torch itself traces go through the op."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return not isinstance(weight, (FakeTensor, FunctionalTensor, torch.nn.Buffer)) and (
        type(weight).__torch_function__ is not torch._C._disabled_torch_function_impl
        or type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__
    )


def launch(
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    plan: GroupPlan,
    iterations: Sequence[int],
    gains: Sequence[Tensor] = (),
    output_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor]:
    """One fused call without gradient.

    Args:
        weights, vectors, gains: in plan order.
        iterations: power iterations of each layer; 0 uses its stored vectors as they are.

    Returns:
        W_bar of each layer, and `saved`, from which ``plan.vectors_of`` and ``plan.sigmas_of`` read.
    """
    with torch.no_grad():
        return ops.normalize(
            list(weights),
            plan.op_vectors(vectors),
            list(gains),
            plan.tables,
            plan.op_iterations(iterations),
            plan.layout.numel,
            output_dtype,
            plan.backend.name,
        )


def attach(
    outs: Sequence[Tensor],
    saved: Tensor,
    plan: GroupPlan,
    layers: Sequence[int],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """Give the results of :func:`launch` their place in the autograd graph.

    Args:
        outs: W_bar of ``layers`` only, which become the graph's tensors.
        layers: their indices in the plan.
        weights, gains: of these layers only.

    Returns:
        The same tensors, with a grad_fn.
    """
    return ops.Attach.apply(outs, saved, plan, layers, *weights, *gains)


def composed(
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    plan: GroupPlan,
    iterations: Sequence[int],
    gains: Sequence[Tensor] = (),
    output_dtype: torch.dtype | None = None,
) -> Normalized:
    """The same as :func:`spectral_normalize` in plain differentiable PyTorch."""
    results = compose(plan.specs, weights, plan.op_vectors(vectors), plan.op_iterations(iterations), gains)
    outs = [r.weight.to(output_dtype or w.dtype) for r, w in zip(results, weights)]
    stored = [x.detach() for r, spec in zip(results, plan.specs) if spec.stores_vectors for x in r.vectors]
    sigmas = []
    for r, spec in zip(results, plan.specs):
        shares = algebra.direction_weights(spec.variant, spec.directions)
        sigmas.append(sum(share * s.detach() for share, s in zip(shares, r.sigmas)))
    return Normalized(outs, stored, sigmas, None, [torch.stack(r.sigmas).detach() for r in results])


def spectral_normalize(
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    plan: GroupPlan,
    n_power_iterations: int | Sequence[int] = 1,
    *,
    gains: Sequence[Tensor] = (),
    output_dtype: torch.dtype | None = None,
) -> Normalized:
    """Normalize all weights of a plan in one fused call, differentiably in weights and gains.

    Args:
        weights: in plan order.
        vectors: flat in plan order: u (rows,), v (cols,) of the out-direction and, where there is one, of the
            in-direction, layer by layer; never changed. Made by :func:`initial_vectors`.
        n_power_iterations: for all layers, or one number per layer; 0 uses the stored vectors as they are.
        gains: the learnable gains, one tensor of one element for each layer whose spec has one.
        output_dtype: dtype of W_bar, default that of the weights.

    Raises:
        ValueError: numbers, shapes or dtypes of the tensors do not fit the plan; the message names the layer.
    """
    iterations = _checked_iterations(n_power_iterations, plan)
    _check_tensors(weights, vectors, gains, plan)
    if needs_composed(weights):
        return composed(weights, vectors, plan, iterations, gains, output_dtype)
    outs, saved = launch(weights, vectors, plan, iterations, gains, output_dtype)
    if torch.is_grad_enabled():
        outs = _attach_wanted(outs, saved, plan, weights, gains)
    return Normalized(list(outs), plan.vectors_of(saved), plan.sigmas_of(saved), saved)


def _attach_wanted(outs, saved, plan, weights, gains) -> list[Tensor]:
    given, gain_of = iter(gains), {}
    for i, spec in enumerate(plan.specs):
        if spec.gain:
            gain_of[i] = next(given)
    layers = [i for i, w in enumerate(weights) if w.requires_grad or (i in gain_of and gain_of[i].requires_grad)]
    outs = list(outs)
    if layers:
        own_gains = [gain_of[i] for i in layers if i in gain_of]
        attached = attach([outs[i] for i in layers], saved, plan, layers, [weights[i] for i in layers], own_gains)
        for i, out in zip(layers, attached):
            outs[i] = out
    return outs


def _checked_iterations(n_power_iterations: int | Sequence[int], plan: GroupPlan) -> list[int]:
    n = len(plan.specs)
    several = isinstance(n_power_iterations, Sequence) and not isinstance(n_power_iterations, str)
    iterations = list(n_power_iterations) if several else [n_power_iterations] * n
    if len(iterations) != n or any(not isinstance(k, int) or k < 0 for k in iterations):
        raise ValueError(f"n_power_iterations: expected a number >= 0, or {n} of them, got {n_power_iterations!r}")
    return iterations


def _check_tensors(weights, vectors, gains, plan: GroupPlan) -> None:
    if len(weights) != len(plan.specs):
        raise ValueError(f"weights: expected {len(plan.specs)} tensors, got {len(weights)}")
    for w, spec in zip(weights, plan.specs):
        if tuple(w.shape) != spec.shape or w.dtype != spec.dtype or w.device != spec.device:
            raise ValueError(
                f"layer {spec.name!r}: expected a weight {spec.shape} of {spec.dtype} on {spec.device}, "
                f"got {tuple(w.shape)} of {w.dtype} on {w.device}"
            )
        if tuple(w.stride()) != spec.stride and not torch._C._are_functorch_transforms_active():
            raise ValueError(
                f"layer {spec.name!r}: expected strides {spec.stride}, got {tuple(w.stride())}; make a new plan"
            )
    shapes = [(spec.name, shape) for spec in plan.specs for shape in spec.vector_shapes]
    if len(vectors) != len(shapes):
        raise ValueError(f"vectors: expected {len(shapes)} tensors, flat in plan order, got {len(vectors)}")
    accumulation = accumulation_dtype(plan.dtype)
    for x, (name, shape) in zip(vectors, shapes):
        fits = torch.promote_types(x.dtype, accumulation) == accumulation
        if tuple(x.shape) != shape or not fits or x.device != plan.device:
            raise ValueError(
                f"layer {name!r}: expected a vector {shape} that fits {accumulation} on {plan.device}, "
                f"got {tuple(x.shape)} of {x.dtype} on {x.device}"
            )
    owners = [spec for spec in plan.specs if spec.gain]
    if len(gains) != len(owners):
        raise ValueError(f"gains: expected {len(owners)} tensors, got {len(gains)}")
    for gain, spec in zip(gains, owners):
        fits = torch.promote_types(gain.dtype, accumulation) == accumulation
        if gain.numel() != 1 or not fits or gain.device != plan.device:
            raise ValueError(
                f"layer {spec.name!r}: expected a gain of one element that fits {accumulation} on {plan.device}, "
                f"got {tuple(gain.shape)} of {gain.dtype} on {gain.device}"
            )
