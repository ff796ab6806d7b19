"""Weights of every kind, and the check that a backend does to them what truth.py says."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import truth
from torch import Tensor, nn
from truth import relative

from bssn_kernels import functional
from bssn_kernels.backends.cuda import modelling
from bssn_kernels.backends.triton import interpreting
from bssn_kernels.plan import LayerSpec, accumulation_dtype
from bssn_kernels.variants import Variant, resolve_variant

MODULES = {
    "linear": lambda: nn.Linear(33, 20),
    "linear_large": lambda: nn.Linear(300, 260),
    "conv1d": lambda: nn.Conv1d(5, 8, 4),
    "conv2d": lambda: nn.Conv2d(6, 10, (3, 2)),
    "conv2d_large": lambda: nn.Conv2d(40, 72, 3),
    "conv2d_1x1": lambda: nn.Conv2d(12, 7, 1),
    "conv3d": lambda: nn.Conv3d(3, 5, (2, 3, 2)),
    "grouped": lambda: nn.Conv2d(8, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(9, 9, 3, groups=9),
    "transposed1d": lambda: nn.ConvTranspose1d(6, 4, 5),
    "transposed2d": lambda: nn.ConvTranspose2d(7, 12, 4),
    "transposed3d": lambda: nn.ConvTranspose3d(4, 3, (3, 2, 2)),
    "transposed_grouped": lambda: nn.ConvTranspose2d(6, 2, 3, groups=2),
    "transposed_depthwise": lambda: nn.ConvTranspose1d(5, 5, 4, groups=5),
    "embedding": lambda: nn.Embedding(50, 16),
    "bilinear": lambda: nn.Bilinear(4, 6, 5),
}
SHAPES = {
    "vector": (19,),
    "one_row": (1, 37),
    "one_column": (41, 1),
    "primes": (31, 67),
    "primes4": (13, 11, 3, 5),
    "one_element": (1, 1),
    "one_element1": (1,),
    "one_element4": (1, 1, 1, 1),
    "wide": (3, 100_000),
    "tall": (100_000, 3),
    # a million elements and more, which kernels may read in another way than smaller layers
    "linear_huge": (512, 2304),
    "conv2d_huge": (256, 512, 3, 3),
    "transposed2d_huge": (512, 256, 3, 3),
    "primes_huge": (1021, 1361),
    # rows that a program may hold whole: the shortest and the longest ones, and some in memory formats of their own
    "rows_256": (70, 256),
    "rows_576": (37, 64, 3, 3),
    "rows_1024": (5, 1024),
    "rows_1032": (19, 1032),
    "rows_3840": (12, 240, 4, 4),
    "rows_4096": (9, 4096),
    "rows_transposed": (25, 16, 6, 6),
    # a class for each of 256 columns, as of a patch embedding
    "patch": (24, 3, 16, 16),
    # 64 MiB of float32, more than caches hold
    "uncached": (4100, 4099),
}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _layers() -> dict[str, tuple[tuple[int, ...], int]]:
    with torch.device("meta"):
        made = {name: make() for name, make in MODULES.items()}
    layers = {name: (tuple(m.weight.shape), int(isinstance(m, TRANSPOSED))) for name, m in made.items()}
    return layers | {name: (shape, int(name.startswith("transposed"))) for name, shape in SHAPES.items()}


LAYERS = _layers()  # name -> shape, row axis of the out-direction
LONG = ("wide", "tall")
HUGE = tuple(name for name in LAYERS if name.endswith("_huge"))
ROWS = tuple(name for name in LAYERS if name.startswith("rows_"))
SMALL = [name for name in LAYERS if name not in (*LONG, *HUGE, *ROWS, "uncached")]

VARIANTS = {
    "sn": resolve_variant("sn"),
    "ssn": resolve_variant("ssn", 1.6),
    "bsn": resolve_variant("bsn"),
    "bssn": resolve_variant("bssn", 1.2),
    "capped_above": resolve_variant("capped", 1e-3),
    "capped_below": resolve_variant("capped", 1e3),
    "custom": Variant(out=0.3, into=0.9, floor=1e-4, gain=0.7),
    "only_into": Variant(out=0.0, into=1.0),
    "both_capped_below": Variant(out=0.5, into=0.5, floor=1e3, gain=2.0),
}

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def interpreted(backend: str) -> bool:
    """Whether this backend runs in Triton's interpreter, which takes half a second for a layer."""
    return backend == "triton" and interpreting()


def played(backend: str) -> bool:
    """Whether this backend runs on a model of a device, which takes a millisecond and more for a tile."""
    return backend == "cuda" and modelling()


