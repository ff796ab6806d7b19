"""Fused spectral normalization: all layers of a model in one launch, forward and backward."""

from bssn_kernels import functional
from bssn_kernels.variants import Semantics, Variant, variants

__version__ = "0.1.0"

__all__ = ["Semantics", "Variant", "__version__", "functional", "variants"]
