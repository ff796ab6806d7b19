"""Train the paper's CNN discriminator with torch's spectral_norm and with bssn_kernels.fuse, from one seed.

    python benchmarks/train_parity.py

A small generator learns scikit-learn's bundled digits (32 x 32, three channels, hinge loss, Adam). In float64 both loss
curves must agree to 1e-9, else the exit code is 1. In float32 the time of a step is split into normalization and the
rest; curves are not compared there, since rounding grows without bound over the steps of a GAN.

Architecture: Lin, Sekar, Fanti 2021 (arXiv 2009.02773), LeakyReLU 0.1, strides 1 2 1 2 1 2 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as spectral_norm_hook

import bssn_kernels
from bssn_kernels.bench.machine import machine
from bssn_kernels.bench.measure import Samples, interleaved
from bssn_kernels.bench.providers import Root, Subject, make_fused, make_native, native_sites, tasks_of
from bssn_kernels.bench.task import Task

LATENT = 64
LIMIT = 1e-9
FORMS = {"parametrization": parametrizations.spectral_norm, "hook": spectral_norm_hook, "plain": lambda layer: layer}


def discriminator(width: int, form: str) -> nn.Sequential:
    """Images (n, 3, 32, 32) to scores (n, 1); every layer under torch's spectral_norm in the given form."""
    norm = FORMS[form]
    layers: list[nn.Module] = []
    into = 3
    for out, kernel in zip((1, 1, 2, 2, 4, 4, 8), (3, 4, 3, 4, 3, 4, 3)):
        conv = nn.Conv2d(into, out * width, kernel, stride=1 if kernel == 3 else 2, padding=1)
        layers += [norm(conv), nn.LeakyReLU(0.1)]
        into = out * width
    return nn.Sequential(*layers, nn.Flatten(), norm(nn.Linear(into * 16, 1)))


def generator() -> nn.Sequential:
    """Latents (n, LATENT) to images (n, 3, 32, 32) in [-1, 1]."""
    layers: list[nn.Module] = [nn.Linear(LATENT, 64 * 16), nn.Unflatten(1, (64, 4, 4))]
    for into, out in ((64, 32), (32, 16), (16, 16)):
        layers += [nn.BatchNorm2d(into), nn.ReLU(), nn.ConvTranspose2d(into, out, 4, stride=2, padding=1)]
    return nn.Sequential(*layers, nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1), nn.Tanh())


def digits(dtype: torch.dtype) -> Tensor:
    """The bundled digits as (1797, 3, 32, 32) in [-1, 1]."""
    images = torch.tensor(load_digits().images, dtype=dtype).unsqueeze(1) / 8 - 1
    return F.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1)


class Training:
    """One GAN with all its state; equal seeds make equal starts and equal batches."""

    def __init__(self, form: str, fused: bool, width: int, batch: int, dtype: torch.dtype, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.generator = generator().to(dtype)
        self.discriminator = discriminator(width, form).to(dtype)
        self.group = bssn_kernels.fuse(self.discriminator) if fused else None
        self.images = digits(dtype)
        self.batch = batch
        self.random = torch.Generator().manual_seed(seed)
        self.adams = [
            torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.5, 0.999))
            for model in (self.discriminator, self.generator)
        ]

    def step(self) -> tuple[float, float]:
        """One step of each network; returns the losses of discriminator and generator."""
        chosen = torch.randint(len(self.images), (self.batch,), generator=self.random)
        real = self.images[chosen]
        fake = self.generator(torch.randn(self.batch, LATENT, generator=self.random, dtype=real.dtype))
        d_loss = F.relu(1 - self.discriminator(real)).mean() + F.relu(1 + self.discriminator(fake.detach())).mean()
        self._descend(0, d_loss)
        # The generator's step needs no gradient of the discriminator's weights.
        self.discriminator.requires_grad_(False)
        g_loss = -self.discriminator(fake).mean()
        self._descend(1, g_loss)
        self.discriminator.requires_grad_(True)
        return d_loss.item(), g_loss.item()

    def _descend(self, which: int, loss: Tensor) -> None:
        self.adams[which].zero_grad()
        loss.backward()
        self.adams[which].step()

    def sigmas(self) -> list[float]:
        """Sigma of every layer from the present weights and stored vectors."""
        if self.group is not None:
            self.discriminator.eval()
            with torch.no_grad():
                self.discriminator(self.images[:1])
            self.discriminator.train()
            return [float(sigma) for sigma in self.group.sigmas().values()]
        root = Root(self.discriminator, native_sites(self.discriminator))
        weights = [weight.detach().flatten(1) for weight in root.originals()]
        return [float(u @ weight @ v) for weight, (u, v) in zip(weights, root.vectors())]


