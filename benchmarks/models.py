"""Whole discriminators whose normalized layers are those of the workloads of the same names, still plain."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block of a discriminator (Miyato et al. 2018); ``first``: no activation before the first layer.

    Args:
        shortcut: a 1 x 1 convolution on the shortcut, which otherwise is the identity.
    """

    def __init__(self, into: int, out: int, *, down: bool, first: bool = False, shortcut: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(into, out, 1) if shortcut else nn.Identity()
        self.down, self.first = down, first

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x if self.first else F.relu(x))
        y = self.conv2(F.relu(y))
        x = self.shortcut(x)
        return F.avg_pool2d(x + y, 2) if self.down else x + y


class Attention(nn.Module):
    """Self-attention over positions (Zhang et al. 2019), as BigGAN has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Conv2d(channels, channels // 8, 1, bias=False) for _ in range(2))
        self.value = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.out = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).flatten(2)
        key, value = (F.max_pool2d(layer(x), 2).flatten(2) for layer in (self.key, self.value))
        weights = torch.softmax(query.transpose(1, 2) @ key, dim=-1)
        mixed = (value @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.scale * self.out(mixed)


class Discriminator(nn.Module):
    """Blocks, a sum over positions, a linear head, and a projection of the class where there are classes."""

    def __init__(self, body: nn.Sequential, channels: int, classes: int = 0) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(channels, 1)
        self.embedding = nn.Embedding(classes, channels) if classes else None

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images (n, 3, size, size) and labels (n,) to scores (n,)."""
        x = F.relu(self.body(images)).sum((2, 3))
        scores = self.head(x).squeeze(1)
        return scores if self.embedding is None else scores + (self.embedding(labels) * x).sum(1)


class Plain(nn.Sequential):
    """The same call for a network that knows no classes."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return super().forward(images).squeeze(1)


def sngan32() -> nn.Module:
    down = Block(3, 128, down=True, first=True), Block(128, 128, down=True)
    return Discriminator(nn.Sequential(*down, *(Block(128, 128, down=False, shortcut=False) for _ in range(2))), 128)


def paper_cnn() -> nn.Module:
    layers: list[nn.Module] = []
    into = 3
    for out, kernel in zip((64, 64, 128, 128, 256, 256, 512), (3, 4, 3, 4, 3, 4, 3)):
        layers += [nn.Conv2d(into, out, kernel, stride=1 if kernel == 3 else 2, padding=1), nn.LeakyReLU(0.1)]
        into = out
    return Plain(*layers, nn.Flatten(), nn.Linear(8192, 1))


def paper_resnet() -> nn.Module:
    channels = (3, 64, 128, 256, 512, 1024, 1024)
    sides = list(zip(channels, channels[1:]))
    blocks = [Block(into, out, down=i < 5, first=i == 0) for i, (into, out) in enumerate(sides)]
    return Discriminator(nn.Sequential(*blocks), 1024)


def biggan128() -> nn.Module:
    channels = (3, 96, 192, 384, 768, 1536, 1536)
    sides = list(zip(channels, channels[1:]))
    blocks = [Block(i, o, down=k < 5, first=k == 0, shortcut=k < 5) for k, (i, o) in enumerate(sides)]
    return Discriminator(nn.Sequential(blocks[0], Attention(96), *blocks[1:]), 1536, classes=1000)


# What is built, the size of its images, and the batch of a step: one that people train with on a GPU, and one that a
# CPU has time for where that is less.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "sngan32": (sngan32, 32, 64, 32),
    "paper_cnn": (paper_cnn, 32, 64, 32),
    "paper_resnet": (paper_resnet, 128, 64, 4),
    "biggan128": (biggan128, 128, 32, 2),
}
