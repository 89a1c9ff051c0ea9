"""`tpu-stack plan simulate` from the command line."""

import json
from itertools import pairwise

import pytest

from tpu_stack.cli.main import main

SHORT = ("--seq-len", "64")


def _run(tmp_path, *argv):
    target = tmp_path / "out.json"
    assert main(["plan", "simulate", *argv, "--json", str(target)]) == 0
    return json.loads(target.read_text())


def test_training_terms_sum_and_everything_is_projected(tmp_path, capsys):
    found = _run(tmp_path, "--model", "llama3_70b", "--profile", "v5p:4x8x8")
    step = found["train_step"]
    assert sum(step["terms_s"].values()) == pytest.approx(step["step_s"])
    assert step["tokens_per_s"] == pytest.approx(256 * step["tokens_per_s_per_chip"])
    assert 0.4 < step["mfu"] < 0.75
    dollars = 4.20 / 3600 / step["tokens_per_s_per_chip"] * 1e6
    assert step["usd_per_million_tokens"] == pytest.approx(dollars)
    assert found["label"] == "projected"
    assert "projected" in capsys.readouterr().out


def test_decode_against_batch(tmp_path, capsys):
    argv = ["--model", "llama3_8b", "--profile", "v6e:4", "--program", "serve", "--format", "int8"]
    found = _run(tmp_path, *argv)
    steps = found["decode"]
    assert all(a["step_s"] < b["step_s"] for a, b in pairwise(steps))
    rates = [step["tokens_per_s"] for step in steps]
    assert rates == sorted(rates)
    assert steps[0]["fits"]
    assert not steps[-1]["fits"]
    assert "NO" in capsys.readouterr().out


def test_what_was_never_calibrated_is_said(tmp_path, capsys):
    found = _run(tmp_path, "--model", "llama3_70b", "--profile", "8i:8")
    assert any("extrapolated" in note for note in found["notes"])
    assert any("no price of 8i" in note for note in found["notes"])
    assert "extrapolated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "llama3_70b", "--profile", "v5p"], "say how many chips"),
        (["--model", "llama9", "--profile", "v5p:4x4x4"], "llama9"),
        (["--model", "nano", "--profile", "v6e:32x32"], "a pod has 256"),
        (
            ["--model", "nano", "--profile", "v6e:2x2", "--seq-len", "64", "--batch-size", "3"],
            "batch size 3",
        ),
        (["--model", "nano", "--profile", "8i:1", "--format", "int3"], "int3"),
    ],
)
def test_bad_input_is_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "simulate", *argv])
    assert stop.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert words in errors[0]
