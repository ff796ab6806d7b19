"""What is divided by (Variant: four numbers) and how the vectors move (Semantics), with their named values."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Variant:
    """Four numbers that say what a weight is multiplied with.

    ``mean = out * sigma_out + into * sigma_in`` and ``W_bar = gain / max(floor, mean) * W``. A weight of one or two
    dimensions has one direction, whose sigma then counts ``out + into`` times.

    Args:
        out: weight of the spectral norm of the matrix whose rows are the output channels.
        into: weight of the spectral norm of the matrix whose rows are the input channels.
        floor: smallest divisor; positive values make a soft cap (SNGP, DUE).
        gain: constant factor (the ``c`` of SSN and BSSN).

    Source: Miyato et al. 2018 (arXiv 1802.05957) for ``sn``; Lin, Sekar, Fanti 2021 (arXiv 2009.02773) for the rest.
    """

    out: float = 1.0
    into: float = 0.0
    floor: float = 0.0
    gain: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"Variant.{field.name}: expected a finite number, got {value!r}")
            object.__setattr__(self, field.name, float(value))
        if self.out < 0 or self.into < 0 or self.out + self.into == 0:
            raise ValueError(f"Variant: expected out, into >= 0 and not both 0, got out={self.out}, into={self.into}")
        if self.floor < 0:
            raise ValueError(f"Variant.floor: expected a number >= 0, got {self.floor}")
        if self.gain <= 0:
            raise ValueError(f"Variant.gain: expected a number > 0, got {self.gain}")


_VARIANTS = {
    "sn": Variant(),
    "ssn": Variant(),
    "bsn": Variant(out=0.5, into=0.5),
    "bssn": Variant(out=0.5, into=0.5),
    "capped": Variant(floor=1.0),
}


@dataclass(frozen=True)
class Semantics:
    """How the power iteration runs and when its vectors are stored.

    Args:
        order: ``"uv"`` (u <- M v, then v <- M^T u) or ``"vu"``, for the out-direction.
        norm: ``"max"`` divides by max(norm, eps), ``"add"`` by norm + eps.
        eval: ``"stored"`` uses the stored vectors as they are, ``"refresh"`` iterates and throws the result away.
        gradient: ``"constant"`` takes u and v as constants, ``"through"`` differentiates the last iteration.
        moves: ``"forward"`` stores new vectors at every training forward, ``"update"`` only when asked to.
        start: ``"warm"`` (unit normal and 15 iterations), ``"unit"`` (unit normal), ``"normal"`` (N(0, 1)) or
            ``"truncated"`` (N(0, 1) cut at 2).
        into_order: order of the in-direction; None means the opposite of ``order``, so that both directions finish on
            the same panel of the weight.
    """

    order: str
    norm: str
    eval: str
    gradient: str
    moves: str
    start: str
    into_order: str | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name == "into_order" and value is None):
                raise ValueError(f"Semantics.{name}: expected one of {list(choices)}, got {value!r}")

    def order_of(self, direction: int) -> str:
        """Order of direction 0 (out) or 1 (in)."""
        if direction == 0:
            return self.order
        return self.into_order or ("vu" if self.order == "uv" else "uv")


_CHOICES = {
    "order": ("uv", "vu"),
    "norm": ("max", "add"),
    "eval": ("stored", "refresh"),
    "gradient": ("constant", "through"),
    "moves": ("forward", "update"),
    "start": ("warm", "unit", "normal", "truncated"),
    "into_order": ("uv", "vu"),
}

_SEMANTICS = {
    "torch": Semantics("uv", "max", "stored", "constant", "forward", "warm"),
    "torch_hook": Semantics("vu", "max", "stored", "constant", "forward", "unit"),
    "miyato": Semantics("vu", "add", "stored", "constant", "forward", "normal"),
    "biggan": Semantics("vu", "max", "refresh", "constant", "forward", "normal"),
    "paper": Semantics("vu", "add", "refresh", "through", "update", "truncated", into_order="vu"),
}


def variants() -> list[str]:
    """Names that ``variant`` arguments take."""
    return list(_VARIANTS)


def semantics_names() -> list[str]:
    """Names that ``semantics`` arguments take."""
    return list(_SEMANTICS)


def resolve_variant(variant: str | Variant, scale: float = 1.0) -> Variant:
    """The Variant that a name or an instance means, times ``scale``.

    ``scale`` multiplies the gain; for ``"capped"`` it is the cap, which is both floor and gain.

    Raises:
        ValueError: unknown name, or a scale that is not positive and finite.
        TypeError: neither a name nor a Variant.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"scale: expected a positive and finite number, got {scale!r}")
    if isinstance(variant, Variant):
        return replace(variant, gain=variant.gain * scale)
    if not isinstance(variant, str):
        raise TypeError(f"variant: expected a name or a Variant, got {type(variant).__name__}")
    if variant not in _VARIANTS:
        raise ValueError(f"variant: expected one of {variants()} or a Variant, got {variant!r}")
    named = _VARIANTS[variant]
    return replace(named, gain=named.gain * scale, floor=named.floor * scale)


def resolve_semantics(semantics: str | Semantics) -> Semantics:
    """The Semantics that a name or an instance means.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor a Semantics.
    """
    if isinstance(semantics, Semantics):
        return semantics
    if not isinstance(semantics, str):
        raise TypeError(f"semantics: expected a name or a Semantics, got {type(semantics).__name__}")
    if semantics not in _SEMANTICS:
        raise ValueError(f"semantics: expected one of {semantics_names()} or a Semantics, got {semantics!r}")
    return _SEMANTICS[semantics]
