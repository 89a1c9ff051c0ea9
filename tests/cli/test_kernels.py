"""`tpu-stack kernels`: its actions, their output for people and machines, and bad input."""

import dataclasses
import json

import pytest

from tpu_stack.cli.main import main
from tpu_stack.planner.kernels import case_registry
from tpu_stack.planner.kernels import compile as compiling

INT8 = ["--op", "quantized_matmul", "--format", "int8", "--activation", "bf16"]


def fails(argv: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Runs an action that must be refused in one line that names `words`."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    told = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert told.startswith("tpu-stack: error: ")
    assert "\n" not in told
    for word in words:
        assert word in told


def test_the_actions_are_listed(capsys):
    assert main(["kernels"]) == 0
    listed = capsys.readouterr().out
    assert main(["kernels", "--help"]) == 0
    assert capsys.readouterr().out == listed
    for action in ("verify", "explain", "profile", "tune"):
        assert action in listed


@pytest.mark.parametrize("action", ["verify", "explain", "profile", "tune"])
def test_every_action_has_an_example(action, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["kernels", action, "--help"])
    assert stop.value.code == 0
    assert f"Example: tpu-stack kernels {action}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["verfy"], ["kernels action 'verfy'", "verify"]),
        (["verify", "--fromat", "int4"], ["--fromat", "--format"]),
        (["verify", "--format", "int5"], ["'int5'", "did you mean", "int"]),
        (["verify", "--op", "matmul"], ["'matmul'", "quantized_matmul"]),
        (["verify", "--chip", "v6"], ["'v6'", "'v6e'"]),
        (["verify", "--chip", "v4"], ["v4", "v5e"]),
        (["verify", "--shape", "16,x"], ["'16,x'", "16,4096,14336"]),
        (["verify", *INT8, "--shape", "16,4096"], ["M,K,N", "16,4096"]),
        (["verify", "--format", "int4", "--shape", "4,100,100"], ["K=100", "32"]),
        (["verify", "--write", "--chip", "v6e"], ["--write", "every chip"]),
        (["explain", "--format", "int4"], ["--chip"]),
        (["explain", "--format", "int3", "--chip", "8i"], ["'int3'", "did you mean"]),
        (["explain", "--format", "int4", "--chip", "cpu"], ["cpu", "v5e"]),
        (["profile", "--format", "int8", "--chip", "8i"], ["8i", "7x", "proxy"]),
        (["tune", "--chip", "8t"], ["8t", "7x", "proxy"]),
        (["tune", "--chip", "v6e", "--limit", "0"], ["--limit", "0", "at least 1"]),
    ],
)
def test_bad_input_is_one_line(argv, words, capsys):
    fails(["kernels", *argv], capsys, *words)


def test_explain_says_what_runs_and_why(tmp_path, capsys):
    out = tmp_path / "why.json"
    argv = ["--format", "int4_channel", "--chip", "8i", "--shape", "2048,4096,14336"]
    assert main(["kernels", "explain", *argv, "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "float8_e4m3fn x int4" in text
    assert "projected" in text
    found = json.loads(out.read_text())
    assert found["activation"] == "fp8"
    assert found["computed_as"] == ["float8_e4m3fn", "int4"]
    assert len(found["candidates"]) == 3


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(compiling, "has_compiler", lambda: False)
    monkeypatch.setattr("tpu_stack.planner.kernels.targets.has_compiler", lambda: False)


def test_without_libtpu_the_other_rungs_run(no_compiler, tmp_path, capsys):
    out = tmp_path / "ladder.json"
    argv = ["kernels", "verify", *INT8, "--shape", "3,256,130", "--json", str(out)]
    assert main(argv) == 0
    assert "not run: libtpu not installed" in capsys.readouterr().out
    report = json.loads(out.read_text())
    [found] = report["results"]
    assert found["interpret"]["shape"] == [3, 256, 130]
    assert found["interpret"]["ok"]
    assert all(row["ok"] for row in found["lowered"].values())
    assert set(found["compiled"]) == {"v5e", "v5p", "v6e", "7x"}
    assert report["failed"] == []


def test_without_libtpu_the_compiler_s_verbs_say_so(no_compiler, capsys):
    fails(["kernels", "profile", *INT8], capsys, "libtpu not installed")
    fails(["kernels", "tune", "--chip", "v6e"], capsys, "[aot]", "libtpu")
    fails(["kernels", "verify", "--write"], capsys, "[aot]", "libtpu")


def test_a_rung_that_does_not_hold_is_status_1(no_compiler, monkeypatch, capsys):
    good = case_registry.get_case("quantized_matmul", "int8", "bf16")
    bad = dataclasses.replace(good, limit=1e-30, small=(3, 256, 130), large=(16, 256, 128))
    monkeypatch.setattr(case_registry, "candidates", lambda: (bad,))
    assert main(["kernels", "verify", "--chip", "8i"]) == 1
    assert "failed: quantized_matmul int8 bf16: interpret: error" in capsys.readouterr().out
