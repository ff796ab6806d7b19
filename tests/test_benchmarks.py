"""The benchmark suite on small sets; its GPU paths on the CPU's clock or on fakes."""

import json
import os
import stat
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from bssn_kernels import algebra, backends, bench, functional, ops
from bssn_kernels.backends import _order
from bssn_kernels.backends._schedule import ForwardSchedule
from bssn_kernels.backends._triton_settings import AMPERE
from bssn_kernels.bench import measure as measuring
from bssn_kernels.bench import workloads
from bssn_kernels.bench.providers import PLAIN_LAYERS, Provider, tasks_of
from bssn_kernels.bench.session import Measured, Row
from bssn_kernels.bench.workloads import Layer, Workload
from bssn_kernels.plan import layer_rows
from bssn_kernels.variants import resolve_semantics

ROOT = Path(__file__).parents[1]
with pytest.MonkeyPatch.context() as monkey:
    monkey.syspath_prepend(ROOT)
    import benchmarks.experiments.__main__ as experiments
    from benchmarks import (
        authors,
        breakdown,
        compare,
        measure,
        models,
        providers,
        report,
        results,
        run,
        scaling,
        steps,
        targets,
    )
    from benchmarks import verify as refusing
    from benchmarks.experiments import correctness, groups, speed
    from benchmarks.workloads import CPU_CASES, GPU_CASES, Case
MB = 10**6
CPU = torch.device("cpu")

LAYERS = (Layer("conv", (8, 6, 3, 3)), Layer("deconv", (3, 5, 4, 4)), Layer("linear", (10, 7)))
ALL = ("parametrization", "hook", "foreach", "authors", "cpu", "reference")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)  # where a child finds the code
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", Workload("tiny", LAYERS))
    monkeypatch.setitem(workloads.WORKLOADS, "gained", Workload("gained", LAYERS[:2], learnable_gain=True))
    # tests/test_bench.py has them.
    monkeypatch.setattr(run, "warm_up", lambda *args: None)
    monkeypatch.setattr(measure, "meter_of", lambda device: None)


def measured(tmp_path, *options: str) -> tuple[int, list[dict]]:
    """Exit code and records of a run on the CPU."""
    file = tmp_path / "out.jsonl"
    usual = ["--repeats", "3", "--backend", "cpu", "reference"]
    part = () if options[0] in ("scaling", "breakdown") else ("tables",)
    code = run.main([*part, *options, *usual, "--json", str(file)])
    return code, report.load(file)[1]


def by_label(record: dict) -> dict[str, dict]:
    return {report.label_of(row): row for row in record["rows"]}


@pytest.mark.parametrize("options", [["--alone"], ["--channels-last"], ["--dtype", "bfloat16"]], ids=" ".join)
def test_every_provider_is_right_and_timed(tmp_path, capsys, options):
    code, (case,) = measured(tmp_path, "--workload", "tiny", *options)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert (case["layers"], case["bytes"]) == (3, (432 + 240 + 70) * (2 if options[:1] == ["--dtype"] else 4))
    rows = by_label(case)
    left_out = {label for label, row in rows.items() if row.get("left_out")}
    bounds = {"copy": {"forward"}, "clone": {"forward"}, "floor": {"forward"}, "three_stream": {"backward"}}
    rough = {"authors sn", "authors bssn"} if "bfloat16" in options else set()
    assert set(rows) - left_out == {*(f"{p} sn" for p in ALL), *(f"{p} bssn" for p in ALL[2:]), *bounds} - rough
    ways = ("graph", "default", "reduce-overhead")
    assert left_out == {f"{form} {way} sn" for form in ALL[:2] for way in ways} | rough
    for label in set(rows) - left_out:
        row = rows[label]
        assert not row.get("refused") and not row.get("notes")
        expected = {"forward", "both"} | ({"backward"} if options == ["--alone"] else set())
        assert set(row["times"]) == bounds.get(label, expected)
        for clocks in row["times"].values():
            times = clocks["wall"]
            assert len(times["samples"]) == 3 and 0 < times["p10"] <= times["median"] <= times["p90"]
        if label not in bounds:
            names = {"forward_over_copy", "forward_over_clone", "share_forward", "share_backward", "native_over_both"}
            assert names <= set(row["ratios"])
            limit = 5e-2 if "bfloat16" in options else 1e-5
            assert max(error for error, layer in row["errors"].values()) < limit
        assert row["provider"] in printed
    assert "sigma" in rows["cpu bssn"]["errors"] and rows["parametrization sn"]["ratios"]["native_over_both"] == 1
    copy_s = rows["copy"]["times"]["forward"]["wall"]["median"]
    assert rows["hook sn"]["must_move"] == {"forward": 2 * case["bytes"], "backward": 3 * case["bytes"]}
    assert ", 3 rounds, copy at " in printed
    assert case["copy_bandwidth"] == pytest.approx(2 * case["bytes"] / copy_s)
    assert "nothing failed" in printed and "left out: hook graph: CUDA graphs need a CUDA device" in printed


