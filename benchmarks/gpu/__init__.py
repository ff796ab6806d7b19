"""Time spectral normalization on a GPU: ours, torch's in all its forms, and the copies that nothing can beat.

    python -m benchmarks.gpu --json gpu.json
    python -m benchmarks.gpu.experiments --json experiments.json

From the root of the repository. What runs may kill its device or never end, so it runs in processes of its own.
"""

MB = 10**6
LARGE = 100 * MB  # from here on a set of weights does not fit a GPU's L2 cache
WARM_UPS = 3
