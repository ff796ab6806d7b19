"""The short form under pytest-benchmark: ``pytest benchmarks``, grouped by workload.

    pytest benchmarks --benchmark-save before            # then change something
    pytest benchmarks --benchmark-compare

The same providers, tasks and checks as ``python -m benchmarks.run``, without its interleaving: for quick looks, and so
that nothing here rots. On the CPU; ``BSSN_BENCH_DEVICE=cuda`` takes a GPU.
"""

import os
from functools import cache

import pytest
import torch

from benchmarks.providers import providers_of
from benchmarks.workloads import Case
from bssn_kernels.bench.providers import Subject
from bssn_kernels.bench.verify import compare

DEVICE = torch.device(os.environ.get("BSSN_BENCH_DEVICE", "cpu"))
WORKLOADS = ("sngan32", "paper_cnn")
ROUNDS = 5
PROVIDERS = {
    f"{p.name} {variant}": (p, variant)
    for variant in ("sn", "bssn")
    for p in providers_of(DEVICE, Case(WORKLOADS[0]))
    if p.variants is None or variant in p.variants
}


@cache
def subject_of(name: str) -> Subject:
    return Case(name).subject(DEVICE)


@pytest.mark.parametrize("kind", ["forward", "both"])
@pytest.mark.parametrize("label", PROVIDERS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_time(benchmark, workload: str, label: str, kind: str):
    provider, variant = PROVIDERS[label]
    if provider.left_out:
        pytest.skip(provider.left_out)
    subject = subject_of(workload)
    root = provider.make(subject, variant)
    tasks = provider.tasks(root, subject.grads())
    errors = compare(root, variant, subject.grads(), tasks["both"])
    assert not errors.refusal(torch.float32)
    benchmark.group = f"{workload}, {kind}"
    benchmark.extra_info.update(provider=provider.name, variant=variant, errors={k: v[0] for k, v in errors.items()})
    run, wait = tasks[kind].run, torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
    benchmark.pedantic(lambda: (run(), wait()), setup=tasks[kind].reset, rounds=ROUNDS, warmup_rounds=2)
