"""What is looked at besides the clock: errors against float64, launches and memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import bssn_kernels
from benchmarks.gpu.providers import Runner
from bssn_kernels import functional
from bssn_kernels.bench.measure import Task
from bssn_kernels.bench.verify import TOLERANCE, TOLERANCES, norm, relative, worst
from bssn_kernels.plan import LayerSpec
from bssn_kernels.variants import resolve_variant


def alive(device: torch.device) -> bool:
    try:
        torch.ones(1, device=device).add_(1)
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def errors_of(runner: Runner, variant: str) -> dict[str, float]:
    """Run forward and backward once and compare with the reference backend in float64.

    Returns:
        The largest relative error (Frobenius) of a layer's normalized weight; of a gradient, against the norm of m G,
        since it can be small by cancellation; of a sigma and of the gradient of a gain, where there is one.
    """
    root, both = runner.root, runner.tasks["both"]
    weights, gains = root.originals(), [p for name, p in root.named_parameters() if name.split(".")[-1] == "_gain"]
    vectors = [x.detach().double().clone() for of_layer in root.vectors() for x in of_layer]
    both.reset()
    outs = [out.detach() for out in both.run()]

    wide = [w.detach().double().requires_grad_() for w in weights]
    wide_gains = [g.detach().double().requires_grad_() for g in gains]
    grads = [g.double() for g in runner.grads]
    rule = {"variant": resolve_variant(variant), "gain": bool(gains)}
    specs = [
        LayerSpec.of(w, name=s.name, axis=s.axis, semantics=s.semantics, eps=s.eps, **rule)
        for s, w in zip(root.sites, wide)
    ]
    plan, iterations = functional.make_plan(specs, "reference"), [site.n_power_iterations for site in root.sites]
    truth = functional.spectral_normalize(wide, vectors, plan, iterations, gains=wide_gains)
    true_grads = torch.autograd.grad(truth.weights, [*wide, *wide_gains], grads)

    names = [site.name for site in root.sites]
    scales = [norm(out) / norm(w) for out, w in zip(truth.weights, wide)]
    found = {
        "weight": [relative(norm(out - t), norm(t)) for out, t in zip(outs, truth.weights)],
        "grad": [relative(norm(grad_of(w) - t), m * norm(g)) for w, t, m, g in zip(weights, true_grads, scales, grads)],
    }
    if gains:
        found["gain"] = [
            relative(norm(grad_of(gain).flatten() - t.flatten()), norm(out) * norm(g))
            for gain, t, out, g in zip(gains, true_grads[len(wide) :], truth.weights, grads)
        ]
    if (group := bssn_kernels.group_of(root)) is not None:
        sigmas = list(group.sigmas().values())
        found["sigma"] = [relative(abs(float(s) - float(t)), float(t)) for s, t in zip(sigmas, truth.sigmas)]
        if len(sigmas) != len(names):
            raise ValueError(f"expected {len(names)} sigmas, got {len(sigmas)}")
    both.reset()
    return {what: worst(list(zip(errors, names)))[0] for what, errors in found.items()}


def grad_of(leaf: Tensor) -> Tensor:
    return torch.full_like(leaf, float("nan")) if leaf.grad is None else leaf.grad


def refusal(errors: Mapping[str, float], dtype: torch.dtype) -> str:
    """Why these numbers are wrong, or nothing. NaN is wrong."""
    limit = TOLERANCES.get(dtype, TOLERANCE)
    wrong = [f"{what} off by {error:.1e}" for what, error in errors.items() if not error <= limit]
    return f"wrong numbers: {', '.join(wrong)} (limit {limit:.0e})" if wrong else ""


def launches_of(task: Task) -> dict[str, Any]:
    """What one call launches, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        result = task.run()
        torch.cuda.synchronize()
    del result
    task.reset()
    on_device = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    if not on_device:
        raise RuntimeError("the profiler saw nothing on the device")
    memory = [name for name in on_device if name.startswith(("Memcpy", "Memset"))]
    names = {name[:160]: n for name, n in Counter(on_device).most_common()}
    return {"kernels": len(on_device) - len(memory), "memory": len(memory), "names": names}


def extra_bytes(task: Task, leaves: Sequence[Tensor]) -> int:
    """Bytes that the allocator has given out at the peak of one call, beyond its results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outs = task.run()
    torch.cuda.synchronize()
    results = sum(out.nbytes for out in outs) + sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    peak = torch.cuda.max_memory_allocated() - before
    del outs
    task.reset()
    return peak - results
