"""The measuring code: what is timed, what is refused, and what is written down."""

import gc
import importlib.util
import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as spectral_norm_hook

import bssn_kernels
from bssn_kernels import __main__ as commands
from bssn_kernels import algebra, bench
from bssn_kernels.bench import host, machine, measure, memory, providers, report, session, verify, workloads
from bssn_kernels.bench.task import Task
from bssn_kernels.bench.workloads import Layer, Workload
from bssn_kernels.variants import resolve_semantics, resolve_variant

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = Workload("tiny", (Layer("conv", (4, 3, 3, 3)), Layer("deconv", (3, 5, 2)), Layer("linear", (1, 7))))
QUICK = ["--repeats", "3"]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", TINY)
    return providers.Subject("tiny", TINY.build())


def native(model, form="parametrization"):
    norm = {"parametrization": parametrizations.spectral_norm, "hook": spectral_norm_hook}[form]
    for module in list(model.modules()):
        if isinstance(module, providers.PLAIN_LAYERS):
            norm(module)
    return model


def small_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(5, 2))


# Layers, weights and MiB as published; a workload that is built otherwise measures something else.
@pytest.mark.parametrize(
    ("name", "layers", "millions", "mebibytes"),
    [
        ("sngan32", 11, 1.05, 4.0),
        ("paper_cnn", 8, 2.93, 11.2),
        ("paper_resnet", 19, 39.46, 150.5),
        ("biggan128", 23, 87.97, 335.6),
        ("biggan256", 26, 99.21, 378.5),
        ("stylegan_t", 15, 7.50, 28.6),
        ("vit_b", 49, 85.52, 326.2),
        ("dcgan_g", 4, 2.76, 10.5),
    ],
)
def test_workloads_have_the_published_layers(name, layers, millions, mebibytes):
    workload = workloads.WORKLOADS[name]
    built = [layer.build() for layer in workload.layers]
    assert [tuple(module.weight.shape) for module in built] == [layer.shape for layer in workload.layers]
    assert all(isinstance(module, providers.PLAIN_LAYERS) for module in built)
    assert len(built) == layers
    assert round(workload.numel / 1e6, 2) == millions
    assert round(workload.numel * 4 / 2**20, 1) == mebibytes


def test_all_workloads_are_checked():
    assert len(workloads.WORKLOADS) == 8
    assert set(bench.DEFAULT_WORKLOADS) < set(workloads.WORKLOADS)
    assert workloads.WORKLOADS["paper_cnn"].numel == 2_934_464
    assert workloads.WORKLOADS["paper_resnet"].numel == 39_459_712


def test_workloads_are_built_alike_every_time():
    a, b = TINY.build(torch.float64), TINY.build(torch.float64)
    assert all(torch.equal(x, y) and x.dtype == torch.float64 for x, y in zip(a.parameters(), b.parameters()))


def test_gradients_do_not_point_along_the_weights():
    workload = workloads.WORKLOADS["sngan32"]
    subject = providers.Subject(workload.name, workload.build())
    for weight, grad in zip(subject.weights, subject.grads()):
        if weight.numel() > 10_000:
            cosine = torch.nn.functional.cosine_similarity(weight.flatten(), grad.flatten(), dim=0)
            assert abs(cosine) < 0.05


# The truth


