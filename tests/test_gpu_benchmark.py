"""The GPU benchmarks as far as they run without a GPU: the same code on the CPU's clock, and what decides."""

import json
import os
import stat
import subprocess
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from bssn_kernels import functional
from bssn_kernels.backends import _order, triton
from bssn_kernels.backends._schedule import ForwardSchedule
from bssn_kernels.bench import workloads
from bssn_kernels.bench.workloads import Layer, Workload
from bssn_kernels.plan import layer_rows

ROOT = Path(__file__).parents[1]
with pytest.MonkeyPatch.context() as monkey:
    monkey.syspath_prepend(ROOT)
    from benchmarks.gpu import (
        __main__ as gpu,
    )
    from benchmarks.gpu import (
        cases,
        clocks,
        correctness,
        experiments,
        groups,
        measurement,
        providers,
        report,
        speed,
        targets,
    )
MB = 10**6

LAYERS = (Layer("conv", (8, 6, 3, 3)), Layer("deconv", (3, 5, 4, 4)), Layer("linear", (10, 7)))
ALL = ("parametrization", "hook", "foreach", "cpu", "reference")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)  # where a child finds the code
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", Workload("tiny", LAYERS))
    monkeypatch.setitem(workloads.WORKLOADS, "gained", Workload("gained", LAYERS[:2], learnable_gain=True))


def run(tmp_path, *options: str) -> tuple[int, list[dict]]:
    file = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--repeats", "3", "--backend", "cpu", "reference", "--json", str(file), *options]
    code = gpu.main(arguments)
    return code, json.loads(file.read_text())["cases"]


def by_label(case: dict) -> dict[str, dict]:
    return {f"{row['provider']} {row['variant']}".strip(): row for row in case["rows"]}


@pytest.mark.parametrize("options", [[], ["--channels-last"], ["--dtype", "bfloat16"]], ids=" ".join)
def test_every_provider_is_right_and_timed(tmp_path, capsys, options):
    code, (case,) = run(tmp_path, "--workload", "tiny", *options)
    printed = capsys.readouterr().out
    assert code == 0
    assert (case["layers"], case["bytes"]) == (3, (432 + 240 + 70) * (2 if options[:1] == ["--dtype"] else 4))
    rows = by_label(case)
    expected = {*(f"{p} sn" for p in ALL), *(f"{p} bssn" for p in ALL[2:]), "copy", "three_stream", "floor"}
    assert set(rows) == expected
    for label, row in rows.items():
        assert not row["refused"] and not row["notes"]
        kinds = {"copy": {"forward"}, "floor": {"forward"}, "three_stream": {"backward"}}
        assert set(row["times"]) == kinds.get(label, {"forward", "both", "backward"})
        for clocks in row["times"].values():
            for clock in ("wall", "host", "device"):
                times = clocks[clock]
                assert len(times["samples"]) == 3 and 0 < times["p10"] <= times["median"] <= times["p90"]
        if row["variant"]:
            assert {"forward_over_copy", "share_forward", "native_over_both"} <= set(row["ratios"])
            assert max(row["errors"].values()) < (5e-2 if "bfloat16" in options else 1e-5)
        assert label in printed or row["variant"].upper() in printed
    assert "sigma" in rows["cpu bssn"]["errors"] and rows["parametrization sn"]["ratios"]["native_over_both"] == 1
    assert "nothing failed" in printed


def test_what_the_file_says_of_its_origin(tmp_path):
    file = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--workload", "tiny", "--repeats", "1", "--provider", "hook", "--json", str(file)])
    content = json.loads(file.read_text())
    assert content["format"] == gpu.FORMAT and content["settings"]["workload"] == ["tiny"]
    assert {"torch", "triton", "commit", "cpu", "time"} <= set(content["machine"])
    assert not list(tmp_path.glob("*.part"))


def test_learnable_gains_are_compared_too(tmp_path):
    code, (case,) = run(tmp_path, "--workload", "gained")
    rows = by_label(case)
    assert code == 0 and rows["cpu sn"]["errors"]["gain"] < 1e-5 and "gain" not in rows["hook sn"]["errors"]