def home(backend: str) -> torch.device:
    """Where the tensors of a test of this backend are."""
    on_gpu = {"triton": not interpreting(), "cuda": not modelling()}
    return torch.device("cuda" if on_gpu.get(backend) else "cpu")


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def layouts(shape: tuple[int, ...]) -> list[str]:
    """Memory formats that a weight of this shape can have and that every backend takes."""
    found = ["contiguous", "offset"]
    if len(shape) >= 2:
        found.append("exchanged")
    if len(shape) in (4, 5):
        found.append("channels_last")
    return found


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values, elsewhere in memory."""
    if layout == "contiguous":
        return x.clone(memory_format=torch.contiguous_format)
    if layout == "offset":  # at an odd distance from where the allocation begins
        flat = torch.empty(x.numel() + 3, dtype=x.dtype, device=x.device)
        return flat[3:].view(x.shape).copy_(x)
    if layout == "exchanged":  # as weight.t() of a weight made by another library
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return x.contiguous(memory_format=formats[x.ndim])
    raise ValueError(layout)


@dataclass(frozen=True)
class Case:
    """One layer of a group under test."""

    layer: str
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    variant: str = "sn"
    semantics: str = "torch"
    iterations: int = 1
    gain: bool = False
    eps: float = 1e-12

    @property
    def name(self) -> str:
        gain = "+gain" if self.gain else ""
        return f"{self.layer}/{self.layout}/{SHORT[self.dtype]}/{self.variant}{gain}/{self.semantics}/{self.iterations}"


@dataclass
class Built:
    """Tensors of a case. ``vectors`` are unit vectors on their way to the singular ones, but for their length."""

    case: Case
    weight: Tensor
    vectors: list[Tensor]
    gain: Tensor | None
    spec: LayerSpec


def build(case: Case, seed: int = 0, mean: float = 0.0, device: torch.device | str = "cpu") -> Built:
    shape, axis = LAYERS[case.layer]
    generator = torch.Generator().manual_seed(seed)
    variant = VARIANTS[case.variant]
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1 + mean
    weight = lay_out(values.to(device, case.dtype), case.layout)
    spec = LayerSpec.of(
        weight, name=case.name, axis=axis, variant=variant, semantics=case.semantics, eps=case.eps, gain=case.gain
    )
    vectors = []
    if len(shape) > 1 or case.semantics != "torch":
        for row_axis in (axis, 1 - axis)[: truth.directions(shape, variant)]:
            m = truth.as_matrix(weight.double().cpu(), row_axis)
            vectors += [torch.randn(n, generator=generator, dtype=torch.float64) for n in m.shape]
        rule = {"variant": variant, "semantics": "biggan", "axis": axis, "iterations": 2}
        vectors = truth.normalize(weight.double().cpu(), vectors, **rule).vectors
        vectors = [x * (1.7 if case.iterations else 1.0) for x in vectors]
        vectors = [x.to(device, accumulation_dtype(case.dtype)) for x in vectors]
    gain = None
    if case.gain:
        gain = torch.rand(1, generator=generator, dtype=torch.float64).add(0.5)
        gain = gain.to(device, accumulation_dtype(case.dtype))
        gain.requires_grad_()
    return Built(case, weight.requires_grad_(), vectors, gain, spec)


def check(cases: list[Case], backend: str, *, output_dtype=None, seed: int = 0, mean: float = 0.0) -> None:
    """One group of all cases through ``backend``, forward and backward, each layer against the truth."""
    layers = [build(case, seed + i, mean, home(backend)) for i, case in enumerate(cases)]
    plan = functional.make_plan([layer.spec for layer in layers], backend)
    assert plan.backend.name == backend
    weights = [layer.weight for layer in layers]
    vectors = [x for layer in layers for x in layer.vectors]
    gains = [layer.gain for layer in layers if layer.gain is not None]
    before = [x.detach().clone() for x in (*weights, *vectors, *gains)]
    iterations = [case.iterations for case in cases]
    result = functional.spectral_normalize(weights, vectors, plan, iterations, gains=gains, output_dtype=output_dtype)
    generator = torch.Generator().manual_seed(seed + 10_000)
    grads = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in result.weights]
    torch.autograd.backward(result.weights, grads)
    for x, old in zip((*weights, *vectors, *gains), before):
        assert torch.equal(x.detach(), old), "an input was written to"

    new, by_direction, multipliers = (
        iter(result.vectors),
        plan.sigmas_of(result.saved, directions=True),
        plan.multipliers_of(result.saved),
    )
    for i, (layer, grad) in enumerate(zip(layers, grads)):
        expected = _truth(layer, grad)
        out = result.weights[i]
        assert out.dtype == (output_dtype or layer.weight.dtype)
        assert out.stride() == layer.weight.stride() == layer.weight.grad.stride(), layer.case.name
        assert layer.weight.grad.dtype == layer.weight.dtype
        _close_elements(out, expected.weight, f"{layer.case.name}: W_bar", backend)
        scale = max(expected.grad_weight.norm().item(), expected.multiplier.abs().item() * grad.double().norm().item())
        _close_norms(layer.weight.grad, expected.grad_weight, scale, f"{layer.case.name}: dW", backend)
        # The reference adds by torch's own products, which lose more over 100,000 numbers than ours may.
        bound = 1e-12 if layer.case.dtype == torch.float64 else 4e-6 if plan.backend.name == "reference" else 1e-6
        numbers = [*zip(by_direction[i], expected.sigmas), (result.sigmas[i], expected.mean)]
        for sigma, true in (*numbers, (multipliers[i], expected.multiplier)):
            error = abs(sigma.item() / true.item() - 1)
            assert error <= bound, f"{layer.case.name}: sigmas, mean, multiplier: relative error {error}"
        assert len(by_direction[i]) == len(expected.sigmas)
        for k in range(len(layer.vectors)):
            x = next(new)
            assert x.dtype == plan.accumulation_dtype and not x.requires_grad
            assert relative(x.cpu(), expected.vectors[k]) <= 10 * bound, f"{layer.case.name}: vector {k}"
        if layer.gain is not None:  # <G, W> may cancel: its error is measured against |G| |W|
            scale = expected.slope_gain.item() * grad.double().norm().item() * layer.weight.double().norm().item()
            assert layer.gain.grad.dtype == layer.gain.dtype and layer.gain.grad.shape == layer.gain.shape
            assert abs(layer.gain.grad.item() - expected.grad_gain.item()) <= bound * scale, f"{layer.case.name}: dgain"
    assert next(new, None) is None


@dataclass
class _Expected:
    weight: Tensor
    vectors: list[Tensor]
    sigmas: list[Tensor]
    mean: Tensor
    multiplier: Tensor
    grad_weight: Tensor
    grad_gain: Tensor | None
    slope_gain: Tensor | None


def _truth(layer: Built, grad: Tensor) -> _Expected:
    case, spec = layer.case, layer.spec
    weight = layer.weight.detach().double().cpu().requires_grad_()
    gain = None if layer.gain is None else layer.gain.detach().double().cpu().requires_grad_()
    result = truth.normalize(
        weight,
        [x.double().cpu() for x in layer.vectors],
        variant=spec.variant,
        semantics=case.semantics,
        axis=spec.axis,
        iterations=case.iterations,
        eps=case.eps,
        gain=gain,
    )
    result.weight.backward(grad.double().cpu())
    slope = None if gain is None else (result.multiplier / gain.detach()).abs()
    grad_gain = None if gain is None else gain.grad
    sigmas = [s.detach() for s in result.sigmas]
    return _Expected(
        result.weight.detach(), result.vectors, sigmas, result.mean, result.multiplier, weight.grad, grad_gain, slope
    )


# Half an ulp of a normal number, and half of the smallest subnormal, which is the error below.
HALF_ULP = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
HALF_TINY = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}


def rounding(dtype: torch.dtype, backend: str) -> float:
    """Relative error of a rounding to ``dtype``. Triton's interpreter cuts bfloat16 off where devices round."""
    cut = interpreted(backend) and dtype == torch.bfloat16
    return (2 if cut else 1) * HALF_ULP[dtype]


