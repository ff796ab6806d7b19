"""DistributedDataParallel on two gloo processes: replicas stay equal bit for bit, and equal one process on all data."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from nets import close, images, native, plain, state

from bssn_kernels.group import fuse, group_of, normalize

STEPS = 20


def make(form: str):
    if form == "bssn":
        torch.manual_seed(4)
        net = plain()
        normalize(net, "bssn", learnable_gain=True)
    else:
        net = native(form)
        fuse(net)
    return net


def train(net, take) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        real, fake = net(take(images(8, seed=step))), net(take(images(8, seed=step + 1000)))
        (torch.nn.functional.softplus(-real).mean() + torch.nn.functional.softplus(fake).mean()).backward()
        optimizer.step()


def work(rank: int, folder: str, forms: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for form in forms:
        net = make(form)
        wrapped = DistributedDataParallel(net)
        train(wrapped, lambda x: x[rank::2])
        group = group_of(wrapped)
        assert group.root is net and len({id(group._arrangement.bucket(0, j)) for j in range(4)}) > 1
        torch.save(state(net), f"{folder}/{form}.{rank}")
    dist.barrier()
    os._exit(0)  # gloo's threads abort now and then where the interpreter takes the process down around them


def test_replicas_are_bit_identical(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    forms = ["mixed", "bssn"]
    mp.spawn(work, (str(tmp_path), forms), nprocs=2)
    for form in forms:
        first, second = (torch.load(tmp_path / f"{form}.{rank}") for rank in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)
        alone = make(form)
        train(alone, lambda x: x)
        close(first, state(alone), 1e-8)