@pytest.mark.parametrize("variant", ["sn", "bssn", "capped"])
@pytest.mark.parametrize("semantics", ["torch", "torch_hook", "paper", "through uv"])
@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 3, 3), 0), ((3, 5, 2), 1), ((6, 4), 0)])
def test_the_closed_gradient_is_that_of_autograd(variant, semantics, shape, axis, monkeypatch):
    torch.manual_seed(0)
    if semantics == "through uv":
        semantics = replace(resolve_semantics("torch"), gradient="through")
    weight = torch.randn(shape, dtype=torch.float64)
    if len(shape) == 4:
        weight = weight.to(memory_format=torch.channels_last)
    grad = torch.randn(shape, dtype=torch.float64)
    numbers = resolve_variant(variant)
    sides = algebra.row_axes(len(shape), axis, 2 if len(shape) > 2 and numbers.into else 1)
    vectors = [torch.randn(n, dtype=torch.float64) for a in sides for n in (shape[a], weight.numel() // shape[a])]
    site = providers.Site("m", "weight", "parametrization", semantics, axis, 1e-12, 2)
    gain = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    found = verify.Truth.of(weight, vectors, grad, site, numbers, gain)

    weight.requires_grad_()
    rules = {"semantics": resolve_semantics(semantics), "axis": axis, "n_power_iterations": 2}
    exact = algebra.normalize(weight, vectors, variant=numbers, gain=gain, **rules).weight
    monkeypatch.setattr(verify, "CHUNK", 2 * weight[0].numel())
    parts = list(verify.row_chunks(weight))
    assert len(parts) > 1
    nothing = torch.zeros_like(weight)
    found_weight = torch.cat([-found.weight_error(nothing[rows], rows) for rows in parts])
    found_grad = torch.cat([-found.subtract_grad(nothing[rows], rows) for rows in parts])
    torch.testing.assert_close(found_weight, exact.detach(), rtol=1e-12, atol=1e-12)
    true_grad, true_gain = torch.autograd.grad(exact, (weight, gain), grad)
    torch.testing.assert_close(found_grad, true_grad, rtol=1e-11, atol=1e-11)
    assert found.inner * found.multiplier / float(gain.detach()) == pytest.approx(float(true_gain), rel=1e-11)


@pytest.mark.parametrize("form", ["parametrization", "hook"])
def test_native_is_found_right(form):
    model = native(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 2), nn.Linear(5, 1)), form)
    subject = providers.Subject("net", model)
    errors = verify.compare(subject.copy(), "sn", [torch.randn_like(w) for w in subject.weights])
    assert errors.largest < 1e-5
    assert not errors.refusal(torch.float32)


def test_vectors_and_shared_weights_are_found_right():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4), nn.LayerNorm(6))
    model[1].weight = model[0].weight
    parametrizations.spectral_norm(model[2])
    native(model)
    subject = providers.Subject("net", model)
    assert len(subject.sites) == 3
    errors = verify.compare(subject.copy(), "sn", [torch.randn_like(w) for w in subject.weights])
    assert errors.largest < 1e-5


def test_zero_weights_are_no_reason_to_refuse_who_can_bear_them():
    model = nn.Sequential(nn.Linear(3, 4))
    nn.init.zeros_(model[0].weight)
    subject = providers.Subject("zero", native(model))
    rows = [providers.NATIVE, providers.fused("reference")]
    _, theirs, ours = session.measure_subject(subject, rows, ["sn"], repeats=1).rows
    assert "off by nan" in theirs.refused
    assert not ours.refused and ours.times["forward"]


class Bend(torch.autograd.Function):
    """Times ``forward_factor``, and gradients times ``backward_factor``."""

    @staticmethod
    def forward(ctx, x, forward_factor, backward_factor):
        ctx.factor = backward_factor
        return x * forward_factor

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None, None


def bent(forward_factor, backward_factor):
    """A provider that is a little wrong."""

    def make(subject, variant):
        class Wrong(providers.Root):
            def forward(self):
                return [Bend.apply(w, forward_factor, backward_factor) for w in super().forward()]

        root = subject.copy()
        return Wrong(root.model, root.sites)

    return providers.Provider("bent", None, make)


@pytest.mark.parametrize(
    ("factors", "what"),
    [((1.001, 1.0), "weight"), ((1.0, 1.001), "gradient"), ((float("nan"), 1.0), "weight"), ((1.0, 0.0), "gradient")],
)
def test_wrong_numbers_are_not_timed(tiny, factors, what):
    measured = session.measure_subject(tiny, [providers.NATIVE, bent(*factors)], ["sn"], repeats=2)
    _, good, bad = measured.rows
    assert set(good.times) == {"forward", "both"} and not good.refused
    assert not bad.times
    assert "wrong numbers" in bad.refused and f"{what} of" in bad.refused
    text = report.table([measured], memory.MemoryMeter())
    assert f"bent      {bad.refused}" in text


def test_a_hair_is_not_wrong(tiny):
    (_, row) = session.measure_subject(tiny, [bent(1.00001, 1.0)], ["sn"], repeats=2).rows
    assert not row.refused and row.errors["weight"][0] > 5e-6


