"""Fused spectral normalization: all layers of a model in one launch, forward and backward."""

from bssn_kernels import functional
from bssn_kernels.group import fuse, group_of, normalize
from bssn_kernels.parametrizations import spectral_norm
from bssn_kernels.spectral_group import SpectralGroup
from bssn_kernels.variants import Semantics, Variant, variants

__version__ = "0.1.0"

__all__ = [
    "Semantics",
    "SpectralGroup",
    "Variant",
    "functional",
    "fuse",
    "group_of",
    "normalize",
    "spectral_norm",
    "variants",
]
