"""The sets of weights that are timed: those of real networks, as data, or those of a user's own model."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

CONV = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
DECONV = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}


@dataclass(frozen=True)
class Layer:
    """One normalized layer: ``kind`` is "conv", "deconv", "linear" or "embedding", ``shape`` that of its weight."""

    kind: str
    shape: tuple[int, ...]

    def build(self) -> nn.Module:
        """The layer, its weight not yet initialized, without bias."""
        first, second, *kernel = self.shape
        if self.kind == "embedding":
            return nn.utils.skip_init(nn.Embedding, first, second)
        if self.kind == "linear":
            return nn.utils.skip_init(nn.Linear, second, first, bias=False)
        if self.kind == "deconv":
            return nn.utils.skip_init(DECONV[len(self.shape)], first, second, tuple(kernel), bias=False)
        return nn.utils.skip_init(CONV[len(self.shape)], second, first, tuple(kernel), bias=False)


@dataclass(frozen=True)
class Workload:
    """The normalized layers of one network; ``learnable_gain`` for sigma-reparametrized ones."""

    name: str
    layers: tuple[Layer, ...]
    learnable_gain: bool = False

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(prod(layer.shape) for layer in self.layers)

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
        """Plain layers with N(0, 0.02) weights. They stand side by side: only their weights are of use."""
        model = nn.Sequential(*(layer.build() for layer in self.layers)).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.02, generator=generator)
        return model


def conv(out: int, into: int, *kernel: int) -> Layer:
    return Layer("conv", (out, into, *kernel))


def linear(out: int, into: int) -> Layer:
    return Layer("linear", (out, into))


def sngan32() -> Iterator[Layer]:
    """ResNet discriminator for 32x32 of Miyato et al. 2018, 128 channels."""
    yield from (conv(128, 3, 3, 3), conv(128, 128, 3, 3), conv(128, 3, 1, 1))
    yield from (conv(128, 128, 3, 3), conv(128, 128, 3, 3), conv(128, 128, 1, 1))
    yield from (conv(128, 128, 3, 3),) * 4
    yield linear(1, 128)


def paper_cnn() -> Iterator[Layer]:
    """CNN discriminator for 32x32 of Lin, Sekar, Fanti 2021."""
    for into, out in ((3, 64), (64, 128), (128, 256)):
        yield from (conv(out, into, 3, 3), conv(out, out, 4, 4))
    yield conv(512, 256, 3, 3)
    yield linear(1, 8192)


def paper_resnet() -> Iterator[Layer]:
    """ResNet discriminator for 128x128 of the same paper."""
    channels = (3, 64, 128, 256, 512, 1024, 1024)
    for into, out in zip(channels, channels[1:]):
        yield from (conv(out, into, 3, 3), conv(out, out, 3, 3), conv(out, into, 1, 1))
    yield linear(1, 1024)


def biggan(units: tuple[int, ...], attention_after: int) -> Iterator[Layer]:
    """Discriminator of Brock et al. 2019 with 96 ``units`` of channels; the last block does not downsample."""
    channels = (3, *(96 * unit for unit in units))
    for block, (into, out) in enumerate(zip(channels, channels[1:]), start=1):
        yield from (conv(out, into, 3, 3), conv(out, out, 3, 3))
        if into != out or block < len(units):
            yield conv(out, into, 1, 1)
        if block == attention_after:
            yield from (conv(out // 8, out, 1, 1),) * 2
            yield from (conv(out // 2, out, 1, 1), conv(out, out // 2, 1, 1))
    yield linear(1, channels[-1])
    yield Layer("embedding", (1000, channels[-1]))


def stylegan_t() -> Iterator[Layer]:
    """Heads of Sauer et al. 2023 on five features of a small DINO."""
    yield from (conv(384, 384, 1), conv(384, 384, 9), conv(64, 384, 1)) * 5


def vit_b() -> Iterator[Layer]:
    """ViT-B/16 under the sigma-reparametrization of Zhai et al. 2023."""
    yield linear(768, 768)
    yield from (linear(2304, 768), linear(768, 768), linear(3072, 768), linear(768, 3072)) * 12


def dcgan_g() -> Iterator[Layer]:
    """Generator of Radford et al. 2016; its row axis is 1."""
    channels = (512, 256, 128, 64, 3)
    yield from (Layer("deconv", (into, out, 4, 4)) for into, out in zip(channels, channels[1:]))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("sngan32", tuple(sngan32())),
        Workload("paper_cnn", tuple(paper_cnn())),
        Workload("paper_resnet", tuple(paper_resnet())),
        Workload("biggan128", tuple(biggan((1, 2, 4, 8, 16, 16), attention_after=1))),
        Workload("biggan256", tuple(biggan((1, 2, 4, 8, 8, 16, 16), attention_after=2))),
        Workload("stylegan_t", tuple(stylegan_t())),
        Workload("vit_b", tuple(vit_b()), learnable_gain=True),
        Workload("dcgan_g", tuple(dcgan_g())),
    )
}


class UsageError(Exception):
    """What is wrong with the arguments of the command, in words for the user."""


def load_model(path: str) -> nn.Module:
    """The model that ``module:factory`` makes, from the working directory or what is installed.

    Raises:
        UsageError: no such module or factory, it raises, or its result is no nn.Module.
    """
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise UsageError(f"expected module:factory, for example my_models:make_discriminator, got {path!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        factory = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(f"cannot import {module_name!r}: {_told(error)}") from error
    for name in attribute.split("."):
        if not hasattr(factory, name):
            raise UsageError(f"{module_name!r} has no {attribute!r}")
        factory = getattr(factory, name)
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise UsageError(f"{path!r}: expected a callable that returns an nn.Module, got {type(factory).__name__}")
    try:
        model = factory()
    except Exception as error:
        raise UsageError(f"{path!r} raised {_told(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{path!r}: expected it to return an nn.Module, got {type(model).__name__}")
    return model


def _told(error: Exception) -> str:
    """The exception and the innermost line that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""  # the first is the call itself
    return f"{type(error).__name__}: {error}{where}"