def test_a_failing_provider_says_so_and_the_others_go_on(tiny):
    def make(subject, variant):
        raise RuntimeError("no such luck")

    def too_few(subject, variant):
        root = subject.copy()
        root._reads = root._reads[:0]
        return root

    failing = [providers.Provider("failing", None, make), providers.Provider("few", None, too_few)]
    rows = session.measure_subject(tiny, [*failing, providers.NATIVE], ["sn"], repeats=2).rows
    assert rows[1].refused == "failed: RuntimeError: no such luck"
    assert rows[2].refused.startswith("failed: ")
    assert rows[3].times["forward"]


# Providers


@pytest.mark.parametrize("variant", ["sn", "bssn", "capped"])
@pytest.mark.parametrize("make", [small_net, lambda: native(small_net()), lambda: native(small_net(), "hook")])
@pytest.mark.parametrize("backend", bench.backends.natural("cpu"))
def test_every_backend_is_right_on_every_form(make, variant, backend):
    subject = providers.Subject("net", make())
    root = providers.fused(backend).make(subject, variant)
    assert bssn_kernels.group_of(root) is not None
    errors = verify.compare(root, variant, [torch.randn_like(w) for w in subject.weights])
    assert errors.largest < 1e-5
    # The copies share classes: what was done to one must not show in another.
    again = verify.compare(subject.copy(), "sn", [torch.randn_like(w) for w in subject.weights])
    assert again.largest < 1e-5


def test_a_learnable_gain_is_ours(tiny):
    subject = providers.Subject("tiny", TINY.build(), learnable_gain=True)
    root = providers.fused("reference").make(subject, "sn")
    assert sum(name.endswith("_gain") for name, _ in root.named_parameters()) == 3


def test_a_partly_normalized_model_is_taken_as_it_is():
    model = small_net()
    parametrizations.spectral_norm(model[2])
    subject = providers.Subject("net", model)
    assert [site.name for site in subject.sites] == ["2.weight"]
    root = providers.fused("reference").make(subject, "bssn")
    assert [tuple(w.shape) for w in root()] == [(2, 5)]


def test_settings_of_the_layers_are_kept():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3), n_power_iterations=3, eps=1e-6))
    subject = providers.Subject("net", model)
    root = providers.fused("reference").make(subject, "bssn")
    errors = verify.compare(root, "bssn", [torch.randn_like(w) for w in subject.weights])
    assert errors.largest < 1e-5


def test_mixed_settings_are_refused_for_other_variants():
    model = nn.Sequential(native(nn.Linear(3, 4)), native(nn.Linear(3, 4), "hook"))
    subject = providers.Subject("net", model)
    providers.fused("reference").make(subject, "sn")
    with pytest.raises(ValueError, match="differ in form"):
        providers.fused("reference").make(subject, "bssn")


# The clock


def test_rounds_are_shuffled_and_results_freed_after_the_clock(monkeypatch):
    events, collecting = [], []

    class Result:
        def __init__(self, name):
            self.name = name

        def __del__(self):
            events.append(f"free {self.name}")

    def task(name):
        def run():
            collecting.append(gc.isenabled())
            events.append(f"run {name}")
            return Result(name)

        return Task(run, lambda: events.append(f"reset {name}"))

    clock = iter(range(10**6))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: events.append("clock") or next(clock) / 64)
    times = measure.interleaved({name: task(name) for name in "abc"}, repeats=20)
    assert gc.isenabled() and not any(collecting[6:])
    assert {len(of_task.wall.seconds) for of_task in times.values()} == {20}
    assert all(of_task.wall.median == 1 / 64 for of_task in times.values())
    one = ["clock", "run a", "clock", "free a", "reset a"]
    assert events[:5] == one
    runs = [event[-1] for event in events if event.startswith("run")][6:]
    rounds = {"".join(runs[i : i + 3]) for i in range(0, 60, 3)}
    assert len(rounds) > 3 and all(sorted(r) == ["a", "b", "c"] for r in rounds)


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-9, 100), (0.05, 10), (0.4, 5), (3.0, 3)])
def test_the_number_of_rounds_follows_the_cost(monkeypatch, seconds, rounds):
    monkeypatch.setattr(measure.CpuClock, "sample", lambda *of: measure.Reading(*[seconds] * 3, True, seconds))
    times = measure.interleaved({"a": None, "b": None}, budget_s=1.0)
    assert len(times["a"].wall.seconds) == rounds


