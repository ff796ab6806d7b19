"""How one layer is normalized, and the layer that does it by itself because there is no frame."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from bssn_kernels import functional
from bssn_kernels.frame import Frame, Member, alone_key, in_backward
from bssn_kernels.plan import LayerSpec
from bssn_kernels.run import Run, resolve_dtype
from bssn_kernels.variants import Semantics, Variant


class Rule:
    """How one layer is normalized; a base of those that do it when there is no frame.

    Attributes:
        n_power_iterations, eps, dim: as torch's.
        variant, semantics, backend, output_dtype: see :func:`spectral_norm`.
    """

    n_power_iterations: int = 1
    eps: float
    dim: int
    variant: Variant = Variant()
    semantics: Semantics
    backend: str | None = None
    output_dtype: torch.dtype | str | None = None
    label: str = "weight"  # in errors
    _member: Member | None = None
    _plan = None
    _last: Run | None = None  # what this layer computed by itself, and after which forward of its group
    _last_after: Callable[[], Frame | None]
    _rules = frozenset({"n_power_iterations", "eps", "dim", "variant", "semantics", "backend", "output_dtype"})

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._rules:
            self.__dict__.pop("_plan", None)
            if self._member is not None:
                self._member.group._arrangement = None

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        for name in ("_plan", "_last", "_last_after", "_compiled_call_impl"):
            state.pop(name, None)
        return state

    @property
    def resting_iterations(self) -> int:
        """Power iterations of a forward that moves nothing."""
        return self.n_power_iterations if self.semantics.eval == "refresh" else 0

    def spec(self, weight: Tensor, gain: bool = False) -> LayerSpec:
        rule = {"variant": self.variant, "semantics": self.semantics, "eps": self.eps}
        return LayerSpec.of(weight, name=self.label, axis=self.dim, gain=gain, **rule)

    def normalize_alone(
        self, weight: Tensor, vectors: Sequence[Tensor], gain: Tensor | None, training: bool, backend: str | None
    ) -> Tensor:
        """W_bar of this layer, computed by itself; moves the vectors where the semantics say so."""
        group = self._member and self._member.group
        record, recomputing = group and group._record, in_backward()
        shared = record is not None and record.has(self._member.index)
        if recomputing and self._last is not None and (self._last_after() is record or not shared):
            return self._last.replay(0, weight, gain)
        if recomputing and shared:
            return record.replay(self._member.index, weight, gain)
        if group and parametrize._cache_enabled:
            parametrize._cache[alone_key(group)] = None
        plan = self._plan
        if plan is None or plan.backend.name != (backend or plan.backend.name) or not plan.matches((weight,)):
            plan = functional.make_plan([self.spec(weight)], backend)
            self.__dict__["_plan"] = plan
        moves = training and self.semantics.moves == "forward" and not recomputing and not (group and group.still)
        iterations = self.n_power_iterations if moves else self.resting_iterations
        gains, dtype = () if gain is None else (gain,), resolve_dtype(self.output_dtype, weight)
        run = Run(plan, (weight,), vectors, gains, (iterations,), dtype, None if moves else ())
        (out,) = run.outs
        if run.saved is not None and torch.is_grad_enabled() and any(t.requires_grad for t in (weight, *gains)):
            (out,) = functional.attach([out], run.saved, plan, [0], [weight], gains)
        run.store()
        run.release()
        self.__dict__["_last"], self.__dict__["_last_after"] = run, _nothing if record is None else weakref.ref(record)
        return out


def _nothing() -> None:
    return None


def check_weight(weight: Tensor, label: str) -> None:
    """Refuse what has no spectral norm here, naming the layer."""
    expected = f"layer {label!r}: expected a dense floating or complex weight, got"
    if is_lazy(weight):
        raise ValueError(f"{expected} an uninitialized one ({type(weight).__name__}): run a forward first")
    if weight.is_quantized or weight.layout != torch.strided:
        raise TypeError(f"{expected} {'a quantized' if weight.is_quantized else weight.layout} one")
    if not (weight.dtype.is_floating_point or weight.dtype.is_complex):
        raise TypeError(f"{expected} {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"{expected} one without elements, of shape {tuple(weight.shape)}")


def check_iterations(n_power_iterations: int) -> None:
    if not hasattr(n_power_iterations, "__index__"):
        raise TypeError(f"n_power_iterations: expected a whole number, got {n_power_iterations!r}")
    if n_power_iterations <= 0:
        raise ValueError(
            f"Expected n_power_iterations to be positive, but got n_power_iterations={n_power_iterations}"
        )


def check_eps(eps: float) -> None:
    try:
        fits = 0 <= float(eps) < float("inf")
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise ValueError(f"eps: expected a finite number from 0 on, got {eps!r}")


def check_model(model: object, caller: str) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{caller}: expected a torch.nn.Module, got {type(model).__name__}")


def check_output_dtype(output_dtype: torch.dtype | str | None) -> None:
    fits = isinstance(output_dtype, torch.dtype) and output_dtype.is_floating_point
    if output_dtype not in (None, "autocast") and not fits:
        raise ValueError(f"output_dtype: expected None, a floating torch.dtype or 'autocast', got {output_dtype!r}")


def check_gain(learnable_gain: bool | str) -> None:
    if learnable_gain not in (True, False, "sigma"):
        raise ValueError(f"learnable_gain: expected False, True or 'sigma', got {learnable_gain!r}")
