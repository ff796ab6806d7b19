"""fully_shard (FSDP2) on two gloo processes, with groups above and in the modules it wraps: as one native process."""

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.utils import spectral_norm as torch_hook
from torch.nn.utils.parametrizations import spectral_norm as torch_parametrization
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from nets import close, vectors

from bssn_kernels.group import fuse, group_of

STEPS = 3


class Net(nn.Module):
    """Blocks of two layers, and one layer beside them."""

    def __init__(self, wrap, recompute: str = "") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(
            nn.Sequential(wrap(nn.Linear(a, b)), nn.Tanh(), wrap(nn.Linear(b, 8)), nn.Tanh())
            for a, b in [(6, 8), (8, 12)]
        )
        self.last, self.recompute = wrap(nn.Linear(8, 1)), recompute
        self.double()

    def forward(self, x):
        for block in self.blocks:
            if not self.recompute:
                x = block(x)
                continue
            group = group_of(block) or group_of(self)
            contexts = {"context_fn": group.checkpoint_contexts} if self.recompute == "with contexts" else {}
            x = checkpoint(block, x, use_reentrant=False, **contexts)
        return self.last(x)


def shard(net: Net, mesh, blocks: bool = True, whole: bool = False) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in net.blocks if blocks else ():
        fully_shard(block, mesh=mesh, reshard_after_forward=not whole)
    fully_shard(net, mesh=mesh)


def fuse_root(net, mesh):
    fuse(net)
    shard(net, mesh, blocks=False)


def fuse_above(net, mesh):
    fuse(net)
    shard(net, mesh)


def fuse_above_blocks_that_stay_whole(net, mesh):
    fuse(net, backward_buckets=1)
    shard(net, mesh, whole=True)


def fuse_blocks(net, mesh):
    for block in net.blocks:
        fuse(block)
    shard(net, mesh)


def fuse_afterwards(net, mesh):
    shard(net, mesh)
    fuse(net)


# How a group meets FSDP, and how many of five layers compute one by one.
WAYS = {fuse_root: 0, fuse_above: 4, fuse_above_blocks_that_stay_whole: 4, fuse_blocks: 0, fuse_afterwards: 5}
WRAPS = {"parametrization": torch_parametrization, "hook": torch_hook}
# Checkpoints, and how many forwards precede one backward.
RECOMPUTE = {"": 2, "last": 1, "with contexts": 2}


def train(net: nn.Module, forwards: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    draw = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        optimizer.zero_grad()
        images = [torch.randn(4, 6, generator=draw, dtype=torch.float64) for _ in range(forwards)]
        sum(sign * net(x).square().mean() for sign, x in zip((1, -0.5), images)).backward()
        optimizer.step()


def whole_state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in net.state_dict().items()}


def work(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for form, wrap in WRAPS.items():
        for way in WAYS:
            for recompute in RECOMPUTE:
                net = Net(wrap, recompute)
                way(net, mesh)
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    train(net, RECOMPUTE[recompute])
                said = [str(w.message) for w in told if "bssn_kernels" in str(w.message)]
                found[form, way.__name__, recompute] = whole_state(net), said
    net = Net(torch_parametrization)
    fuse_blocks(net, mesh)
    group, errors = group_of(net.blocks[0]), []
    for act in (group.update, group.sigmas, group.remove, group.reset, lambda: group.hold().__enter__()):
        try:
            act()
        except RuntimeError as error:
            errors.append(str(error))
    net.blocks[0].unshard()
    group.update()
    found["errors"], found["updated"], found["sigmas"] = errors, vectors(net.blocks[0]), group.sigmas()
    net = Net(torch_parametrization)
    group = fuse(net)
    shard(net, mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(net, 1)
    found["sigmas of all"] = group.sigmas()
    layer = nn.Sequential(torch_parametrization(nn.Linear(4, 4)))
    group = fuse(layer)
    fully_shard(layer[0], mesh=mesh)
    with pytest.raises(RuntimeError, match="layer '0': restore.* FSDP itself wraps"):
        group.restore()
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    os._exit(0)  # gloo's threads abort now and then where the interpreter takes the process down around them


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP of this torch needs a GPU")
    folder = tmp_path_factory.mktemp("fsdp")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("form", WRAPS)
def test_as_one_native_process(found, form, way, recompute):
    """Which has no checkpoints, since recomputation moves torch's own vectors again."""
    alone = Net(WRAPS[form])
    train(alone, RECOMPUTE[recompute])
    for rank in found:
        state, said = rank[form, way.__name__, recompute]
        close(state, whole_state(alone), 1e-9)
        n = WAYS[way]
        assert len(said) == (n > 0) and all(f"{n} of 5 layers compute one by one" in text for text in said)


def test_calls_that_need_whole_weights(found):
    alone = Net(torch_parametrization)
    group = fuse(alone.blocks[0])
    group.update()
    for rank in found:
        assert len(rank["errors"]) == 5
        for name, error in zip(("update", "sigmas", "remove", "reset", "hold"), rank["errors"]):
            told = "remove() would give" if name == "remove" else f"layer '0': {name}() expected its whole weight"
            assert told in error
        close(rank["updated"], vectors(alone.blocks[0]))
        close(rank["sigmas"], group.sigmas())


def test_sigmas_of_layers_that_computed_by_themselves(found):
    alone = Net(torch_parametrization)
    group = fuse(alone)
    train(alone, 1)
    for rank in found:
        close(rank["sigmas of all"], group.sigmas())