def compare_curves(options: argparse.Namespace) -> dict:
    """Losses of both trainings in float64, their largest difference and the final sigmas."""
    curves, sigmas, seconds = {}, {}, {}
    for name in ("native", "fused"):
        training = Training(options.form, name == "fused", options.width, options.batch, torch.float64)
        start = time.perf_counter()
        curves[name] = [show_step(f"float64 {name}", i, options.steps, training.step()) for i in range(options.steps)]
        seconds[name] = time.perf_counter() - start
        sigmas[name] = training.sigmas()
    difference = [
        abs(a - b) / max(1.0, abs(a)) for pair in zip(curves["native"], curves["fused"]) for a, b in zip(*pair)
    ]
    # A NaN anywhere is no agreement: max would pass over it.
    largest = max(difference) if all(d == d for d in difference) else float("nan")
    return {"curves": curves, "sigmas": sigmas, "seconds": seconds, "largest_difference": largest}


def time_steps(options: argparse.Namespace) -> dict[str, Samples]:
    """Float32: whole steps of native, fused and a plain discriminator, and the normalizations of a step alone."""
    tasks = {}
    for name in ("plain", "native", "fused"):
        form = "plain" if name == "plain" else options.form
        training = Training(form, name == "fused", options.width, options.batch, torch.float32)
        tasks[name] = Task(training.step)
    subject = Subject("alone", discriminator(options.width, options.form))
    for name, root in (("native alone", make_native(subject, "sn")), ("fused alone", make_fused(None, subject, "sn"))):
        tasks[name] = normalizations_of_step(root)
    times = interleaved(tasks, repeats=options.timed_steps, progress=lambda text: show(f"float32 {text}"))
    return {name: of_task.wall for name, of_task in times.items()}


def normalizations_of_step(root: Root) -> Task:
    """What a step asks for: two forwards with one backward each, and one forward without gradient of the weights."""
    grads = [torch.randn_like(weight) for weight in root.originals()]
    forward, both = tasks_of(root, grads).values()

    def run() -> None:
        both.run()
        both.run()
        root.requires_grad_(False)
        forward.run()
        root.requires_grad_(True)

    return Task(run, both.reset)


def show_step(what: str, i: int, steps: int, losses: tuple[float, float]) -> tuple[float, float]:
    show(f"{what}: step {i + 1} of {steps}, losses {losses[0]:.4f} {losses[1]:.4f}")
    return losses


def show(text: str) -> None:
    """A line on a terminal that is written over."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def report(options: argparse.Namespace, float64: dict, float32: dict[str, Samples]) -> None:
    ms = {name: samples.median * 1e3 for name, samples in float32.items()}
    losses = float64["curves"]["native"]
    print(f"{options.steps} steps, batch {options.batch}, width {options.width}, {options.form}")
    print(f"\nfloat64: losses (discriminator, generator) from {pair(losses[0])} to {pair(losses[-1])}")
    worst = float64["largest_difference"]
    verdict = "agree" if worst <= LIMIT else "DO NOT AGREE"
    print(f"largest difference of the loss curves: {worst:.1e} (limit {LIMIT:.0e}): they {verdict}")
    print("\nlayer  final sigma, native  final sigma, fused  relative difference")
    for i, (a, b) in enumerate(zip(*float64["sigmas"].values())):
        print(f"{i:>5}  {a:>19.12f}  {b:>18.12f}  {abs(a - b) / abs(a):>19.1e}")
    print("\nfloat32, ms a step    whole  normalization   rest  normalization alone")
    for name in ("native", "fused"):
        split = ms[name] - ms["plain"]
        print(f"{name:<19}{ms[name]:>8.1f}{split:>15.1f}{ms['plain']:>7.1f}{ms[name + ' alone']:>21.1f}")
    ratio, ratio_alone = ms["native"] / ms["fused"], ms["native alone"] / ms["fused alone"]
    print(f"native / fused     {ratio:>7.2f}x{'':>22}{ratio_alone:>20.2f}x")
    print("rest: the same step with plain layers; normalization: the difference to it; alone: all normalizations of a")
    print("step (three forwards, two backwards) without the network. Medians of interleaved steps.")


def pair(losses: Sequence[float]) -> str:
    return f"({losses[0]:.4f}, {losses[1]:.4f})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="channels of the first layer; 64 is the paper's network")
    parser.add_argument("--form", choices=["parametrization", "hook"], default="parametrization")
    parser.add_argument("--timed-steps", type=int, default=30, help="float32 steps that are timed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)

    float64 = compare_curves(options)
    float32 = time_steps(options)
    show("")
    report(options, float64, float32)
    if options.json:
        asked = {name: value for name, value in vars(options).items() if name != "json"}
        times = {name: samples.record() for name, samples in float32.items()}
        content = {"machine": machine(), "settings": asked, "float64": float64, "float32": times}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if float64["largest_difference"] <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
