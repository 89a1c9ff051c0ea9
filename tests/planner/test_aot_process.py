"""Outcomes other than a program: aborts, time-outs, refusals, no libtpu; and the cache around them.

A fake child stands for the compiler where its answer does not matter.
"""

import dataclasses
import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.planner.aot import answer
from tpu_stack.planner.aot import compile as compiling
from tpu_stack.planner.aot.answer import compile_spec
from tpu_stack.planner.aot.compile import compile_program, key_of
from tpu_stack.planner.aot.recompilation import changed, digest_of, source_digests
from tpu_stack.planner.aot.request import make_request
from tpu_stack.planner.aot.result import (
    Aborted,
    Compiled,
    CompilerMissing,
    OutOfMemory,
    Refused,
    TimedOut,
    as_json,
)
from tpu_stack.planner.aot.spec import CompileSpec

MESH = "data=2,fsdp=2,tensor=2"
EXCERPT = Path(__file__).parent / "data" / "v5e_2x4_mlp_step.hlo.txt"
CONFIG = ModelConfig(
    vocab_size=256, d_model=256, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=128, d_ff=256,
    max_seq_len=1024,
)  # fmt: skip
CHILD = """
import gzip, json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
does = os.environ["DOES"]
print("libtpu says something of its own")
print(json.dumps({"stage": "compiling"}), flush=True)
with open(os.environ["RUNS"], "a") as runs:
    runs.write("x")
if does == "abort":
    print("F0000 Check failed: the program is bad", file=sys.stderr, flush=True)
    os.abort()
if does == "killed":
    os.kill(os.getpid(), 9)
if does == "hang":
    time.sleep(60)
end = {"compiler_bytes": 1}
if does == "refuse":
    end["error"] = "JaxRuntimeError: UNIMPLEMENTED: no such thing"
if does == "user":
    end["user_error"] = "the TPU compiler has no topology v5e:2x2"
if does == "compile":
    text = Path(os.environ["EXCERPT"]).read_bytes()
    (folder / "program.hlo.gz").write_bytes(gzip.compress(text))
    end["matmul_flops"] = 5.0
    parts = ("arguments", "outputs", "aliased", "temporaries", "code")
    end["memory"] = dict(zip(parts, (100, 90, 80, 70, 60))) | {"peak": None}
print(json.dumps({"end": end}), flush=True)
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Sets what the child does; called without arguments, tells how often one ran."""
    (tmp_path / "fake_aot_child.py").write_text(CHILD)
    monkeypatch.setattr(compiling, "CHILD", "fake_aot_child")
    monkeypatch.setattr(compiling, "has_compiler", lambda: True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("EXCERPT", str(EXCERPT))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))

    def does(what: str | None = None) -> int:
        if what is not None:
            monkeypatch.setenv("DOES", what)
        runs = tmp_path / "runs"
        return len(runs.read_text()) if runs.exists() else 0

    return does


def request(**changes):
    spec = CompileSpec("tiny", "v5e:2x4", "train", MESH, batch_size=8, seq_len=64)
    return make_request(dataclasses.replace(spec, **changes), CONFIG)


def test_a_program_is_kept_and_found_again(child, tmp_path):
    child("compile")
    stages = []
    first = compile_program(request(), cache=tmp_path / "cache", stage=stages.append)
    assert isinstance(first, Compiled)
    assert not first.cached
    assert stages == ["compiling"]
    assert first.memory.total_bytes == 100 + 90 - 80 + 70 + 60
    assert first.target.mesh == {"data": 2, "fsdp": 2, "tensor": 2}
    assert first.hlo_text() == EXCERPT.read_text()
    again = compile_program(request(), cache=tmp_path / "cache")
    assert isinstance(again, Compiled)
    assert again == dataclasses.replace(first, cached=True)
    assert child() == 1
    json.dumps(as_json(again))


def test_another_batch_is_another_program_and_the_key_says_so(child, tmp_path):
    child("compile")
    compile_program(request(), cache=tmp_path / "cache")
    compile_program(request(batch_size=16), cache=tmp_path / "cache")
    assert child() == 2
    difference = changed(key_of(request()), key_of(request(batch_size=16)))
    assert difference == {"shapes.batch": (8, 16)}
    assert changed(key_of(request()), key_of(request(remat="dots"))) == {"remat": ("full", "dots")}