def test_collection_is_on_again_after_an_error():
    with pytest.raises(ZeroDivisionError):
        measure.interleaved({"a": Task(lambda: 1 / 0)}, repeats=1)
    assert gc.isenabled()


def test_a_task_that_fails_is_told_and_left_out():
    told, calls = [], []
    late = Task(lambda: calls.append(1) or 1 / (len(calls) < 5))
    tasks = {"early": Task(lambda: 1 / 0), "late": late, "good": Task(lambda: None)}
    times = measure.interleaved(tasks, repeats=4, failed=lambda key, error: told.append((key, type(error))))
    assert told == [("early", ZeroDivisionError), ("late", ZeroDivisionError)]
    assert list(times) == ["good"] and len(times["good"].wall.seconds) == 4


def test_quartiles():
    samples = measure.Samples([4.0, 1.0, 3.0, 2.0, 5.0])
    assert samples.median == 3.0 and samples.quartiles == (2.0, 4.0) and samples.noisy
    assert measure.Samples([1.0]).quartiles == (1.0, 1.0)
    assert not measure.Samples([1.0, 1.01, 1.02]).noisy


MEMORY = """
import torch
from bssn_kernels.bench import memory
from bssn_kernels.bench.task import Task

meter, kept = memory.MemoryMeter(), []
if meter.reason:
    raise SystemExit("skip: " + meter.reason)

def scratch():
    torch.ones(8 << 20)
    return torch.ones(2 << 20)

def keep():
    kept[:] = kept or [torch.ones(4 << 20)]

tasks = [Task(scratch), Task(lambda: None), Task(keep)]
meter.measure(tasks)  # a first time pays for what a process does once, such as starting threads
for _ in range(2):
    kept.clear()
    memory = meter.measure(tasks)
    print(*(size / 2**20 for size in (*memory.peaks, memory.kept)))
"""


def test_memory_counts_what_is_freed_before_the_end_and_what_is_kept():
    """In a process of its own: in this one, other tests have left holes in the heap that blocks may fall into."""
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    if result.stderr.startswith("skip: "):
        pytest.skip(result.stderr)
    assert result.returncode == 0, result.stderr
    rows = [[float(x) for x in line.split()] for line in result.stdout.splitlines()]
    assert len(rows) == 2
    for sizes in rows:
        assert sizes == pytest.approx([32, 0, 16, 16], abs=1)


def test_memory_says_why_it_cannot(monkeypatch):
    monkeypatch.setattr(memory.MALLOC, "known", False)
    meter = memory.MemoryMeter()
    assert "glibc" in meter.reason
    assert meter.measure([Task(lambda: None)]) is None
    assert "not measured" in report.table([session.Measured("w", 1, 4, [session.Row("clone")])], meter)


# The command


def run(argv, capsys):
    code = commands.main(["bench", *argv])
    return code, capsys.readouterr()


def test_the_table_has_every_provider_and_variant(tiny, capsys):
    code, text = run(["--workload", "tiny", *QUICK], capsys)
    assert code == 0
    lines = text.out.splitlines()
    assert [c for c in ("workload", "layers", "MiB", "native/f+b", "f/clone") if c not in lines[0]] == []
    assert lines[1].split()[:4] == ["tiny", "3", "0.0", "clone"]
    names = bench.backends.natural("cpu")
    seen = [tuple(line.split()[:2]) for line in lines[2 : lines.index("")]]
    assert seen == [("SN", "native"), *(("SN", n) for n in names), *(("BSSN", n) for n in names)]
    assert "native SN is the baseline" in " ".join(text.out.split())
    assert "tiny: " in text.err and "tiny: " not in text.out