def test_every_backend_of_the_registry_takes_part_or_says_why(monkeypatch):
    def by_name(device: str, **more) -> dict[str, Provider]:
        return {p.name: p for p in providers.providers_of(torch.device(device), Case("tiny", **more))}

    on_cpu = by_name("cpu")
    assert set(backends.names()) <= set(on_cpu)
    for name in backends.names():
        assert bool(on_cpu[name].left_out) == (name not in backends.natural("cpu"))
    assert "need a CUDA device" in by_name("cpu", compiled=True)["hook reduce-overhead"].left_out
    assert "minutes" in on_cpu["hook default"].left_out
    monkeypatch.setattr(backends, "natural", lambda device: ["cuda", "reference"])
    monkeypatch.setattr(backends, "names", lambda: ["cuda", "cpu", "reference"])
    on_gpu = by_name("cuda")
    assert not on_gpu["cuda graph"].left_out and on_gpu["cuda graph"].graph and "reference graph" not in on_gpu
    assert on_gpu["cuda"].backend == "cuda" and not on_gpu["hook graph"].left_out
    assert "made for cpu" in on_gpu["cpu"].left_out and on_gpu["cpu graph"].left_out
    assert set(by_name("cpu", autocast=True)) >= {"hook", "cuda"} and "hook graph" not in by_name("cpu", autocast=True)


def test_without_a_compiler_torch_compile_says_so(monkeypatch):
    monkeypatch.setattr(providers.shutil, "which", lambda name: None)
    assert "C++ compiler" in providers.why_not_compiled(CPU, "default", Case("tiny", compiled=True))


@pytest.mark.slow
def test_torch_compile_takes_part(tmp_path):
    asked = ["--workload", "tiny", "--compiled", "--variant", "sn", "--provider", "hook default", "hook"]
    code, (case,) = measured(tmp_path, *asked)
    row = by_label(case)["hook default sn"]
    assert code == 0 and row["compiled"] and row["times"]["both"]["wall"]["median"] > 0


def test_autocast(tmp_path):
    code, (case,) = measured(tmp_path, "--workload", "tiny", "--autocast", "--provider", "cpu", "hook")
    rows = by_label(case)
    assert not rows["cpu bssn"].get("refused") and rows["cpu bssn"]["times"]
    assert not any(t["target"].startswith("error") for t in rows["cpu bssn"].get("targets", ()))


