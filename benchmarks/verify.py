"""Refuses to time what is wrong: errors against float64 within the limits, a device that still answers, and a wrong
provider that has to be found out first.

The comparison itself is ``bssn_kernels.bench.verify``: every layer's normalized weight, gradient, sigma and gradient of
the gain against float64 truth in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bssn_kernels.bench.providers import Root, Subject, tasks_of
from bssn_kernels.bench.task import Task
from bssn_kernels.bench.verify import compare

BENT = 1.001


class DeviceLost(Exception):
    """The device answers no more, since the row that the message names."""


class Blind(Exception):
    """The comparison let planted errors pass, so nothing that it lets pass counts."""


def alive(device: torch.device) -> bool:
    try:
        torch.ones(1, device=device).add_(1)
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def bent_tasks(root: Root, grads: Sequence[Tensor], which: str) -> dict[str, Task]:
    """Tasks whose normalized weights ("weight") or gradients ("grad") are off by a thousandth."""

    def call() -> list[Tensor]:
        outs = [out * (BENT if which == "weight" else 1) for out in root()]
        for out in outs:
            if which == "grad" and out.requires_grad:
                out.register_hook(lambda grad: BENT * grad)
        return outs

    return tasks_of(root, grads, call)


def check_the_check(device: torch.device) -> None:
    """Plant a wrong provider on a small model, on the device where the others will run.

    Raises:
        Blind: it was not refused; or the right one was.
    """
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Linear(7, 10), nn.ConvTranspose2d(5, 3, 4))
    subject = Subject("planted", model, device=device)
    root, grads = subject.copy(), subject.grads()
    for which in ("weight", "grad", ""):
        found = compare(root, "sn", grads, bent_tasks(root, grads, which)["both"]).refusal(torch.float32)
        if bool(which) != bool(found):
            raise Blind(f"a {which or 'faultless'} provider was {'' if found else 'not '}refused: {found}")
