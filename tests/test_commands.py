"""``python -m bssn_kernels``: what doctor says, and how bench is reached."""

import os
import re
import subprocess
import sys
import types

import pytest
import torch

import bssn_kernels
from bssn_kernels import __main__ as commands
from bssn_kernels import backends
from bssn_kernels.backends import cpu


def built(monkeypatch, **facts):
    """Let setup.py have noted these facts."""
    info = types.SimpleNamespace(**facts)
    monkeypatch.setitem(sys.modules, "bssn_kernels._build_info", info)
    monkeypatch.setattr(bssn_kernels, "_build_info", info, raising=False)


def doctor(capsys):
    assert commands.main(["doctor"]) == 0
    return capsys.readouterr().out


def test_doctor_as_a_program():
    result = subprocess.run([sys.executable, "-m", "bssn_kernels", "doctor"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"bssn_kernels  {bssn_kernels.__version__}" in result.stdout
    assert re.search(r"reference +ready", result.stdout)


def test_doctor_says_versions_threads_and_every_backend(capsys):
    text = doctor(capsys)
    for name in ("bssn_kernels", "torch", "python", "triton", "build", "threads"):
        assert re.search(rf"^{name} +\S", text, re.MULTILINE), name
    assert torch.__version__ in text
    assert re.search(rf"^threads +{torch.get_num_threads()}, by lib", text, re.MULTILINE)
    for name, reasons in backends.report():
        assert re.search(rf"^  {name} +{'cannot run:' if reasons else 'ready'}$", text, re.MULTILINE)


@pytest.mark.skipif(not cpu.isas(), reason="the compiled part is not there")
@pytest.mark.parametrize(
    "forced, expected", [("", cpu.isas()[:1]), ("plain", ["plain"]), ("mmx", ["none: BSSN_CPU_ISA"])]
)
def test_doctor_says_the_instruction_set(capsys, monkeypatch, forced, expected):
    monkeypatch.setenv("BSSN_CPU_ISA", forced)
    assert re.search(rf"^instructions +{expected[0]}\b.*{', '.join(cpu.isas())}\)$", doctor(capsys), re.MULTILINE)


def test_doctor_gives_each_reason_and_a_missing_backend_is_no_failure(capsys, monkeypatch):
    report = [("cpu", ["no compiler", "no luck"]), ("reference", [])]
    monkeypatch.setattr(backends, "report", lambda: report)
    listed = doctor(capsys).partition("\nbackends\n")[2]
    assert listed.splitlines() == [
        "  cpu        cannot run:",
        "               - no compiler",
        "               - no luck",
        "  reference  ready",
    ]


def test_doctor_says_that_the_build_left_the_module_out(capsys, monkeypatch):
    built(monkeypatch, CPU_REASON="the compiler is on holiday", CUDA_REASON="no nvcc was found")
    text = doctor(capsys)
    assert re.search(r"^build cpu +left out: the compiler is on holiday$", text, re.MULTILINE)
    assert re.search(r"^build cuda +left out: no nvcc was found$", text, re.MULTILINE)


def test_doctor_says_how_each_module_was_built(capsys, monkeypatch):
    cpu = {"CPU_REASON": "", "CPU_COMPILER": "g++ 12", "CPU_FLAGS": "-O3", "CPU_ISAS": ("plain", "avx2")}
    cuda = {"CUDA_REASON": "", "CUDA_COMPILER": "nvcc 13.0", "CUDA_FLAGS": "-lineinfo", "CUDA_ARCHS": ("80", "90")}
    built(monkeypatch, **cpu, **cuda, CUDA_PTX=("90",))
    words = [" ".join(line.split()) for line in doctor(capsys).splitlines()]
    begin = words.index("build cpu g++ 12, -O3")
    assert words[begin + 1 : begin + 4] == [
        "for plain, avx2",
        "build cuda nvcc 13.0, -lineinfo",
        "for sm_80, sm_90, newer ones by the PTX of compute_90",
    ]


def test_a_source_newer_than_its_module_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(bssn_kernels, "__file__", str(tmp_path / "bssn_kernels" / "__init__.py"))
    ages = {"bssn_kernels/_cpu.x.so": 3, "bssn_kernels/_cuda.x.so": 3, "csrc/cuda/forward.cu": 2, "csrc/cpu/b.cpp": 1}
    for name, age in ages.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (age, age))
    assert commands.changed_since_build() == ""
    os.utime(tmp_path / "csrc/cuda/forward.cu", (4, 4))
    assert commands.changed_since_build() == os.path.join("csrc", "cuda", "forward.cu")
    (tmp_path / "bssn_kernels/_cuda.x.so").unlink()  # nothing was compiled from it
    assert commands.changed_since_build() == ""


def test_doctor_says_that_nothing_was_built(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bssn_kernels._build_info", None)
    monkeypatch.delattr(bssn_kernels, "_build_info", raising=False)
    assert re.search(r"^build +none: setup.py has not run here$", doctor(capsys), re.MULTILINE)


def test_bench_gets_its_arguments_from_the_measuring_code(monkeypatch):
    seen = []
    measuring = types.SimpleNamespace(
        add_arguments=lambda parser: parser.add_argument("model", nargs="?"),
        run=lambda args: seen.append(args.model) or 3,
    )
    monkeypatch.setitem(sys.modules, "bssn_kernels.bench", measuring)
    monkeypatch.setattr(bssn_kernels, "bench", measuring, raising=False)
    assert commands.main(["bench", "module:factory"]) == 3
    assert commands.main(["bench"]) == 3
    assert seen == ["module:factory", None]


def test_doctor_does_not_import_the_measuring_code():
    code = "import sys, bssn_kernels.__main__ as m\nm.main(['doctor'])\nprint('bssn_kernels.bench' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1:] == ["False"], result.stderr


@pytest.mark.parametrize("argv", [[], ["cure"]])
def test_no_command_and_an_unknown_one_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as leaving:
        commands.main(argv)
    assert leaving.value.code == 2
    assert "doctor" in capsys.readouterr().err or not argv


def test_help_and_version(capsys):
    for argv, expected in (
        (["--help"], "doctor"),
        (["--version"], bssn_kernels.__version__),
        (["bench", "--help"], "--json"),
    ):
        with pytest.raises(SystemExit) as leaving:
            commands.main(argv)
        assert leaving.value.code == 0
        assert expected in capsys.readouterr().out
