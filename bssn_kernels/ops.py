"""The one declaration of the fused call: torch.library ops, their fakes, and the autograd Function around them.

State is a value: the ops mutate nothing and no output aliases an input or another output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from bssn_kernels import backends
from bssn_kernels.backends.reference import compose_backward
from bssn_kernels.plan import SCALARS, GroupPlan, accumulation_dtype

_library = torch.library.Library("bssn_kernels", "DEF")

# normalize: all layers of a group. weights; two vectors per direction and layer; the learnable gains of the layers
# that have one; the plan's tables; power iterations per layer; -> W_bar of each layer (strides of the weight), and
# `saved` (accumulation dtype), whose parts plan.Layout names.
_library.define(
    "normalize(Tensor[] weights, Tensor[] vectors, Tensor[] gains, Tensor[] tables, int[] iterations, "
    "SymInt saved_numel, ScalarType? output_dtype, str backend) -> (Tensor[] normalized, Tensor saved)"
)
# normalize_backward: for the layers named by index. dL/dW_bar (any strides; read in the dtype of the first), weights,
# `saved` of the forward -> dL/dW with the weights' dtype and strides, and dL/dgain (layers,) in accumulation dtype.
_library.define(
    "normalize_backward(Tensor[] grads, Tensor[] weights, Tensor saved, Tensor[] tables, int[] layers, str backend)"
    " -> (Tensor[] grad_weights, Tensor grad_gains)"
)


def _normalize(weights, vectors, gains, tables, iterations, saved_numel, output_dtype, backend):
    return backends.get(backend).normalize(weights, vectors, gains, tables, iterations, saved_numel, output_dtype)


def _normalize_backward(grads, weights, saved, tables, layers, backend):
    grads = _like_weights(grads, weights)
    return backends.get(backend).normalize_backward(grads, weights, saved, tables, layers)


def _like_weights(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of one dtype with the strides of their weights; copies only those that differ.

    Within the op, since a compiler may choose strides, and the dynamo of torch 2.6 cannot ask for them in a backward.
    """
    dtype, result = grads[0].dtype, []
    for grad, weight in zip(grads, weights):
        if grad.dtype != dtype or grad.stride() != weight.stride():
            grad = torch.empty_like(weight, dtype=dtype).copy_(grad)
        result.append(grad)
    return result