def test_json_has_the_machine_and_raw_samples(tiny, capsys, tmp_path):
    file = tmp_path / "out.json"
    asked = ["--workload", "tiny", "--variant", "bsn", "--backend", "reference", "--dtype", "float64", "--threads", "1"]
    threads = torch.get_num_threads()
    code, _ = run([*asked, *QUICK, "--json", str(file)], capsys)
    assert code == 0 and torch.get_num_threads() == threads
    content = json.loads(file.read_text())
    assert content["format"] == report.FORMAT
    machine = content["machine"]
    assert machine["torch"] == torch.__version__ and machine["bssn_kernels"] == bssn_kernels.__version__
    assert machine["threads"] == 1 and machine["cpu"]
    assert content["settings"]["backend"] == ["reference"] and content["settings"]["variant"] == ["bsn"]
    # Native has no BSN, so nothing is left to compare with.
    clone, ours = content["rows"]
    assert clone["provider"] == "clone" and "variant" not in clone and "both" not in clone["times"]
    assert (ours["workload"], ours["layers"], ours["provider"], ours["variant"]) == ("tiny", 3, "reference", "bsn")
    assert ours["bytes"] == TINY.numel * 8
    assert set(ours["errors"]) == {"weight", "grad", "sigma"} and "refused" not in ours
    assert max(error for error, layer in ours["errors"].values()) < 1e-12
    for kind in ("forward", "both"):
        times = ours["times"][kind]["wall"]
        assert len(times["samples"]) == 3 and times["p10"] <= times["median"] <= times["p90"]
    assert ours["native_over_forward"] is None
    medians = [row["times"]["forward"]["wall"]["median"] for row in (ours, clone)]
    assert ours["forward_over_clone"] == medians[0] / medians[1]


def test_a_refused_provider_makes_the_command_fail(tiny, capsys, monkeypatch):
    monkeypatch.setattr(bench, "fused", lambda name: bent(2.0, 2.0))
    code, text = run(["--workload", "tiny", "--variant", "sn", "--backend", "reference", *QUICK], capsys)
    assert code == 1
    assert "wrong numbers" in text.out


def test_host_time(capsys, tmp_path):
    file = tmp_path / "host.json"
    code, text = run(["--host", "--backend", "reference", *QUICK, "--json", str(file)], capsys)
    assert code == 0
    assert [line.split()[0] for line in text.out.splitlines() if " floor " in line and "1.00x" in line] == [
        str(n) for n in host.COUNTS
    ]
    content = json.loads(file.read_text())
    assert [row["what"] for row in content["host"][:3]] == ["floor", "reference, functional", "reference, root forward"]
    assert len(content["host"]) == 3 * len(host.COUNTS)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the working directory, which is not yet on sys.path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    before = set(sys.modules)

    def write(text, name="my_models"):
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


FACTORY = """
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm as p
from torch.nn.utils import prune, spectral_norm as h

def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2))

def parametrized():
    return nn.Sequential(p(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Linear(4, 2))

def hooked():
    return nn.Sequential(h(nn.Conv2d(3, 4, 3)), nn.ReLU(), h(nn.Linear(4, 2)))

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(p(nn.Linear(3, 2)))

made = plain()
number = 3
def raising(): raise OSError("out of ideas")
def empty(): return nn.Sequential(nn.ReLU())
def text(): return "a model"
def elsewhere(): return nn.Linear(3, 2, device="meta")
def lazy(): return nn.Sequential(nn.LazyLinear(3))
def needy(width): return nn.Linear(width, 2)

def ours():
    import bssn_kernels
    model = plain()
    bssn_kernels.normalize(model)
    return model

def other_norms():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3), p(nn.Linear(3, 2)), nn.Linear(2, 2))
    nn.utils.weight_norm(model[0])
    prune.random_unstructured(model[1], "weight", 0.3)
    nn.utils.parametrizations.weight_norm(model[2])
    p(model[2], name="weight")
    return model
"""


@pytest.mark.parametrize(
    ("factory", "layers"),
    [("plain", 2), ("parametrized", 1), ("hooked", 2), ("Net", 1), ("made", 2), ("other_norms", 1)],
)
def test_a_users_own_model(module, capsys, factory, layers):
    path = f"{module(FACTORY)}:{factory}"
    code, text = run([path, *QUICK], capsys)
    assert code == 0, text
    assert text.out.splitlines()[1].split()[:2] == [path, str(layers)]
    assert "sngan32" not in text.out and "failed" not in text.out