def bent(root, which: str):
    """Results, or gradients, off by a thousandth."""
    usual = root.forward

    def forward():
        outs = [out * (1.001 if which == "weight" else 1) for out in usual()]
        for out in outs:
            if which == "grad" and out.requires_grad:
                out.register_hook(lambda grad: 1.001 * grad)
        return outs

    root.forward = forward
    return root


def with_planted(monkeypatch, *planted: providers.Provider) -> None:
    usual = measurement.providers_of
    monkeypatch.setattr(measurement, "providers_of", lambda *args: [*planted, *usual(*args)])


@pytest.mark.parametrize("which", ["weight", "grad"])
def test_wrong_numbers_are_not_timed(tmp_path, monkeypatch, capsys, which):
    def make(sources, variant):
        return providers.Runner.of(bent(sources.subject.copy(), which), sources.grads)

    with_planted(monkeypatch, providers.Provider("planted", ("sn",), make))
    code, (case,) = run(tmp_path, "--workload", "tiny", "--provider", "planted", "hook")
    rows = by_label(case)
    assert code == 1
    assert rows["planted sn"]["refused"].startswith(f"wrong numbers: {which} off by")
    assert rows["planted sn"]["times"] == {} and rows["hook sn"]["times"]
    assert "tiny, float32, contiguous: planted sn: wrong numbers" in capsys.readouterr().out


def test_one_that_fails_leaves_the_others(tmp_path, monkeypatch):
    calls = []

    def make(sources, variant):
        raise RuntimeError("no such\nkernel")

    def make_late(sources, variant):
        root = sources.subject.copy()
        forward = root.forward
        root.forward = lambda: calls.append(1) or (forward() if len(calls) < 12 else make(sources, variant))
        return providers.Runner.of(root, sources.grads)

    with_planted(
        monkeypatch, providers.Provider("early", ("sn",), make), providers.Provider("late", ("sn",), make_late)
    )
    code, (case,) = run(tmp_path, "--workload", "tiny", "--provider", "early", "late", "hook")
    rows = by_label(case)
    assert code == 1
    assert rows["early sn"]["refused"] == "failed: RuntimeError: no such kernel"
    assert rows["late sn"]["refused"].endswith("failed: RuntimeError: no such kernel")
    assert not rows["hook sn"]["refused"] and rows["hook sn"]["times"]


def test_a_lost_device_ends_the_case_and_names_who_did_it(tmp_path, monkeypatch):
    def make(sources, variant):
        monkeypatch.setattr(measurement, "alive", lambda device: False)
        raise RuntimeError("an illegal memory access was encountered")

    with_planted(monkeypatch, providers.Provider("planted", ("sn",), make))
    code, (case,) = run(tmp_path, "--workload", "tiny")
    assert code == 1 and case["at"] == "planted sn" and "device was lost" in case["failed"]


def timed(provider: str, variant: str = "", both: float = 1.0, forward: float = 0.5, **more) -> cases.Row:
    row = cases.Row(provider, variant, **more)
    for what, seconds in (("forward", forward), ("both", both), ("backward", both - forward)):
        row.times[what] = clocks.Times([seconds] * 3, [seconds] * 3, [seconds] * 3)
    return row


def verdicts(row: cases.Row, others: list[cases.Row], workload: str, nbytes: int = 350 * MB, **more) -> dict[str, bool]:
    rows = [*others, row]
    row.ratios = targets.ratios_of(row, rows)
    return {t["target"]: t["met"] for t in targets.targets_of(row, rows, workload, nbytes, **more)}


