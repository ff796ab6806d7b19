"""One layer under ``nn.utils.parametrize``: ``spectral_norm``, in the place of torch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bssn_kernels import backends, functional
from bssn_kernels.plan import LayerSpec
from bssn_kernels.rule import Rule, check_gain, check_iterations, check_output_dtype, check_weight
from bssn_kernels.run import Run
from bssn_kernels.variants import Semantics, Variant, resolve_semantics, resolve_variant

VECTORS = ("_u", "_v", "_u_in", "_v_in")


class SpectralNorm(Rule, nn.Module):
    """Spectral normalization as a parametrization, in the place of torch's ``_SpectralNorm``.

    Buffers ``_u`` (rows,), ``_v`` (cols,), of a second direction ``_u_in``, ``_v_in``; parameter ``_gain`` (1,). A
    vector under order uv has no buffers.

    Args:
        weight: tensor to start from.
        n_power_iterations, dim, eps: as torch's.
        variant, semantics, backend, output_dtype: see :func:`spectral_norm`, resolved.
        learnable_gain: whether there is a ``_gain``.
        label: the layer's name in errors.

    Raises:
        IndexError, ValueError: as torch's.
        TypeError: a weight that is not dense and floating or complex.
    """

    learnable_gain = False
    _registering: str | None = None

    def __init__(
        self,
        weight: Tensor,
        n_power_iterations: int = 1,
        dim: int = 0,
        eps: float = 1e-12,
        *,
        variant: Variant = Variant(),
        semantics: Semantics | str = "torch",
        learnable_gain: bool = False,
        backend: str | None = None,
        output_dtype: torch.dtype | str | None = None,
        label: str = "weight",
    ) -> None:
        super().__init__()
        check_weight(weight, label)
        ndim = weight.ndim
        if dim >= ndim or dim < -ndim:
            raise IndexError(
                f"Dimension out of range (expected to be in range of [-{ndim}, {ndim - 1}] but got {dim})"
            )
        check_iterations(n_power_iterations)
        self.n_power_iterations, self.eps = n_power_iterations, eps
        self.dim = dim if dim >= 0 else dim + ndim
        self.variant, self.semantics = variant, resolve_semantics(semantics)
        self.backend, self.output_dtype, self.label = backend, output_dtype, label
        self.learnable_gain = learnable_gain
        if learnable_gain:
            self.register_parameter("_gain", nn.Parameter(torch.ones(1, dtype=weight.real.dtype, device=weight.device)))
        for name, vector in zip(VECTORS, functional.initial_vectors(weight, self.spec(weight))):
            self.register_buffer(name, vector)

    def spec(self, weight: Tensor) -> LayerSpec:
        """The layer's description for a plan."""
        return super().spec(weight, gain=self.learnable_gain)

    @property
    def vector_names(self) -> list[str]:
        return [name for name in VECTORS if name in self._buffers]

    def forward(self, weight: Tensor) -> Tensor:
        member = self._member
        if member is not None:
            frame = member.frame()
            if frame is not None and frame.serves(member.index, weight):
                return frame.read(member.index)
        vectors = [self._buffers[name] for name in self.vector_names]
        gain = self._gain if self.learnable_gain else None
        if self._registering is None:
            return self.normalize_alone(weight, vectors, gain, self.training, self.backend)
        # torch's check of a new parametrization: models are built where their backend need not run
        output_dtype, self.output_dtype = self.output_dtype, None
        moves = self._registering == "moves" and self.training
        try:
            return self.normalize_alone(weight, vectors, gain, moves, "reference")
        finally:
            self.output_dtype = output_dtype
            for name in ("_plan", "_last"):
                self.__dict__.pop(name, None)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def start_gain_at_sigma(self, weight: Tensor) -> None:
        """Set the gain such that W_bar = W where nothing moves."""
        vectors = [self._buffers[name] for name in self.vector_names]
        plan = functional.make_plan([self.spec(weight)], "reference")
        with torch.no_grad():
            self._gain.fill_(1.0)
            run = Run(plan, (weight,), vectors, (self._gain,), (self.resting_iterations,), None)
            self._gain.div_(run.multiplier_of(0, weight).real)

    def extra_repr(self) -> str:
        parts = [f"n_power_iterations={self.n_power_iterations}", f"dim={self.dim}"]
        if self.variant != Variant():
            parts.append(f"variant={self.variant}")
        if self.semantics != resolve_semantics("torch"):
            parts.append(f"semantics={self.semantics}")
        return ", ".join(parts + (["learnable_gain=True"] if self.learnable_gain else []))