def test_a_users_own_model_beside_a_workload(module, tiny, capsys):
    code, text = run([f"{module(FACTORY)}:plain", "--workload", "tiny", "--dtype", "bfloat16", *QUICK], capsys)
    assert code == 0
    assert ":plain" in text.out and "\ntiny" in text.out


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_models", "expected module:factory"),
        ("my_models:", "expected module:factory"),
        ("my_model:plain", "cannot import 'my_model': ModuleNotFoundError"),
        ("broken:plain", "cannot import 'broken': ZeroDivisionError: division by zero"),
        ("my_models:none", "'my_models' has no 'none'"),
        ("my_models:number", "expected a callable that returns an nn.Module, got int"),
        ("my_models:raising", "raised OSError: out of ideas"),
        ("my_models:text", "expected it to return an nn.Module, got str"),
        ("my_models:empty", "no layer under spectral_norm"),
        ("my_models:elsewhere", "expected real numbers on cpu"),
        ("my_models:lazy", "expected initialized weights, got those of a LazyLinear: run a forward first"),
        ("my_models:needy", "raised TypeError: needy() missing 1 required positional argument: 'width'"),
        ("my_models:ours", "expected a model as it is without this package, got one fused or normalized by it"),
    ],
)
def test_bad_factories(module, capsys, path, message):
    module(FACTORY)
    module("\n1 / 0\n", "broken")
    code, text = run([path, *QUICK], capsys)
    assert code == 2
    assert message in text.err.splitlines()[-1]
    assert not text.out
    assert (".py:" in text.err) == (path in ("my_models:raising", "broken:plain"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--backend", "abacus"], "abacus"),
        (["--json", "no/such/folder/out.json"], "no such folder"),
        pytest.param(
            ["--device", "cuda"],
            "torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_options(argv, message, capsys):
    code, text = run(argv, capsys)
    assert code == 2 and message in text.err and not text.out


@pytest.mark.parametrize(
    "argv", [["--workload", "gan"], ["--variant", "ssssn"], ["--threads", "0"], ["--dtype", "int8"]]
)
def test_bad_choices(argv, capsys):
    with pytest.raises(SystemExit) as leaving:
        commands.main(["bench", *argv])
    assert leaving.value.code == 2
    assert argv[1] in capsys.readouterr().err


def test_the_commit_is_that_of_the_package(monkeypatch, tmp_path):
    elsewhere = types.SimpleNamespace(__file__=str(tmp_path / "bssn_kernels" / "x.py"))
    monkeypatch.setattr(machine, "bssn_kernels", elsewhere)
    assert machine.commit() is None


# The real run


@pytest.fixture(scope="module")
def train_parity():
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("train_parity", BENCHMARKS / "train_parity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = torch.get_num_threads()
    # Nets as small as these gain nothing from threads, and lose much where the machine is busy.
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(before)


SHORT = ["--steps", "4", "--width", "4", "--batch", "2", "--timed-steps", "2"]


@pytest.mark.parametrize("form", ["parametrization", "hook"])
def test_training_agrees_with_native(train_parity, form, capsys, tmp_path):
    file = tmp_path / "parity.json"
    assert train_parity.main([*SHORT, "--form", form, "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "they agree" in text and "normalization alone" in text
    content = json.loads(file.read_text())
    assert content["float64"]["largest_difference"] < 1e-10
    native, fused = content["float64"]["sigmas"].values()
    assert len(native) == 8 and native == pytest.approx(fused, rel=1e-9)
    assert len(content["float64"]["curves"]["fused"]) == 4


def test_training_that_differs_is_seen(train_parity, capsys, monkeypatch):
    def almost(model):
        with torch.no_grad():
            model[0].bias.add_(1e-5)
        return bssn_kernels.fuse(model)

    monkeypatch.setattr(train_parity, "bssn_kernels", types.SimpleNamespace(fuse=almost))
    assert train_parity.main(SHORT) == 1
    assert "DO NOT AGREE" in capsys.readouterr().out
