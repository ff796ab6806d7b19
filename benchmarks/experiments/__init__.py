"""What decides how the kernels are written, and whether they are right: ``python -m benchmarks.experiments``."""