def default_dim(module: nn.Module) -> int:
    """The axis of the output channels."""
    return int(isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)))


def register(module: nn.Module, name: str, norm: SpectralNorm, first: bool = True) -> None:
    """Register a parametrization with torch's check forward, which moves the vectors as torch's does."""
    norm._registering = "moves" if first and norm.semantics.start == "warm" else "rests"
    try:
        parametrize.register_parametrization(module, name, norm)
    finally:
        norm._registering = None
    install_getter(module, name)


def install_getter(module: nn.Module, name: str) -> None:
    """Put a property that looks at the frame first in the place of torch's.

    The class is shared with deep copies of the module, so all is found through self; torch's property does the rest.
    """
    cls, grad_enabled = type(module), torch.is_grad_enabled
    torchs = cls.__dict__[name]
    if hasattr(torchs.fget, "torchs"):
        return

    def get(self):
        weights = self._modules["parametrizations"]._modules[name]
        norms = weights._modules
        if len(norms) == 1:
            member = norms["0"].__dict__.get("_member")
            if member is not None:
                frame = getattr(member.group._local, "frame", None)
                if frame is not None:
                    i, weight = member.index, weights._parameters.get("original")
                    versions = frame.versions  # Frame.serves, in line
                    if frame.weights[i] is weight and (versions is None or versions[i] == weight._version):
                        out = (frame.graph if grad_enabled() else frame.plain)[i]
                        return frame.resolve(i) if out is None else out
        return torchs.fget(self)

    get.torchs = torchs
    setattr(cls, name, property(get, torchs.fset, torchs.fdel))


def torchs_property(module: nn.Module, name: str) -> property:
    """What stood there before :func:`install_getter`."""
    return type(module).__dict__[name].fget.torchs


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    variant: str | Variant = "sn",
    scale: float = 1.0,
    learnable_gain: bool | str = False,
    semantics: str | Semantics = "torch",
    backend: str | None = None,
    output_dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """Normalize one weight, in the place of ``torch.nn.utils.parametrizations.spectral_norm``.

    Same signature, errors, random draws, buffers, keys and numbers; the vectors move whenever the weight is read in
    training. To compute all layers of a model in one call, use :func:`bssn_kernels.fuse` or
    :func:`bssn_kernels.normalize`.

    Args:
        module: holds the parameter or buffer.
        name: of the tensor.
        n_power_iterations: per read in training.
        eps: smallest norm that is divided by.
        dim: axis of the outputs; default 0, and 1 for transposed convolutions.
        variant: a name of :func:`bssn_kernels.variants` or a Variant.
        scale: factor of the normalized weight; for "capped", the cap.
        learnable_gain: True adds a parameter ``_gain`` (1,) that starts at 1, "sigma" starts it such that W_bar = W.
        semantics: a name or a Semantics.
        backend: who computes; default the best that can.
        output_dtype: of the normalized weight; "autocast" is autocast's where that is on.

    Returns:
        The module.

    Raises:
        ValueError, IndexError: as torch's; unknown names; a scale that is not positive and finite.
        TypeError: an integer, sparse or quantized weight.
        RuntimeError: a backend that cannot run on this machine.

    Source: Miyato et al. 2018 (arXiv 1802.05957); the variants, Lin, Sekar, Fanti 2021 (arXiv 2009.02773).

    Example::

        layer = spectral_norm(nn.Linear(20, 40))
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"Module '{module}' has no parameter or buffer with name '{name}'")
    check_output_dtype(output_dtype)
    check_gain(learnable_gain)
    backends.check_name(backend)
    norm = SpectralNorm(
        weight,
        n_power_iterations,
        default_dim(module) if dim is None else dim,
        eps,
        variant=resolve_variant(variant, scale),
        semantics=semantics,
        learnable_gain=bool(learnable_gain),
        backend=backend,
        output_dtype=output_dtype,
        label=f"{type(module).__name__}.{name}",
    )
    register(module, name, norm)
    if learnable_gain == "sigma":
        norm.start_gain_at_sigma(weight.detach())
    return module
