"""The short form under pytest-benchmark: ``pytest benchmarks``, grouped by workload; ``--benchmark-compare`` works.

The same providers, tasks and checks as ``python -m bssn_kernels bench``, without its interleaving: for quick looks.
"""

from functools import cache

import pytest
import torch

from bssn_kernels import backends
from bssn_kernels.bench.providers import NATIVE, Provider, Subject, fused
from bssn_kernels.bench.session import tasks_of
from bssn_kernels.bench.verify import compare
from bssn_kernels.bench.workloads import WORKLOADS

PROVIDERS = [NATIVE, *map(fused, backends.natural("cpu"))]
CASES = [(p, v) for v in ("sn", "bssn") for p in PROVIDERS if p.variants is None or v in p.variants]


@cache
def subject_of(name: str) -> Subject:
    return Subject(name, WORKLOADS[name].build())


@pytest.mark.parametrize("kind", ["forward", "both"])
@pytest.mark.parametrize(("provider", "variant"), CASES, ids=lambda case: getattr(case, "name", case))
@pytest.mark.parametrize("workload", ["sngan32", "paper_cnn"])
def test_time(benchmark, workload: str, provider: Provider, variant: str, kind: str):
    subject = subject_of(workload)
    grads = [torch.randn_like(w) for w in subject.weights]
    root = provider.make(subject, variant)
    assert not compare(root, variant, grads).refusal(torch.float32)
    task = dict(zip(("forward", "both"), tasks_of(root, grads)))[kind]
    benchmark.group = f"{workload}, {kind}"
    benchmark.pedantic(task.run, setup=task.reset, rounds=20, warmup_rounds=2)
