"""What is measured together: a set of weights, its dtype and memory format."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from bssn_kernels.bench import DTYPES
from bssn_kernels.bench.providers import Subject
from bssn_kernels.bench.workloads import WORKLOADS


@dataclass(frozen=True)
class Case:
    """A set of weights.

    Args:
        dtype: of the weights. autocast: forwards run under torch.autocast to bfloat16.
        compiled: torch.compile takes part.
    """

    workload: str
    dtype: str = "float32"
    channels_last: bool = False
    autocast: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        words = [self.workload, self.dtype, "channels_last" if self.channels_last else "contiguous"]
        words += ["autocast"] if self.autocast else []
        return ", ".join([*words, "with torch.compile"] if self.compiled else words)

    def subject(self, device: torch.device) -> Subject:
        """The weights under torch's parametrization."""
        workload = WORKLOADS[self.workload]
        model: nn.Module = workload.build(DTYPES[self.dtype])
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return Subject(self.workload, model, workload.learnable_gain, device)


# The most telling first: a run that ends early has measured these.
GPU_CASES = (
    *(Case(name) for name in ("biggan128", "sngan32", "vit_b", "paper_resnet")),
    Case("biggan128", channels_last=True),
    Case("biggan128", "bfloat16"),
    Case("sngan32", compiled=True),
    Case("biggan128", compiled=True),
    Case("paper_resnet", channels_last=True),
    *(Case(name) for name in ("paper_cnn", "stylegan_t", "dcgan_g", "biggan256")),
    Case("vit_b", "bfloat16"),
    Case("biggan128", autocast=True),
    Case("sngan32", channels_last=True),
)
# torch.compile writes and compiles C++ for every layer here, so it takes part where layers are few.
CPU_CASES = (
    *(Case(name, compiled=name in ("sngan32", "paper_cnn")) for name in WORKLOADS),
    Case("paper_cnn", channels_last=True),
    Case("paper_cnn", "bfloat16"),
)


def cases_of(device: torch.device) -> tuple[Case, ...]:
    """What is measured where nothing is asked for."""
    return GPU_CASES if device.type == "cuda" else CPU_CASES