def test_targets_of_device_time():
    streams = [timed("copy", forward=0.1), timed("three_stream", forward=0, both=0.15)]

    def judged(workload, forward, backward, backend="triton", nbytes=350 * MB, **more):
        row = timed(backend, "sn", forward=forward, both=forward + backward, backend=backend)
        found = verdicts(row, streams, workload, nbytes, **more)
        return found.get("forward / copy"), found.get("backward / three-stream")

    assert judged("biggan128", 0.149, 0.19) == (True, True)
    assert judged("biggan128", 0.151, 0.2) == (False, False)
    assert judged("vit_b", 0.126, 0.19) == (False, True)
    assert judged("biggan256", 0.13, 0.19) == (None, True)
    assert judged("biggan128", 0.125, 0.185, "cuda") == (True, False)
    assert judged("biggan128", 0.125, 0.175, "cuda", fits_l2=True) == (False, True)
    assert judged("biggan128", 0.125, 0.175, nbytes=99 * MB) == (None, None)
    assert judged("biggan128", 0.125, 0.175, "reference") == (None, None)


def test_targets_of_counts_memory_and_errors():
    row = timed("triton", "bssn", backend="triton", errors={"weight": 1e-6, "grad": 2e-5, "sigma": float("nan")})
    row.launches = {"forward": {"kernels": 1, "memory": 1}, "backward": {"kernels": 2, "memory": 0}}
    row.extra = {"forward": 8 * MB, "both": 9 * MB}
    floor = timed("floor", forward=0.4)
    small = verdicts(row, [floor], "dcgan_g", nbytes=10 * MB)
    assert small == {
        "launches, forward": True,
        "launches, backward": False,
        "host time / floor": True,
        "extra memory, forward, MB": True,
        "extra memory, forward + backward, MB": False,
        "error, weight": True,
        "error, grad": False,
        "error, sigma": False,
    }
    large = verdicts(row, [floor], "stylegan_t", nbytes=500 * MB, exact=False)
    assert large["extra memory, forward + backward, MB"] and "error, grad" not in large


def test_targets_against_torch():
    natives = [
        timed("parametrization", "sn", both=1.0),
        timed("hook graph", "sn", both=0.3, graph=True),
        timed("foreach", "sn", both=0.01),
        timed("hook default", "sn", both=0.25, compiled=True),
    ]
    eager, graph = (
        timed("triton", "bssn", both=0.11, backend="triton"),
        timed("triton graph", "bssn", both=0.04, backend="triton", graph=True),
    )
    found = verdicts(eager, natives, "sngan32")
    assert (found["eager parametrization / ours"], found["best of native graph and compile / ours"]) == (False, True)
    found = verdicts(graph, natives, "sngan32")
    assert "eager parametrization / ours" not in found and not found["native graph / our graph"]
    assert "best of native graph and compile / ours" not in verdicts(eager, natives[:2], "sngan32")
    natives[0].refused = "failed"
    assert "eager parametrization / ours" not in verdicts(eager, natives, "sngan32")
    assert not {"eager parametrization / ours", "native graph / our graph"} & set(verdicts(graph, natives, "vit_b"))


def test_refused_rows_have_no_targets():
    row = timed("triton", "sn", backend="triton", refused="wrong numbers", errors={"weight": 1.0})
    assert verdicts(row, [], "biggan128") == {}


def test_bytes_that_the_plan_counts():
    group = groups.Group(TestExperiments.SETTING, "tiny", "sn")
    counted = speed.counted_bytes(group.plan)
    # Two products, the scale pass and the output; the gradient twice, the weight, and its gradient.
    assert sum(counted["forward"].values()) == 4 * group.nbytes == sum(counted["backward"].values())
    assert counted["forward"]["written"] == group.nbytes


