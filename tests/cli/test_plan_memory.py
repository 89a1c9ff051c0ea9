"""`tpu-stack plan memory`: the verdict, its exit status and its JSON."""

import json

import pytest

from tpu_stack.cli.main import main

TOO_LARGE = ["--model", "llama3_8b", "--profile", "v5e:4x4", "--batch-size", "64"]


def plan_memory(*words):
    return main(["plan", "memory", *words])


def test_what_fits_exits_0_and_says_what_holds_the_memory(capsys, tmp_path):
    path = tmp_path / "m.json"
    assert plan_memory("--json", str(path)) == 0
    out = capsys.readouterr().out
    assert "FITS" in out
    assert "optimizer state" in out
    result = json.loads(path.read_text())
    assert result["fits"]
    assert result["changes"] == []
    assert result["total_bytes"] == result["code_bytes"] + sum(t["bytes"] for t in result["terms"])


def test_what_does_not_fit_exits_1_and_says_what_would(capsys, tmp_path):
    path = tmp_path / "m.json"
    assert plan_memory(*TOO_LARGE, "--json", str(path)) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    assert "--accumulate" in out
    result = json.loads(path.read_text())
    assert all(change["total_bytes"] <= result["limit_bytes"] for change in result["changes"])


def test_the_change_offered_is_accepted_and_fits(capsys, tmp_path):
    path = tmp_path / "m.json"
    plan_memory(*TOO_LARGE, "--json", str(path))
    change = json.loads(path.read_text())["changes"][0]
    assert plan_memory(*TOO_LARGE, *change["text"].split()) == 0


def test_cases_are_shown_with_the_compiler_s_figures(capsys):
    assert plan_memory("--cases") == 0
    assert "1.0 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "llama9"], "llama3"),
        (["--profile", "v5e:4x4", "--mesh", "tensor=3"], "mesh"),
        (["--accumulate", "0"], "accumulate is 0"),
        (["--profile", "v5e"], "how many chips"),
    ],
)
def test_bad_input_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        plan_memory(*words)
    told = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert "\n" not in told
    assert said in told
