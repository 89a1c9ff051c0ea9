"""The verb `serve bench`: a real engine under both loops, and what is refused."""

import json
import sys

import pytest

from tpu_stack.cli.main import main
from tpu_stack.models.presets import PRESETS
from tpu_stack.serving.engine import build
from tpu_stack.serving.engine_options import EngineOptions
from tpu_stack.sharding.profiles import get_profile


@pytest.fixture
def tiny(monkeypatch):
    """A model of a second under a preset's name, and no programs for batches nobody sends."""
    import dataclasses

    small = dataclasses.replace(
        PRESETS["nano"],
        vocab_size=64,
        d_model=64,
        n_layers=1,
        d_ff=128,
        n_heads=4,
        n_kv_heads=4,
        max_seq_len=64,
    )
    monkeypatch.setitem(PRESETS, "tiny", small)
    monkeypatch.setattr(build, "CHUNKS", (64,))
    monkeypatch.setattr(build, "PROMPTS", (1,))


@pytest.mark.parametrize(
    "loop",
    [
        ["--streams", "3"],
        ["--rate", "50"],
        pytest.param(["--prefill", "8t:4", "--decode", "8i:4"], marks=pytest.mark.slow),
    ],
)
def test_a_real_engine_answers_every_request_in_full(tiny, loop, tmp_path, capsys):
    out = tmp_path / "bench.json"
    argv = ["serve", "bench", "--model", "tiny", "--requests", "6", "--lengths", "4-20:2-6"]
    assert main([*argv, *loop, "--cache-dtype", "int8", "--json", str(out)]) == 0
    said = json.loads(out.read_text())
    assert said["completed"] == said["requests"] == 6
    assert said["recompilations"] == 0
    assert said["cache_dtype"] == "int8"
    assert said["hbm_utilisation"] is None  # emulated
    assert set(said["ttft_ms"]) == {"p50", "p95", "p99"}
    where = "8i:4" if "--decode" in loop else "8i"
    assert f"tiny (int8), {where} emulated on CPU" in capsys.readouterr().out
    assert said.get("prefill_profile") == ("8t:4" if "--prefill" in loop else None)


def test_the_peer_runs_after_each_run(tiny, tmp_path, capsys):
    """A stand-in interpreter, whose runs take 2, 1 and 4 s for eight tokens."""
    fake, script = tmp_path / "python", tmp_path / "program.py"
    script.write_text("""import json, sys
print(json.dumps({"name": "a peer", "dtype": sys.argv[-1]}), flush=True)
for seconds, _ in zip((2, 1, 4), sys.stdin):
    print(json.dumps({"seconds": seconds}), flush=True)
""")
    fake.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    fake.chmod(0o755)
    out = tmp_path / "bench.json"
    argv = ["serve", "bench", "--model", "tiny", "--requests", "2", "--lengths", "4:4"]
    asked = ["--repeats", "3", "--peer-python", str(fake), "--peer-dtype", "bfloat16"]
    assert main([*argv, *asked, "--json", str(out)]) == 0
    said = json.loads(out.read_text())
    peer, ours = said["peer"], said["runs_new_tokens_per_s"]
    assert (peer["name"], peer["dtype"]) == ("a peer", "bfloat16")
    assert peer["runs_new_tokens_per_s"] == [4.0, 8.0, 2.0]
    assert peer["new_tokens_per_s"] == 4.0
    pairs = [own * rate for own, rate in zip(peer["ratios"], [4.0, 8.0, 2.0], strict=True)]
    assert sorted(pairs) == pytest.approx(ours)
    assert peer["ratio"] == sorted(peer["ratios"])[1]
    assert f"{peer['ratio']:.2f}x ({min(peer['ratios']):.2f}x to" in capsys.readouterr().out


def test_host_overhead_is_of_one_engine_with_room_for_its_steps(tiny, capsys, tmp_path):
    out = tmp_path / "bench.json"
    argv = ["serve", "bench", "--model", "tiny", "--requests", "2", "--lengths", "4:2"]
    with pytest.raises(SystemExit):
        main([*argv, "--host-overhead", "--json", str(out)])
    assert "the window is 64: set --max-length to 88 or more" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "name a bundle, or a --model"),
        (["--model", "nano", "--requests", "0"], "--requests is 0"),
        (["--model", "nano", "--streams", "-1"], "--streams is -1"),
        (["--model", "nano", "--rate", "0"], "--rate is 0"),
        (["--model", "nano", "--lengths", "12"], "--lengths has '12'"),
        (["--model", "nano", "--peer-dtype", "fp8"], "--peer-dtype is fp8"),
        (["--model", "nono"], "nono"),
        (["--model", "nano", "--prefill", "8t:4"], "prefill and decode go together"),
        (["--model", "nano", "--prefill", "8t", "--decode", "8i:4"], "prefill is 8t; say on how"),
        (
            ["--model", "nano", "--prefill", "8t:4", "--decode", "8i:4", "--devices", "2"],
            "take the place of profile, mesh and devices",
        ),
        (["--model", "nano", "--draft", "no-draft"], "no-draft is not a bundle"),
        (["nowhere"], "nowhere"),
    ],
)
def test_bad_options_are_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["serve", "bench", *argv])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_bundle_is_served_where_the_word_is_no_action(capsys):
    """`serve FOLDER` is the server, `serve bench` the benchmark."""
    with pytest.raises(SystemExit):
        main(["serve", "no-such-folder"])
    assert "no-such-folder is not a bundle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "compute", "cache"),
    [
        ({}, "bfloat16", "bfloat16"),
        ({"dtype": "float32"}, "float32", "float32"),
        ({"cache_dtype": "fp8"}, "bfloat16", "float8_e4m3fn"),
        ({"dtype": "float32", "cache_dtype": "int8"}, "float32", "int8"),
    ],
)
def test_precision_is_the_profiles_unless_asked(asked, compute, cache):
    precision = EngineOptions(**asked).applied(get_profile("8i")).precision
    assert (precision.compute, precision.cache) == (compute, cache)
