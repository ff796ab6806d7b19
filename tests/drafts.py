"""Layers made from drafts, dictionaries of what a layer is, and a run of a group of them."""

import torch
from torch import Tensor
from zoo import lay_out

from bssn_kernels import functional
from bssn_kernels.plan import LayerSpec, accumulation_dtype
from bssn_kernels.variants import Variant


def draft_of(shape: tuple[int, ...], seed: int, **other) -> dict:
    """A plain layer of both directions."""
    plain = {"axis": 0, "layout": "contiguous", "variant": Variant(0.5, 0.5), "semantics": "torch", "iterations": 2}
    rest = {"gain": True, "frozen": False, "poison": "none", "poison_vectors": "none"}
    return {"shape": shape, "seed": seed, **plain, **rest, **other}


def poisoned(x: Tensor, poison: str) -> Tensor:
    if poison == "zero":
        x.zero_()
    elif poison != "none":
        x.view(-1)[x.numel() // 2] = {"nan": torch.nan, "inf": torch.inf, "huge": torch.finfo(x.dtype).max}[poison]
    return x


class Layer:
    """Tensors of a draft, made anew from its seed."""

    def __init__(self, draft: dict, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(draft["seed"])

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

        accum, self.iterations = accumulation_dtype(dtype), draft["iterations"]
        values = poisoned(normal(*draft["shape"]).to(dtype), draft["poison"])
        self.weight = lay_out(values, draft["layout"]).requires_grad_(not draft["frozen"])
        self.spec = LayerSpec.of(
            self.weight,
            name=str(draft["seed"]),
            axis=draft["axis"],
            variant=draft["variant"],
            semantics=draft["semantics"],
            gain=draft["gain"],
        )
        self.vectors = [normal(n).to(accum) for (n,) in self.spec.vector_shapes]
        for vector in self.vectors[:1]:
            poisoned(vector, draft["poison_vectors"])
        self.gains = [normal(1).to(accum).requires_grad_()] if draft["gain"] else []
        self.grad = normal(*draft["shape"]).to(dtype)


def run(layers: list[Layer], backend: str) -> list[list[Tensor]]:
    """W_bar, numbers, new vectors and gradients of every layer of one group."""
    plan = functional.make_plan([layer.spec for layer in layers], backend)
    weights = [layer.weight for layer in layers]
    vectors = [x for layer in layers for x in layer.vectors]
    gains = [x for layer in layers for x in layer.gains]
    result = functional.spectral_normalize(weights, vectors, plan, [layer.iterations for layer in layers], gains=gains)
    wanted = [out.requires_grad for out in result.weights]
    outs = [out for out, want in zip(result.weights, wanted) if want]
    for x in (*weights, *gains):
        x.grad = None
    if outs:
        torch.autograd.backward(outs, [layer.grad for layer, want in zip(layers, wanted) if want])
    scalars, new = plan.layout.scalars(result.saved), iter(result.vectors)
    multipliers = plan.multipliers_of(result.saved)
    found = []
    for i, layer in enumerate(layers):
        tensors = [result.weights[i].detach(), scalars[i, : 1 + layer.spec.directions], multipliers[i]]
        tensors += [next(new) for _ in layer.vectors]
        assert (layer.weight.grad is not None) == layer.weight.requires_grad
        tensors += [x.grad for x in (layer.weight, *layer.gains) if x.grad is not None]
        found.append([x.clone() for x in tensors])
    return found


def assert_same_bits(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    """All bits, but for the payloads of NaN."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert x.stride() == y.stride() or x.numel() == 1
            equal = ((x == y) & (x.signbit() == y.signbit())) | (x.isnan() & y.isnan())
            assert equal.all(), f"layer {i}, tensor {k}: {(~equal).sum()} of {x.numel()} differ"