_library.impl("normalize", _normalize, "CompositeExplicitAutograd")
_library.impl("normalize_backward", _normalize_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("bssn_kernels::normalize", lib=_library)
def _(weights, vectors, gains, tables, iterations, saved_numel, output_dtype, backend):
    outs = [torch.empty_like(w, dtype=output_dtype or w.dtype) for w in weights]
    return outs, weights[0].new_empty(saved_numel, dtype=accumulation_dtype(weights[0].dtype))


@torch.library.register_fake("bssn_kernels::normalize_backward", lib=_library)
def _(grads, weights, saved, tables, layers, backend):
    return [torch.empty_like(w) for w in weights], saved.new_empty(len(layers))


def normalize(weights, vectors, gains, tables, iterations, saved_numel, output_dtype, backend):
    """The op ``normalize``; where nobody watches the dispatcher, the backend at once.

    Bringing a hundred tensors through the dispatcher and back costs as much as a small group's arithmetic.
    """
    if _watched(weights):
        tables = _of_kind(tables, weights[0])
        op = torch.ops.bssn_kernels.normalize
        return op(weights, vectors, gains, tables, iterations, saved_numel, output_dtype, backend)
    return _normalize(weights, vectors, gains, tables, iterations, saved_numel, output_dtype, backend)


def normalize_backward(grads, weights, saved, tables, layers, backend):
    """The op ``normalize_backward``, likewise."""
    if _watched(grads):
        tables = _of_kind(tables, grads[0])
        return torch.ops.bssn_kernels.normalize_backward(grads, weights, saved, tables, layers, backend)
    return _normalize_backward(grads, weights, saved, tables, layers, backend)


def store(vectors: Sequence[Tensor], saved: Tensor, plan: GroupPlan) -> None:
    """Write the new vectors of a group, all of them, into those that the forward read. No op, and nothing to
    differentiate.

    A list of views and ``_foreach_copy_`` would take longer than a small group's arithmetic, so a backend may do it by
    itself, or answer with False where the vectors are not what it left.
    """
    by_backend = getattr(plan.backend, "store", None)
    left_to_torch = by_backend is None or plan.stateless or _watched(vectors) or _are_frozen(vectors)
    left_to_torch = left_to_torch or not plan.fits(vectors)
    if not left_to_torch and by_backend(vectors, saved, plan.tables):
        _increment_versions(vectors)
        return
    with torch.no_grad():
        torch._foreach_copy_(vectors, plan.vectors_of(saved))


def _are_frozen(vectors: Sequence[Tensor]) -> bool:
    """Whether some were made in inference mode and this is outside of it: an error, which is torch's."""
    return not torch.is_inference_mode_enabled() and any(map(Tensor.is_inference, vectors))


def _increment_versions(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that they were written to."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except TypeError:  # old versions of torch take one at a time
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


_PLAIN = (Tensor, torch.nn.Parameter)  # types without a meaning of their own


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether all are tensors and Parameters, and none of a subclass."""
    if torch.compiler.is_compiling():  # the dynamo of torch 2.6 knows no sets
        return all(type(t) in _PLAIN for t in tensors)
    return set(map(type, tensors)).issubset(_PLAIN)


def _watched(tensors: Sequence[Tensor]) -> bool:
    """Whether something follows the dispatcher: a compiler or an export, a mode, a tensor subclass."""
    return (
        torch.compiler.is_compiling()
        or not are_plain(tensors)
        or is_in_torch_dispatch_mode()
        or torch._is_functional_tensor(tensors[0])
    )


def _of_kind(tables: Sequence[Tensor], tensor: Tensor) -> list[Tensor]:
    """The tables, which are real, for a call in a FakeTensorMode, which may refuse them."""
    from torch._subclasses.fake_tensor import FakeTensor

    if torch.compiler.is_compiling() or not isinstance(tensor, FakeTensor) or tensor.fake_mode.allow_non_fake_inputs:
        return tables
    mode = tensor.fake_mode
    return [t if isinstance(t, FakeTensor) else mode.from_tensor(t) for t in tables]


class Attach(torch.autograd.Function):
    """Gives tensors that a fused call already wrote their place in the graph.

    Everything the backward needs is kept on ctx: activation checkpointing counts what goes through
    save_for_backward, and a recomputed layer has to save as much as the first time.
    """

    @staticmethod
    def forward(ctx, outs, saved, plan: GroupPlan, layers: Sequence[int], *tensors: Tensor):
        n = len(layers)
        ctx.weights, ctx.gains = tensors[:n], tensors[n:]
        ctx.saved, ctx.plan, ctx.layers = saved, plan, layers
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():
            ctx.versions = None
            return tuple(out.clone() for out in outs)
        ctx.versions = [w._version for w in ctx.weights]
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grads):
        n, plan, layers = len(ctx.layers), ctx.plan, ctx.layers
        wanted = ctx.needs_input_grad[4:]
        owners = [k for k, i in enumerate(layers) if plan.specs[i].gain]
        gain_of = dict(zip(owners, range(len(owners))))
        weight_grads, gain_grads = [None] * n, [None] * len(owners)
        which = [
            k for k, g in enumerate(grads) if g is not None and (wanted[k] or (k in gain_of and wanted[n + gain_of[k]]))
        ]
        if not which:
            return (None, None, None, None, *weight_grads, *gain_grads)
        if ctx.versions is not None:
            _check_versions(ctx, which)
        dense, transformed = [grads[k] for k in which], False
        if not torch.compiler.is_compiling():  # tracing cannot read layouts, and knows no transforms
            dense = [g if g.layout == torch.strided else g.to_dense() for g in dense]  # embeddings may send sparse ones
            # Those that began after the forward, which would have been composed else.
            transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
            transformed = transformed or any(map(torch._C._functorch.is_legacy_batchedtensor, dense))
        if torch.is_grad_enabled() or transformed:
            for k, grad in zip(which, dense):
                gain = ctx.gains[gain_of[k]] if k in gain_of else None
                weight_grads[k], gain_grad = _composed_layer(ctx, k, grad, gain)
                if k in gain_of:
                    gain_grads[gain_of[k]] = gain_grad
            return (None, None, None, None, *weight_grads, *gain_grads)
        weights, own = [ctx.weights[k] for k in which], [layers[k] for k in which]
        grad_weights, grad_gains = normalize_backward(dense, weights, ctx.saved, plan.tables, own, plan.backend.name)
        for j, k in enumerate(which):
            weight_grads[k] = grad_weights[j] if wanted[k] else None
            if k in gain_of:
                gain = ctx.gains[gain_of[k]]
                gain_grads[gain_of[k]] = grad_gains[j].to(gain.dtype).view(gain.shape)
        return (None, None, None, None, *weight_grads, *gain_grads)


def _check_versions(ctx, which: Sequence[int]) -> None:
    for k in which:
        i, weight, version = ctx.layers[k], ctx.weights[k], ctx.versions[k]
        if weight._version != version:
            raise RuntimeError(
                f"layer {ctx.plan.specs[i].name!r}: its weight was changed in place between forward and backward "
                f"(expected version {version}, got {weight._version}); run the optimizer step after the backward"
            )


def _composed_layer(ctx, k: int, grad: Tensor, gain: Tensor | None) -> tuple[Tensor | None, ...]:
    layout, i = ctx.plan.layout, ctx.layers[k]
    first, spec = layout.first_vector[i], ctx.plan.specs[i]
    vectors = layout.vectors(ctx.saved)[first : first + 2 * spec.directions]
    starts = layout.starts(ctx.saved, i)
    if starts and not layout.scalars(ctx.saved)[i, SCALARS.index("start_out")]:
        starts = ()  # the forward took the stored vectors as they are: there is no iteration to go through
    return compose_backward(spec, grad, ctx.weights[k], gain, vectors, starts)
