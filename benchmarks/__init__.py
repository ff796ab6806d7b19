"""What a sceptic would run: how much faster, at what cost, how near to the limit, against every form that torch has.

    python -m benchmarks.run --json results.jsonl --plots pictures

From the root of the repository; ``pip install -e '.[bench]'`` for the pictures. The measuring itself (clock, rounds,
verification, workloads) is ``bssn_kernels.bench``, which ``python -m bssn_kernels bench`` uses too.
"""

MB = 10**6
LARGE = 100 * MB  # from here on a set of weights does not fit a GPU's L2 cache
WARM_UPS = 3