def _close_elements(found: Tensor, expected: Tensor, what: str, backend: str) -> None:
    """W_bar is one product per element: the multiplier's error, then a rounding to the output's dtype."""
    multiplier_error = 1e-12 if found.dtype == torch.float64 else 2e-6
    bound = (rounding(found.dtype, backend) + multiplier_error) * expected.abs() + HALF_TINY[found.dtype]
    found = found.detach().cpu()
    worst = ((found.double() - expected).abs() - bound).max().item()
    assert worst <= 0, f"{what}: {worst} over the bound"
    if found.dtype == torch.float32:
        assert relative(found, expected) <= 1e-5, what


def _close_norms(found: Tensor, expected: Tensor, scale: float, what: str, backend: str) -> None:
    """Relative in the Frobenius norm: the arithmetic, then a rounding to the gradient's dtype.

    ``scale`` is |dW|, or |m G| where the rank term cancels that, as it does in a weight of one element.
    """
    arithmetic = 1e-12 if found.dtype == torch.float64 else 1e-5
    bound = arithmetic * scale + rounding(found.dtype, backend) * expected.norm().item()
    bound += HALF_TINY[found.dtype] * expected.numel() ** 0.5
    error = (found.double().cpu() - expected).norm().item()
    assert error <= bound, f"{what}: {error} > {bound}"