def test_what_the_file_says_of_its_origin(tmp_path):
    measured(tmp_path, "--workload", "tiny", "--repeats", "1", "--provider", "hook")
    first, *records = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["kind"] == "run" and first["format"] == run.FORMAT and first["settings"]["workload"] == ["tiny"]
    assert {"torch", "triton", "commit", "cpu", "time"} <= set(first["machine"])
    assert [record["kind"] for record in records] == ["case"] and not list(tmp_path.glob("*.part"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text("[]")
    with pytest.raises(ValueError, match="JSON lines"):
        report.load(bad)


def test_unknown_providers(capsys):
    """They would leave a table without the row that was asked for."""
    assert run.main(["tables", "--workload", "tiny", "--provider", "hook", "cudda"]) == 2
    said = capsys.readouterr().err
    assert "expected some of parametrization, hook, foreach, " in said and said.strip().endswith("got cudda")


def test_learnable_gains_are_compared_too(tmp_path):
    code, (case,) = measured(tmp_path, "--workload", "gained")
    rows = by_label(case)
    assert code == 0 and rows["cpu sn"]["errors"]["gain"][0] < 1e-5 and "gain" not in rows["hook sn"]["errors"]


def with_planted(monkeypatch, *planted: Provider) -> None:
    usual = measure.providers_of
    monkeypatch.setattr(measure, "providers_of", lambda *args: [*planted, *usual(*args)])


@pytest.mark.parametrize("which", ["weight", "grad"])
def test_wrong_numbers_are_not_timed(tmp_path, monkeypatch, capsys, which):
    def tasks(root, grads):
        return refusing.bent_tasks(root, grads, which)

    with_planted(monkeypatch, Provider("planted", ("sn",), lambda subject, variant: subject.copy(), tasks))
    code, (case,) = measured(tmp_path, "--workload", "tiny", "--provider", "planted", "hook")
    rows = by_label(case)
    assert code == 1
    said = {"weight": "normalized weight of", "grad": "gradient of"}[which]
    assert rows["planted sn"]["refused"].startswith(f"wrong numbers: {said} ")
    assert rows["planted sn"]["times"] == {} and rows["hook sn"]["times"]
    assert "tiny: planted sn: wrong numbers" in capsys.readouterr().out


def test_a_blind_comparison_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(refusing, "BENT", 1.0)
    assert run.main(["tables", "--workload", "tiny"]) == 2
    assert "a weight provider was not refused" in capsys.readouterr().err


def test_one_that_fails_leaves_the_others(tmp_path, monkeypatch):
    calls = []

    def make(subject, variant):
        raise RuntimeError("no such\nkernel")

    def late_tasks(root, grads):
        return tasks_of(root, grads, lambda: calls.append(1) or (root() if len(calls) < 8 else make(root, "")))

    late = Provider("late", ("sn",), lambda subject, variant: subject.copy(), late_tasks)
    with_planted(monkeypatch, Provider("early", ("sn",), make), late)
    code, (case,) = measured(tmp_path, "--workload", "tiny", "--provider", "early", "late", "hook")
    rows = by_label(case)
    assert code == 1
    assert rows["early sn"]["refused"] == "failed: RuntimeError: no such kernel"
    assert rows["late sn"]["refused"].endswith("failed: RuntimeError: no such kernel")
    assert "refused" not in rows["hook sn"] and rows["hook sn"]["times"]


def test_a_lost_device_ends_the_case_and_names_who_did_it(tmp_path, monkeypatch):
    def make(subject, variant):
        monkeypatch.setattr(measure, "alive", lambda device: False)
        raise RuntimeError("an illegal memory access was encountered")

    with_planted(monkeypatch, Provider("planted", ("sn",), make))
    code, (case,) = measured(tmp_path, "--workload", "tiny")
    assert code == 1 and case["at"] == "planted sn" and "device was lost" in case["failed"]


def test_what_only_describes_a_row_is_noted_where_it_fails(monkeypatch):
    """The path of a GPU, as far as fakes go: launches and memory of warm tasks."""
    bench = measure.Bench(Case("tiny").subject(CPU))
    bench.cuda, bench.meter = True, type("Meter", (), {"FIRST_CALLS": False, "measure": lambda self, tasks: 1 / 0})()
    monkeypatch.setattr(measure, "launches_of", lambda task: {"kernels": 1, "memory": 0, "names": {}})
    bench.add(bench_provider("cpu"), "sn")
    (row,) = bench.rows
    assert row.notes == ["memory: failed: ZeroDivisionError: division by zero"] and not row.refused
    assert {what: of["kernels"] for what, of in row.launches.items()} == {"forward": 1, "both": 1}


def bench_provider(name: str) -> Provider:
    return next(p for p in providers.providers_of(CPU, Case("tiny")) if p.name == name)


class FakeCuda:
    """torch.cuda with events that a host of ours drives: a call takes the device ``seconds``, after the spinning."""

    def __init__(self, seconds: float, cycles_needed: int) -> None:
        self.seconds, self.needed, self.slept, self.now = seconds, cycles_needed, [], 0.0
        self.synchronize = lambda: None
        self.Event = lambda enable_timing: self._event()

    def _sleep(self, cycles: int) -> None:
        self.slept.append(cycles)

    def _event(fake):
        class Event:
            def record(self):
                self.at = fake.now

            def query(self):
                return fake.slept[-1] < fake.needed

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        return Event()


def test_the_device_is_held_until_the_host_is_ahead(monkeypatch):
    fake = FakeCuda(0.25, 5_000_000)
    monkeypatch.setattr(measuring.torch, "cuda", fake)
    clock = measuring.CudaClock(CPU, cold=False)

    def run_one():
        fake.now += fake.seconds

    task = measuring.Task(run_one)
    reading = clock.sample(task)
    assert (reading.wall, reading.device, reading.ahead) == (0.25, 0.25, True)
    assert fake.slept == [400_000, 1_600_000, 6_400_000]
    clock.sample(task)
    assert fake.slept[3:] == [6_400_000]
    fake.needed = 10**12
    assert not clock.sample(task).ahead
    times = measuring.interleaved({"a": task}, clock=clock, repeats=2)["a"]
    assert times.behind == 2 and times.device.median == 0.25


def timed(provider: str, variant: str = "", both: float = 1.0, forward: float = 0.5, **more) -> Row:
    row = Row(provider, variant, **more)
    for what, seconds in (("forward", forward), ("both", both), ("backward", both - forward)):
        row.times[what] = measuring.Times(*[measuring.Samples([seconds] * 3)] * 3)
    return row


def verdicts(
    row: Row, others: list[Row], workload: str, nbytes: int = 350 * MB, device: str = "cuda", **more
) -> dict[str, bool]:
    all_rows = Measured(workload, 1, nbytes, [*others, row])
    row.ratios = targets.ratios_of(row, all_rows, device)
    return {t["target"]: t["met"] for t in targets.targets_of(row, all_rows, device, **more)}


def test_targets_of_a_cpu():
    others = [timed("parametrization", "sn", forward=0.3, both=1.0), timed("clone", forward=0.1)]

    def judged(forward: float, both: float, nbytes: int) -> dict[str, bool]:
        return verdicts(timed("cpu", "bssn", both, forward, backend="cpu"), others, "vit_b", nbytes, "cpu")

    assert judged(0.09, 0.19, 350 * MB) == {
        "native / forward": True, "native / (forward + backward)": True, "forward / clone": True
    }  # fmt: skip
    assert judged(0.16, 0.22, 350 * MB) == {
        "native / forward": False, "native / (forward + backward)": False, "forward / clone": False
    }  # fmt: skip
    assert judged(0.16, 0.22, 99 * MB) == {"native / forward": False, "native / (forward + backward)": True}


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
    errors = {"weight": (1e-6, "0"), "grad": (2e-5, "0"), "sigma": (float("nan"), "0")}
    row = timed("triton", "bssn", backend="triton", errors=errors)
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
    natives[0].times.clear()
    assert "eager parametrization / ours" not in verdicts(eager, natives, "sngan32")
    assert not {"eager parametrization / ours", "native graph / our graph"} & set(verdicts(graph, natives, "vit_b"))


def test_refused_rows_have_no_targets():
    row = Row("triton", "sn", backend="triton", refused="wrong numbers", errors={"weight": (1.0, "0")})
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
        return run.parse(["tables", "--repeats", "1", *more])

    def supervise(self, cases, child, seconds: float = 1000.0) -> list[dict]:
        records: list[dict] = []
        run.supervise(cases, self.options(), time.monotonic() + seconds, records.append, child)
        return records

    def test_a_case_is_run_again_without_who_broke_it(self):
        asked = []

        def child(case, args, without, seconds):
            asked.append((case.workload, list(without)))
            record = {"kind": "case", "case": asdict(case), "rows": []}
            if case.workload == "vit_b" and len(without) < 2:
                return record | {"failed": "exit status 1", "at": ("triton sn", "triton graph bssn")[len(without)]}
            if case.workload == "dcgan_g":
                return record | {"failed": "stopped after 150 s", "at": "rounds"}
            return record | {"rows": [timed("hook", "sn").record()]}

        records = self.supervise([Case(name) for name in ("vit_b", "dcgan_g", "sngan32")], child)
        assert asked[:3] == [("vit_b", []), ("vit_b", ["triton sn"]), ("vit_b", ["triton sn", "triton graph bssn"])]
        assert [name for name, _ in asked[3:]] == ["dcgan_g", "sngan32"] and len(records) == 3
        refused = [(r["provider"], r["variant"], r["refused"]) for r in records[0]["rows"] if "refused" in r]
        assert refused == [("triton", "sn", "exit status 1"), ("triton graph", "bssn", "exit status 1")]
        assert not records[0].get("failed") and records[1]["failed"] and len(records[2]["rows"]) == 1
        text, well = report.summary(records)
        assert not well and text.count("exit status 1") == 2 and "stopped after 150 s" in text

    def test_no_case_begins_without_time(self):
        (record,) = self.supervise([Case("vit_b")], None, seconds=1)
        assert record["failed"] == "no time was left"

    def test_a_real_child(self):
        options = self.options("--provider", "cpu", "--variant", "sn", "--backend", "cpu")
        record = run.run_child(Case("sngan32"), options, [], 120)
        assert "failed" not in record and set(by_label(record)) == {"copy", "clone", "three_stream", "floor", "cpu sn"}
        record = run.run_child(Case("sngan32"), options, [], 0.3)
        assert record["failed"].startswith("nothing was written (stopped after")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", [run, experiments], ids=["run", "experiments"])
def test_without_a_gpu(module, capsys):
    assert module.main(["--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


class TestExperiments:
    SETTING = groups.Setting(
        torch.device("cpu"), "cpu", samples=2, forwards=20, numel=1000, workloads=("tiny",), headline="tiny",
        stable=("tiny",), counts=(1, 3), stages=(2, 3, 4), programs=(3, 4), sums=(7, 15), shares=(_order.L2_SHARE,),
    )  # fmt: skip

    def run(self, tmp_path, *options: str) -> tuple[int, dict[str, dict]]:
        file = tmp_path / "experiments.jsonl"
        code = experiments.main(["--device", "cpu", "--json", str(file), *options], self.SETTING)
        return code, {record["experiment"]: record for record in report.load(file)[1]}

    def test_list(self, capsys):
        assert experiments.main(["--list"]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(experiments.EXPERIMENTS)
        with pytest.raises(SystemExit):
            experiments.main(["nonsense"])

    def test_all(self, tmp_path, capsys):
        before = dict(AMPERE), (_order.SUM_US, _order.L2_SHARE)
        code, found = self.run(tmp_path)
        assert code == 0 and list(found) == list(experiments.EXPERIMENTS)
        counts = {"small": 3, "bandwidth": 4, "whole": 4, "rows": 4, "stability": 1}
        counts |= {"settings": 12, "schedule": 4, "host": 8}
        assert {name: len(record["rows"]) for name, record in found.items()} == counts
        for name in ("settings", "schedule"):
            assert sum(row["usual"] for row in found[name]["rows"]) == 2
            assert all(row["same bits"] and row["forward ms"] > 0 for row in found[name]["rows"])
        assert before == (dict(AMPERE), (_order.SUM_US, _order.L2_SHARE))
        assert "summary" in capsys.readouterr().out

    def test_settings_reach_the_schedule(self):
        """The numbers that the experiment changes are those with which a schedule is made."""
        weights = [torch.empty(layer.shape, device="meta") for layer in workloads.WORKLOADS["vit_b"].layers]
        rows = layer_rows(functional.plan_for(weights, backend="reference").tables[0])

        def tiles(sums: float, share: float) -> list:
            with patch.multiple(_order, SUM_US=sums, L2_SHARE=share):
                return ForwardSchedule(rows, [1] * len(rows), 4).tiles.tolist()

        usual = tiles(7.0, 2 / 3)
        assert tiles(15.0, 2 / 3) != usual and tiles(7.0, 0.03) != usual and tiles(7.0, 2 / 3) == usual

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
  -m\ benchmarks.run\ *) echo table; echo summary; echo "  all measured"; exit 1 ;;
  -m\ benchmarks.experiments*) echo summary; echo "  experiments ok" ;;
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
        assert found["tables"] == "FAILED (1)"
        assert "bench summary\n  all measured" in ended.stdout and "experiments summary\n  exp" in ended.stdout
        assert "strict 1" in (home / "out" / "gpu_h999_tests.txt").read_text()
        assert (home / "out" / "gpu_h999_check.txt").read_text().splitlines() == summary

    def test_one_stage(self, home):
        ended = self.call(home, "experiments")
        assert ended.returncode == 0 and len(ended.stdout[ended.stdout.index("stages on") :].splitlines()) == 2
        assert "all parts" in self.call(home, "bench").stdout

    def test_unknown_stage(self, home):
        ended = self.call(home, "nonsense")
        assert ended.returncode == 2 and "expected stages of" in ended.stderr


def test_cases_name_what_there_is():
    assert {case.workload for case in CPU_CASES} == set(workloads.WORKLOADS) - {"tiny", "gained"}
    assert {case.workload for case in GPU_CASES} <= set(workloads.WORKLOADS)
    assert len({case.name for case in GPU_CASES}) == len(GPU_CASES)
    assert {case.dtype for case in GPU_CASES} <= set(bench.DTYPES)


@pytest.mark.parametrize("name", models.MODELS)
def test_models_have_the_layers_of_the_workload(name):
    build, size, *batches = models.MODELS[name]
    with torch.device("meta"):
        model = build()
        scores = model(torch.empty(2, 3, size, size), torch.zeros(2, dtype=torch.int64))
    assert scores.shape == (2,) and min(batches) > 0
    shapes = sorted(tuple(m.weight.shape) for m in model.modules() if isinstance(m, PLAIN_LAYERS))
    assert shapes == sorted(layer.shape for layer in workloads.WORKLOADS[name].layers)


@pytest.mark.parametrize("variant", ["ssn", "bssn"])
def test_the_authors_scheme_moves_only_when_told(variant):
    root = authors.Authors(Case("tiny").subject(CPU).copy(), variant)
    before = [[x.clone() for x in of_layer] for of_layer in root.vectors()]
    root()
    assert all(torch.equal(a, b) for x, y in zip(before, root.vectors()) for a, b in zip(x, y))
    root.update()
    for site, weight, old, new in zip(root.sites, root.weights, before, root.vectors()):
        rule = {"variant": root.variant, "semantics": resolve_semantics("paper"), "axis": site.axis}
        exact = algebra.normalize(weight.detach().double(), [x.double() for x in old], **rule)
        for fresh, truth in zip(new[::2], exact.vectors[::2]):
            torch.testing.assert_close(fresh.double(), truth, rtol=1e-5, atol=1e-6)


class TestScaling:
    def test_curves(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(scaling, "COUNTS", (1, 9, 12))
        monkeypatch.setattr(scaling, "WIDTHS", (8, 16, 10**7))
        monkeypatch.setattr(scaling, "ITERATIONS", (0, 2))
        monkeypatch.setitem(workloads.WORKLOADS, "paper_cnn", workloads.WORKLOADS["tiny"])
        monkeypatch.setitem(workloads.WORKLOADS, "paper_resnet", workloads.WORKLOADS["tiny"])
        monkeypatch.setattr(scaling.os, "cpu_count", lambda: 2)
        threads = torch.get_num_threads()
        code, records = measured(tmp_path, "scaling")
        assert code == 0 and torch.get_num_threads() == threads
        curves = {record["curve"]: record for record in records}
        points = {name: [point["x"] for point in curve["points"]] for name, curve in curves.items()}
        assert points == {"layers": [1, 9, 12], "bytes": [256, 1024], "iterations": [0, 2], "threads": [1, 2]}
        assert "left out: 400000000 MB a layer" in curves["bytes"]["left_out"][0]
        for curve in curves.values():
            for point in curve["points"]:
                rows = {row["provider"]: row for row in point["rows"]}
                assert {"parametrization", "cpu", "copy", "floor"} <= set(rows) and point["copy_bandwidth"] > 0
                assert not any(row.get("refused") for row in rows.values())
                assert "samples" not in rows["cpu"]["times"]["both"]["wall"]
        printed = capsys.readouterr().out
        assert "us a layer" in printed and "by iterations" in printed

    def test_growth(self):
        def point(n: int) -> dict:
            def row(provider: str, us: float, **more) -> dict:
                return {"provider": provider, "times": {"forward": {"wall": {"median": us * 1e-6}}}, **more}

            return {"x": n, "rows": [row("floor", 10 + 2 * n), row("cpu", 30 + 4 * n)]}

        floor, ours = scaling.growth([point(n) for n in (1, 8, 16, 512)])
        assert floor["per_layer"] == pytest.approx(2e-6) and ours["per_layer"] == pytest.approx(4e-6)
        assert ours["over_floor"] == pytest.approx(2078 / 1034) and ours["met"] is False and "met" not in floor


class TestBreakdown:
    def test_parts_exclude_each_other(self, monkeypatch):
        clock = iter([0.0, 1.0, 3.0, 3.5, 4.5, 6.0])
        monkeypatch.setattr(breakdown.time, "perf_counter", lambda: next(clock))
        watch = breakdown.Stopwatch()
        inner = watch.around("inner", lambda: None)
        watch.around("outer", lambda: (inner(), inner()))()
        assert watch.seconds == {"inner": 3.0, "outer": 3.0}

    def test_all_parts_are_hit_and_nothing_stays_patched(self, tmp_path, capsys):
        usual = backends.get("cpu").normalize, ops.Attach.backward, torch.autograd.backward
        code, (record,) = measured(tmp_path, "breakdown", "--workload", "tiny")
        assert code == 0 and record["layers"] == 3
        assert (backends.get("cpu").normalize, ops.Attach.backward, torch.autograd.backward) == usual
        forward, both = (set(row["parts"]) for row in record["rows"])
        assert forward == {"kernel", "results, addresses", "autograd: node", "store vectors", breakdown.REST}
        assert both - forward - {"check of given gradients"} == {"autograd: engine", "node's backward"}
        assert all(seconds > 0 for row in record["rows"] for seconds in row["parts"].values())
        assert "whole, without the stopwatch" in capsys.readouterr().out


class TestSteps:
    @staticmethod
    def small() -> torch.nn.Module:
        return models.Plain(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 1))

    def measure(self) -> dict:
        return steps.measure_steps("small", CPU, repeats=2, models={"small": (self.small, 8, 4, 2)})

    def test_shares(self):
        record = self.measure()
        rows = {row["provider"]: row for row in record["rows"]}
        assert list(rows) == ["plain", "parametrization sn", "cpu sn", "cpu bssn"] and record["batch"] == 2
        assert rows["cpu sn"]["losses"] == pytest.approx(rows["parametrization sn"]["losses"], abs=1e-4)
        ms = {name: row["times"]["step"]["wall"]["median"] for name, row in rows.items()}
        assert record["share"]["cpu sn"] == pytest.approx(1 - ms["plain"] / ms["cpu sn"])
        assert record["native_over"]["cpu bssn"] == pytest.approx(ms["parametrization sn"] / ms["cpu bssn"])
        assert "cpu bssn" in steps.steps_table([record])

    def test_other_losses_are_refused(self, monkeypatch):
        def fuse(model, backend):
            with torch.no_grad():
                model[-1].bias.add_(5.0)

        monkeypatch.setattr(steps.bssn_kernels, "fuse", fuse)
        record = self.measure()
        refused = {row["provider"]: row.get("refused", "") for row in record["rows"]}
        assert refused["cpu sn"].startswith("wrong numbers: losses") and not refused["cpu bssn"]
        assert "cpu sn" not in record["share"] and "wrong numbers" in steps.steps_table([record])

    def test_one_that_fails(self, monkeypatch):
        monkeypatch.setattr(steps.bssn_kernels, "normalize", lambda model, variant, backend: 1 / 0)
        refused = {row["provider"]: row.get("refused", "") for row in self.measure()["rows"]}
        assert "ZeroDivisionError" in refused["cpu bssn"] and not refused["cpu sn"]


def case_record(workload: str, nbytes: int, **ms: float) -> dict:
    """A record as the suite writes it, from milliseconds of "parametrization", "cpu" and others."""
    rows = [timed("copy", forward=1e-3), timed("three_stream", forward=0, both=1.5e-3), timed("clone", forward=2e-3)]
    for name, value in ms.items():
        rows.append(timed(name, "sn", both=value * 2e-3, forward=value * 1e-3, backend="cpu" if name == "cpu" else ""))
    found = Measured(workload, 3, nbytes, rows)
    for row in rows:
        row.extra = {"both": 9 * MB} if row.backend else {}
        row.ratios = targets.ratios_of(row, found, "cpu")
        row.targets = targets.targets_of(row, found, "cpu")
    return {"kind": "case", "case": asdict(Case(workload)), "layers": 3, "bytes": nbytes} | {
        "rows": [row.record() for row in rows], **measure.bandwidths(found)
    }  # fmt: skip


MACHINE = {"cpu": "abacus", "threads": 2, "cores": 2, "cpu_capability": "NONE", "torch": "2.13", "commit": "c" * 40}
HEAD = {"machine": MACHINE | {"time": "now"}}


class TestCompare:
    def write(self, file: Path, ours: float, native: float = 10.0) -> str:
        report.dump(file, HEAD, [case_record("vit_b", 10**9, parametrization=native, cpu=ours)])
        return str(file)

    def test_files(self, tmp_path, capsys):
        # The second machine is half as fast, which says nothing of the code.
        files = [self.write(tmp_path / "a", 2.0), self.write(tmp_path / "b", 2.0, native=20.0)]
        assert run.main(["--compare", *files]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("vit_b")]
        assert [line[3:] for line in lines] == [[call, "5.00x", "10.00x", "2.000x"] for call in ("f", "f+b")]

    def test_nothing_in_common(self, tmp_path, capsys):
        report.dump(tmp_path / "b", HEAD, [])
        assert run.main(["--compare", self.write(tmp_path / "a", 1.0), str(tmp_path / "b")]) == 2
        assert "nothing was measured in both" in capsys.readouterr().err

    def test_neither_file_nor_commit(self, capsys):
        assert run.main(["--compare", "no_such_thing", "HEAD"]) == 2
        assert "neither a file nor a commit" in capsys.readouterr().err

    @pytest.fixture
    def repository(self, tmp_path, monkeypatch):
        """Two commits, tagged old and new, whose suites write down fixed times."""
        home = tmp_path / "repository"
        (home / "benchmarks").mkdir(parents=True)
        monkeypatch.setattr(compare, "ROOT", home)
        (home / "setup.py").write_text("open('built', 'w').close()")
        (home / "benchmarks" / "__init__.py").write_text("")
        compare.git("init", "-q")
        for tag, ours in (("old", 4.0), ("new", 2.0)):
            self.write(home / "times", ours)
            code = "import pathlib, shutil, sys\nassert pathlib.Path('built').exists() and sys.argv[1] == 'tables'\n"
            code += "shutil.copy('times', sys.argv[sys.argv.index('--json') + 1])\n"
            (home / "benchmarks" / "run.py").write_text(code)
            compare.git("add", "-A")
            compare.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", tag)
            compare.git("tag", tag)
        return home

    def test_commits(self, repository, capsys):
        assert run.main(["--compare", "old", "new", "--workload", "vit_b"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("vit_b")]
        assert lines[0][3:] == ["f", "2.50x", "5.00x", "2.000x"]
        assert len(compare.git("worktree", "list").splitlines()) == 1

    def test_a_commit_that_cannot_run(self, repository, capsys):
        (repository / "benchmarks" / "run.py").write_text("raise SystemExit('no luck')")
        compare.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "broken")
        assert run.main(["--compare", "old", "HEAD"]) == 2
        assert "no luck" in capsys.readouterr().err
        assert len(compare.git("worktree", "list").splitlines()) == 1


class TestResults:
    @pytest.fixture
    def records(self):
        step = {"kind": "step", "name": "step of vit_b", "model": "vit_b", "batch": 4, "size": 32}
        rows = [
            {"provider": name, "times": {"step": {"wall": {"median": s, "p10": s, "p90": s}}}}
            for name, s in (("plain", 1.0), ("parametrization sn", 2.0), ("cpu sn", 1.25))
        ]
        wall = {"wall": {"median": 1e-3}}
        row = {"provider": "cpu", "variant": "sn", "times": {"forward": wall, "both": wall}}
        curve = {"kind": "scaling", "curve": "layers", "name": "by layers"}
        curve["points"] = [{"x": n, "rows": [row]} for n in (1, 8)]
        growth = {"provider": "cpu", "what": "forward", "per_layer": 1e-6, "over_floor": 2.0}
        growth |= {"limit": 1.5, "met": False}
        cases = [case_record("vit_b", 10**9, parametrization=10.0, hook=6.0, foreach=4.0, cpu=2.0)]
        cases.append(case_record("dcgan_g", 10**6, parametrization=10.0, cpu=4.0))
        parts = {"kind": "breakdown", "name": "breakdown of dcgan_g", "workload": "dcgan_g", "layers": 4}
        shares = {"kernel": 12e-6, "rest": 7e-6}
        parts |= {"backend": "cpu", "variant": "sn", "rows": [row | {"what": "both", "parts": shares}]}
        return [*cases, curve | {"growth": [growth]}, parts, step | {"rows": rows} | steps.shares(rows)]

    def test_pictures(self, records, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        report.dump(tmp_path / "out.jsonl", HEAD, records)
        assert run.main(["--show", str(tmp_path / "out.jsonl"), "--plots", str(tmp_path / "pictures")]) == 0
        drawn = sorted(file.name for file in (tmp_path / "pictures").iterdir())
        assert drawn == ["roofline.png", "scaling.png", "speedup.png", "steps.png"]
        for file in (tmp_path / "pictures").iterdir():
            head = file.read_bytes()[:24]
            width, height = (int.from_bytes(head[i : i + 4], "big") for i in (16, 20))
            assert head[1:4] == b"PNG" and width > 500 and height > 150

    def test_the_tables_of_the_readme(self, records, tmp_path):
        report.dump(tmp_path / "out.jsonl", HEAD, records)
        readme = tmp_path / "README.md"
        readme.write_text(f"above\n{results.BEGIN}\nold\n{results.END}\nbelow\n")
        assert run.main(["--show", str(tmp_path / "out.jsonl"), "--readme", str(readme)]) == 0
        text = readme.read_text()
        assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
        large, small = (line for line in text.splitlines() if line.startswith(("| `vit_b`, 3", "| `dcgan_g`, 3")))
        assert "5.00x (≥ 3: met)" in large and "5.00x (≥ 5: met)" in large and "2.00x (foreach sn)" in large
        assert "2.50x (≥ 3: **missed**)" in small and "9.0 (≤ 8: **missed**)" in small and "1.00 (≤ 1.5: met)" in large
        assert "| us of a forward + backward | kernel | rest |" in text and "cpu sn | 12 | 7 |" in text
        assert "2.00x (≤ 1.5: **missed**)" in text and "| 50.0% | 1250 (cpu sn) | 20.0% | 1.60x |" in text

    def test_no_marks(self, records, tmp_path, capsys):
        report.dump(tmp_path / "out.jsonl", HEAD, records)
        (tmp_path / "README.md").write_text("nothing")
        with pytest.raises(workloads.UsageError, match="expected the marks"):
            results.write_results(HEAD, records, None, tmp_path / "README.md")

    def test_unknown_part(self, capsys):
        with pytest.raises(SystemExit):
            run.main(["nonsense"])
        assert "expected parts of tables, scaling, steps, breakdown" in capsys.readouterr().err
