"""`tpu-stack plan search`: what it prints and writes, compiles that cannot be, and bad input."""

import json

import pytest

from tpu_stack.cli.main import main
from tpu_stack.planner.aot.result import CompilerMissing, OutOfMemory, Target
from tpu_stack.planner.search import confirm as confirming

DECODE = ["plan", "search", "--chips", "v6e:4", "8i:4", "--goal", "decode-throughput"]


def test_it_prints_the_best_and_the_front_and_writes_files(tmp_path, capsys):
    wrote, drawn = tmp_path / "found.json", tmp_path / "front.png"
    assert main([*DECODE, "--top", "3", "--json", str(wrote), "--plot", str(drawn)]) == 0
    told = capsys.readouterr().out
    assert "best by throughput, projected" in told
    assert "Pareto front: throughput against latency" in told
    assert "candidates/s" in told
    assert "8i:4: no source gives a price" in told
    assert "8i:4: extrapolated: no decode row" in told or "v6e:4, 8i:4: extrapolated" in told
    found = json.loads(wrote.read_text())
    assert len(found["best"]) == 3
    best = found["best"][0]
    assert best["tokens_per_s"] == pytest.approx(best["batch"] / best["step_s"])
    assert sum(best["terms_s"].values()) == pytest.approx(best["step_s"])
    assert found["candidates"] > found["fitting"] > 0
    assert "projected" in found["rung"]
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_training_is_ranked_against_headroom(tmp_path, capsys):
    drawn = tmp_path / "front.svg"
    argv = ["plan", "search", "--model", "qwen3_0_6b", "--chips", "8t:4", "--batch", "32"]
    assert main([*argv, "--attention", "plain", "--plot", str(drawn)]) == 0
    told = capsys.readouterr().out
    assert "throughput against memory headroom, projected" in told
    assert "attention is taken to be scores written to memory" in told
    assert "memory headroom" in drawn.read_text()


def test_confirm_shows_what_the_compiler_said_beside(monkeypatch, tmp_path, capsys):
    answers = []

    def compile_spec(spec, *, cache, timeout_s, stage):
        stage("compiling")
        chip, hbm = spec.profile.partition(":")[0], 32 * 2**30
        target = Target("v6e:2x2", "v6e", chip, 4, {}, hbm, hbm, "", (False, False))
        kinds = (
            CompilerMissing(),
            OutOfMemory(target, "too large", 40 * 2**30, 32 * 2**30, False, (), 1.0, cached=False),
        )
        answers.append(spec)
        return kinds[len(answers) - 1]

    monkeypatch.setattr(confirming, "compile_spec", compile_spec)
    wrote = tmp_path / "found.json"
    argv = ["plan", "search", "--chips", "v6e:4", "--goal", "decode-throughput"]
    assert main([*argv, "--confirm", "2", "--json", str(wrote)]) == 0
    told = capsys.readouterr().out
    assert "the best, by the TPU compiler (rung 3)" in told
    assert "not available" in told
    assert "the TPU compiler (libtpu) is not installed" in told
    row = next(line for line in told.splitlines() if "out of memory" in line)
    assert "40.0 GiB" in row
    confirmed = json.loads(wrote.read_text())["confirmed"]
    assert [one["fits"] for one in confirmed] == [None, False]
    assert [spec.mesh for spec in answers] == [
        ",".join(f"{axis}={size}" for axis, size in one["plan"]["mesh"].items())
        for one in confirmed
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--goal", "speed"], ["goal"]),
        (["--model", "llama3_8"], ["'llama3_8'", "llama3_8b"]),
        (["--chips", "v6:8"], ["'v6'", "'v6e'"]),
        (["--goal", "decode-latency", "--latency-ms", "0"], ["--latency-ms is 0"]),
        (["--top", "0"], ["--top is 0"]),
        (["--confirm", "-1"], ["--confirm is -1"]),
        (["--timeout", "0"], ["--timeout is 0"]),
        (["--plot", "front.gif"], ["--plot front.gif", ".png"]),
        (["--batchs", "4"], ["--batchs", "--batch"]),
        (["--chips", "v5e:1"], ["nothing fits; the nearest, v5e:1", "weights and optimizer state"]),
    ],
)
def test_bad_input_is_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "search", *argv])
    told = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert told.startswith("tpu-stack: error: ")
    assert "\n" not in told
    for word in words:
        assert word in told