def test_changed_sources_make_another_key(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.py").write_text("x = 1")
    before = source_digests(("models",), tmp_path)
    (tmp_path / "models" / "notes.txt").write_text("no code")
    assert source_digests(("models",), tmp_path) == before
    (tmp_path / "models" / "a.py").write_text("x = 2")
    after = source_digests(("models",), tmp_path)
    assert list(changed(before, after)) == ["models"]
    assert digest_of(before) != digest_of(after)


def test_a_report_is_read_again_by_another_reader_without_a_compile(child, tmp_path):
    child("compile")
    first = compile_program(request(), cache=tmp_path / "cache")
    assert isinstance(first, Compiled)
    report = first.hlo.parent / "report.json"
    kept = json.loads(report.read_text())
    report.write_text(json.dumps(kept | {"reader": "older", "report": {}}))
    again = compile_program(request(), cache=tmp_path / "cache")
    assert isinstance(again, Compiled)
    assert again.report == first.report
    assert json.loads(report.read_text()) == kept
    assert child() == 1


@pytest.mark.parametrize("broken", ["result.json", "program.hlo.gz"])
def test_a_damaged_entry_is_compiled_anew(child, tmp_path, broken):
    child("compile")
    first = compile_program(request(), cache=tmp_path / "cache")
    assert isinstance(first, Compiled)
    (first.hlo.parent / broken).write_bytes(b"{")
    (first.hlo.parent / "report.json").unlink()
    again = compile_program(request(), cache=tmp_path / "cache")
    assert isinstance(again, Compiled)
    assert again.hlo_text() == EXCERPT.read_text()
    assert child() == 2


def test_an_abort_is_a_result_and_is_kept(child, tmp_path):
    child("abort")
    found = compile_program(request(), cache=tmp_path / "cache")
    assert isinstance(found, Aborted)
    assert found.message == "the compiler aborted, signal 6: F0000 Check failed: the program is bad"
    again = compile_program(request(), cache=tmp_path / "cache")
    assert again == dataclasses.replace(found, cached=True)
    assert child() == 1


def test_an_end_from_outside_is_not_kept(child, tmp_path):
    child("killed")
    assert isinstance(compile_program(request(), cache=tmp_path / "cache"), Aborted)
    child("compile")
    assert isinstance(compile_program(request(), cache=tmp_path / "cache"), Compiled)


def test_a_slow_compile_is_ended(child, tmp_path):
    child("hang")
    start = time.monotonic()
    found = compile_program(request(), cache=tmp_path / "cache", timeout_s=1.5)
    assert isinstance(found, TimedOut)
    assert found.limit_s == 1.5
    assert time.monotonic() - start < 30  # of the 60 that it would sleep
    child("compile")
    assert isinstance(compile_program(request(), cache=tmp_path / "cache"), Compiled)


def test_a_refusal_is_a_result_and_a_user_error_is_raised(child, tmp_path):
    child("refuse")
    found = compile_program(request(), cache=tmp_path / "cache")
    assert isinstance(found, Refused)
    assert "UNIMPLEMENTED" in found.message
    child("user")
    with pytest.raises(UserError, match="has no topology v5e:2x2"):
        compile_program(request(batch_size=16), cache=tmp_path / "cache")


def test_without_libtpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "libtpu", None)  # importing it fails
    assert find_spec("libtpu") is None
    found = compile_program(request(), cache=tmp_path)
    assert isinstance(found, CompilerMissing)
    assert "libtpu" in found.message


def test_the_words_alone_find_a_kept_answer(child, tmp_path, monkeypatch):
    child("compile")
    spec = CompileSpec("nano", "v5e:2x4", "train", MESH, batch_size=8, seq_len=64)
    first = compile_spec(spec, cache=tmp_path / "cache")

    def never(*_, **__):
        raise AssertionError("a kept answer was asked for again")

    monkeypatch.setattr(compiling, "compile_program", never)
    again = compile_spec(spec, cache=tmp_path / "cache")
    assert isinstance(first, Compiled)
    assert again == dataclasses.replace(first, cached=True)
    monkeypatch.setattr(answer, "versions", lambda: {"jax": "another"})
    with pytest.raises(AssertionError, match="asked for again"):
        compile_spec(spec, cache=tmp_path / "cache")


def test_a_kept_answer_imports_no_jax(child, tmp_path):
    child("compile")
    spec = CompileSpec("nano", "v5e:2x4", "train", MESH, batch_size=8, seq_len=64)
    compile_spec(spec, cache=tmp_path / "cache")
    script = (
        "import sys; from pathlib import Path\n"
        "from tpu_stack.planner.aot.answer import compile_spec\n"
        "from tpu_stack.planner.aot.spec import CompileSpec\n"
        f"found = compile_spec({spec!r}, cache=Path({str(tmp_path / 'cache')!r}))\n"
        "print(found.cached, 'jax' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "False"]


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu (the aot extra)")
def test_too_large_for_one_chip_really_compiled(tmp_path):
    config = CONFIG.replace(d_model=4096, d_ff=16384, n_layers=24)  # 18 GB of state in float32
    spec = CompileSpec("large", "v5e:1", "train", batch_size=1, seq_len=128)
    found = compile_program(make_request(spec, config), cache=tmp_path)
    assert isinstance(found, OutOfMemory)
    assert found.limit_bytes is not None
    assert found.used_bytes is not None
    assert found.used_bytes > found.limit_bytes
    again = compile_program(make_request(spec, config), cache=tmp_path)
    assert again == dataclasses.replace(found, cached=True)