class TestSupervision:
    """Cases in processes of their own."""

    def options(self, *more: str):
        return gpu.parse(["--device", "cpu", "--repeats", "1", *more])

    def test_a_case_is_run_again_without_who_broke_it(self):
        asked = []

        def child(case, args, without, seconds):
            asked.append((case.workload, list(without)))
            record = {"case": asdict(case), "rows": []}
            if case.workload == "vit_b" and len(without) < 2:
                return record | {"failed": "exit status 1", "at": ("triton sn", "triton graph bssn")[len(without)]}
            if case.workload == "dcgan_g":
                return record | {"failed": "stopped after 150 s", "at": "rounds"}
            return record | {"rows": [timed("hook", "sn").record()]}

        given = [cases.Case(name) for name in ("vit_b", "dcgan_g", "sngan32")]
        kept = []
        records = gpu.supervise(given, self.options(), lambda records: kept.append(len(records)), child)
        assert asked[:3] == [("vit_b", []), ("vit_b", ["triton sn"]), ("vit_b", ["triton sn", "triton graph bssn"])]
        assert [name for name, _ in asked[3:]] == ["dcgan_g", "sngan32"] and kept == [1, 2, 3]
        refused = [(r["provider"], r["variant"], r["refused"]) for r in records[0]["rows"] if r["refused"]]
        assert refused == [("triton", "sn", "exit status 1"), ("triton graph", "bssn", "exit status 1")]
        assert not records[0].get("failed") and records[1]["failed"] and len(records[2]["rows"]) == 1
        text, well = report.summary(records)
        assert not well and text.count("exit status 1") == 2 and "stopped after 150 s" in text

    def test_no_case_begins_without_time(self):
        records = gpu.supervise([cases.Case("vit_b")], self.options("--deadline", "1"), lambda records: None, None)
        assert records[0]["failed"] == "no time was left"

    def test_a_real_child(self):
        options = self.options("--provider", "cpu", "--variant", "sn", "--backend", "cpu")
        record = gpu.run_child(cases.Case("sngan32"), options, [], 120)
        assert "failed" not in record and set(by_label(record)) == {"copy", "three_stream", "floor", "cpu sn"}
        record = gpu.run_child(cases.Case("sngan32"), options, [], 0.3)
        assert record["failed"].startswith("nothing was written (stopped after")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", [gpu, experiments], ids=["gpu", "experiments"])
def test_without_a_gpu(module, capsys):
    assert module.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


