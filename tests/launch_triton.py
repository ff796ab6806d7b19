"""Launches the Triton kernels on a stand-in for the driver, which notes what it is told, and writes that down.

    python launch_triton.py FILE

A program of its own, since a process that interprets kernels cannot launch them. FILE gets a list of the steps in JSON;
of each how often Triton was asked for a kernel, and what reached the driver: kernel, function, grid, stream and
arguments, a tensor as its type, length and address.
"""

import json
import sys
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from bssn_kernels import backends, functional, ops
from bssn_kernels.backends import _launch, triton

STREAM = SimpleNamespace(cuda_stream=7)
noted: list[dict] = []


def seen(argument):
    if isinstance(argument, Tensor):
        return [str(argument.dtype), argument.numel(), argument.data_ptr()]
    return [seen(x) for x in argument] if isinstance(argument, tuple) else argument


class Launcher:
    def __init__(self, source, metadata) -> None:
        self.kernel = source.fn.__name__

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments) -> None:
        noted[-1]["told"] = [self.kernel, function, (x, y, z), stream, [seen(a) for a in arguments]]
        if noted[-1]["what"] == "broken":
            raise RuntimeError("Triton Error [CUDA]: out of order")


class Utilities:
    functions = 0

    def load_binary(self, *arguments):
        self.functions += 1
        return self.functions, self.functions, 0, 0, 1024

    def get_device_properties(self, device) -> dict:
        return {"max_shared_mem": 1 << 18}

    def unload_module(self, module) -> None:
        pass


class On(_launch.on):
    def __enter__(self):
        return STREAM


def stand_in() -> None:
    """The driver, and CPU tensors in the place of a device's."""
    active = SimpleNamespace(utils=Utilities(), launcher_cls=Launcher)
    active.get_current_target = lambda: GPUTarget("cuda", 80, 32)
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda device: STREAM.cuda_stream
    driver.set_active(active)
    triton.on = On
    triton.capturing = _launch.capturing = lambda stream: False
    _launch.State._upload = staticmethod(lambda table, device, stream: _launch.Addresses(table, stream, None))
    Tensor.record_stream = lambda tensor, stream: None
    triton.TritonBackend.unsupported = lambda self, specs=None: []


def main(file: str) -> None:
    stand_in()
    ask = JITFunction.run

    def asked(self, *args, **kwargs):
        noted[-1]["asked"] += 1
        return ask(self, *args, **kwargs)

    weights = [torch.randn(6, 8), torch.randn(4, 6, 3, 3)]
    plan = functional.plan_for(weights, gain=True, semantics="paper", backend="triton")
    vectors, gains = [torch.randn(n) for n in plan.sizes], [torch.ones(1) for _ in weights]

    def forward(what: str, vectors=vectors, gains=gains, dtype=None, other_plan=None):
        noted.append({"what": what, "asked": 0})
        gains = () if other_plan else gains
        outs, saved = functional.launch(weights, vectors, other_plan or plan, [1, 1], gains, dtype)
        noted[-1]["moving"] = [x.data_ptr() for x in (*outs, saved)]
        return outs, saved

    def backward(what: str, grads, saved) -> None:
        noted.append({"what": what, "asked": 0})
        found, gains = ops.normalize_backward(grads, weights, saved, plan.tables, [0, 1], "triton")
        noted[-1]["moving"] = [x.data_ptr() for x in (*grads, saved, *found, gains)]

    def store(what: str, saved, vectors=vectors, other_plan=None) -> None:
        noted.append({"what": what, "asked": 0, "moving": [saved.data_ptr()]})
        before = [x._version for x in vectors]
        ops.store(vectors, saved, other_plan or plan)
        assert all(x._version > version for x, version in zip(vectors, before))

    with patch.object(JITFunction, "run", asked):
        kept = [forward("forward") for _ in range(2)]
        for _ in range(2):
            forward("W_bar in half precision", dtype=torch.bfloat16)
        halves = [x.bfloat16() for x in vectors]
        for _ in range(2):
            other = forward("vectors in half precision", vectors=halves)
        for _ in range(2):
            forward("gains in half precision", gains=[x.bfloat16() for x in gains])
        forward("forward")
        for _, saved in kept:
            store("store", saved)
        store("no launch: vectors in half precision", other[1], halves)
        store("no launch: vectors elsewhere", kept[0][1], [x.clone() for x in vectors])
        other_plan = functional.plan_for(weights, backend="triton")
        _, saved = forward("forward of another plan", other_plan=other_plan)
        triton.capturing = lambda stream: True
        store("no launch: never stored before the capture", saved, other_plan=other_plan)
        store("store", kept[0][1])
        triton.capturing = lambda stream: False
        for outs, saved in kept:
            backward("backward", outs, saved)
        for _ in range(2):
            backward("a state out of place", outs, torch.empty(saved.numel() + 1)[1:])
        for _ in range(2):
            backward("gradients in half precision", [x.bfloat16() for x in outs], saved)
        backward("backward", outs, saved)
        noted.append({"what": "broken", "asked": 0})
        try:
            functional.launch(weights, vectors, plan, [1, 1], gains, None)
        except RuntimeError as error:
            noted[-1]["error"] = str(error)
        noted[-1]["counters"] = len(triton.counters_of._of_stream)
    with open(file, "w") as out:
        json.dump(noted, out)


if __name__ == "__main__":
    assert backends.get("triton").name == "triton" and not triton.interpreting()
    main(sys.argv[1])
