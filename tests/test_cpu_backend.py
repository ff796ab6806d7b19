"""The CPU backend's surroundings: instruction set, threads, a forked child."""

import os
import subprocess
import sys

import pytest
import torch
from zoo import Case, build, on_threads

from bssn_kernels import functional
from bssn_kernels.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="; ".join(cpu.CpuBackend().unsupported()) or "built")


class Recorder:
    """The compiled module, noting what it is called with."""

    def __init__(self) -> None:
        self.module, self.calls = cpu._load()[0], []

    def __getattr__(self, name: str):
        function = getattr(self.module, name)

        def call(*args):
            self.calls.append((name, args))
            return function(*args)

        return call


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(cpu, "_load", lambda: (made, ""))
    return made


def prepare():
    """A function that runs both kernels and nothing else of weight, and returns what they wrote."""
    layer = build(Case("conv2d_large", variant="bssn"))
    plan = functional.make_plan([layer.spec], "cpu")
    grad = torch.randn_like(layer.weight)

    def forward_and_backward() -> torch.Tensor:
        (out,) = functional.spectral_normalize([layer.weight], layer.vectors, plan).weights
        return torch.stack([out.detach(), *torch.autograd.grad(out, layer.weight, grad)])

    return forward_and_backward


@pytest.mark.parametrize("count", [1, 3])
def test_threads_are_torchs(recorder, count):
    with on_threads(count):
        prepare()()
    calls = {name: args[-1] for name, args in recorder.calls if name in ("forward", "backward")}
    assert calls == {"forward": count, "backward": count}


def test_plain_is_everywhere_and_the_best_is_the_default(monkeypatch):
    assert cpu.isas()[-1] == "plain" and len(set(cpu.isas())) == len(cpu.isas())
    monkeypatch.delenv("BSSN_CPU_ISA", raising=False)
    assert cpu.isa() == cpu.isas()[0]


@pytest.mark.parametrize("isa", cpu.isas())
def test_the_environment_chooses_the_instruction_set(recorder, monkeypatch, isa):
    monkeypatch.setenv("BSSN_CPU_ISA", isa)
    assert cpu.isa() == isa
    prepare()()
    chosen = [args[0] for name, args in recorder.calls if name in ("forward", "backward")]
    assert chosen == [cpu.isas().index(isa)] * 2


def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    monkeypatch.setenv("BSSN_CPU_ISA", "avx1024")
    with pytest.raises(RuntimeError, match=r"BSSN_CPU_ISA: expected one of \[.*'plain'\], got 'avx1024'"):
        prepare()()


FORK = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from test_cpu_backend import prepare
torch.set_num_threads(4)
forward_and_backward = prepare()
expected = forward_and_backward()
pid = os.fork()
if pid == 0:
    found = forward_and_backward()
    torch.set_num_threads(1)  # for torch's own comparison
    os._exit(0 if torch.equal(found, expected) else 3)
status = os.waitpid(pid, 0)[1]
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_neither_hangs_nor_differs():
    """Its parent's threads are gone: as in the workers of a DataLoader."""
    code = FORK.format(tests=os.path.dirname(__file__))
    found = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