class TestExperiments:
    SETTING = groups.Setting(
        torch.device("cpu"), "cpu", samples=2, forwards=20, numel=1000, workloads=("tiny",), headline="tiny",
        stable=("tiny",), counts=(1, 3), stages=(1, 2, 3), programs=(3, 4), lags=(2, 6), budgets=(24,),
    )  # fmt: skip

    def run(self, tmp_path, *options: str) -> tuple[int, dict[str, dict]]:
        file = tmp_path / "experiments.json"
        code = experiments.main(["--device", "cpu", "--json", str(file), *options], self.SETTING)
        return code, {record["experiment"]: record for record in json.loads(file.read_text())["experiments"]}

    def test_list(self, capsys):
        assert experiments.main(["--list"]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(experiments.EXPERIMENTS)
        with pytest.raises(SystemExit):
            experiments.main(["nonsense"])

    def test_all(self, tmp_path, capsys):
        before = dict(triton.AMPERE), (_order.LAG, _order.BUDGET)
        code, found = self.run(tmp_path)
        assert code == 0 and list(found) == list(experiments.EXPERIMENTS)
        counts = {"small": 3, "bandwidth": 4, "whole": 4, "stability": 1, "settings": 12, "schedule": 4, "host": 8}
        assert {name: len(record["rows"]) for name, record in found.items()} == counts
        for name in ("settings", "schedule"):
            assert sum(row["usual"] for row in found[name]["rows"]) == 2
            assert all(row["same bits"] and row["forward ms"] > 0 for row in found[name]["rows"])
        assert before == (dict(triton.AMPERE), (_order.LAG, _order.BUDGET))
        assert "summary" in capsys.readouterr().out

    def test_settings_reach_the_schedule(self):
        """The numbers that the experiment changes are those with which a schedule is made."""
        weights = [torch.empty(layer.shape, device="meta") for layer in workloads.WORKLOADS["biggan128"].layers]
        rows = layer_rows(functional.plan_for(weights, backend="reference").tables[0])

        def tiles(lag: int, budget: int) -> list:
            with patch.multiple(_order, LAG=lag << 20, BUDGET=budget << 20):
                return ForwardSchedule(rows, [1] * len(rows), 4).tiles.tolist()

        usual = tiles(6, 24)
        assert tiles(2, 24) != usual and tiles(6, 32) != usual and tiles(6, 24) == usual

    def test_other_bits_are_a_failure(self, tmp_path, monkeypatch):
        monkeypatch.setattr(correctness.Watch, "call", lambda self: [torch.randn(3)])
        code, found = self.run(tmp_path, "stability")
        assert code == 1 and found["stability"]["rows"][0]["failed"] == "20 of the calls gave other bits"

    def test_one_that_fails_leaves_the_others(self, tmp_path, monkeypatch, capsys):
        def breaks(setting):
            """Breaks after a row."""
            yield {"what": "first", "ms": 1.0}
            raise RuntimeError("out of memory")

        def half(setting):
            """One row of two fails."""
            for limit in (1, 0):
                yield {"limit": limit} | groups.attempt(lambda: {"ms": 1.0 / limit})  # noqa: B023

        monkeypatch.setattr(experiments, "EXPERIMENTS", {"breaks": (breaks, 9), "half": (half, 9)})
        code, found = self.run(tmp_path)
        assert code == 1
        assert found["breaks"]["failed"] == "failed: RuntimeError: out of memory" and len(found["breaks"]["rows"]) == 1
        assert "ZeroDivisionError" in found["half"]["rows"][1]["failed"] and found["half"]["rows"][0]["ms"] == 1
        printed = capsys.readouterr().out
        assert "out of memory" in printed and "1 failed, the first: failed: ZeroDivisionError" in printed


FAKE_PYTHON = r"""#!/bin/bash
case "$*" in
  -) grep -q get_device_name && echo h999 ;;
  -\ pytest*) echo numpy ;;
  -\ hypothesis) echo hypothesis ;;
  -m\ pip*) echo building; exit 1 ;;
  -m\ pytest*) echo "pytest $*, strict $BSSN_STRICT" ;;
  -m\ benchmarks.gpu\ *) echo table; echo summary; echo "  all measured"; exit 1 ;;
  -m\ benchmarks.gpu.experiments*) echo summary; echo "  experiments ok" ;;
esac
"""


class TestScript:
    SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"

    @pytest.fixture
    def home(self, tmp_path):
        fake = tmp_path / "bin" / "python3"
        fake.parent.mkdir()
        fake.write_text(FAKE_PYTHON)
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
        return tmp_path

    def call(self, home: Path, *stages: str) -> subprocess.CompletedProcess:
        path = f"{home / 'bin'}:/usr/bin:/bin"
        environment = {**os.environ, "PATH": path, "OUT": str(home / "out"), "CUDA_HOME": str(home)}
        return subprocess.run(["bash", self.SCRIPT, *stages], capture_output=True, text=True, env=environment)

    def test_syntax(self):
        assert subprocess.run(["bash", "-n", self.SCRIPT]).returncode == 0
        assert os.access(self.SCRIPT, os.X_OK)

    def test_stages_go_on_after_a_failure(self, home):
        ended = self.call(home)
        assert ended.returncode == 1
        summary = ended.stdout[ended.stdout.index("stages on h999") :].splitlines()
        found = {line[13:47].strip(): line[48:66].strip() for line in summary[1:]}
        assert found["build"] == "FAILED (1)" and found["missing: numpy"] == "FAILED"
        assert found["random groups"] == "left out"
        assert found["pytest -m device"] == found["small groups alone"] == found["all"] == "ok"
        assert found["all cases"] == "FAILED (1)"
        assert "bench summary\n  all measured" in ended.stdout and "experiments summary\n  exp" in ended.stdout
        assert "strict 1" in (home / "out" / "gpu_h999_tests.txt").read_text()
        assert (home / "out" / "gpu_h999_check.txt").read_text().splitlines() == summary

    def test_one_stage(self, home):
        ended = self.call(home, "experiments")
        assert ended.returncode == 0 and len(ended.stdout[ended.stdout.index("stages on") :].splitlines()) == 2

    def test_unknown_stage(self, home):
        ended = self.call(home, "nonsense")
        assert ended.returncode == 2 and "expected stages of" in ended.stderr
