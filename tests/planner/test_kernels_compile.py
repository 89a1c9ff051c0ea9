"""The child that compiles: refusals, aborts and slow compiles are results; the cache; no libtpu."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from tpu_stack.errors import UserError
from tpu_stack.planner.kernels import compile as compiling
from tpu_stack.planner.kernels import compiler_process
from tpu_stack.planner.kernels.case_registry import get_case
from tpu_stack.planner.kernels.compile import Compiled, Job, compile_case, compile_jobs, lower_case
from tpu_stack.planner.kernels.verify import on_chip

CHILD = """
import json, os, shutil, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
for request in json.loads((folder / "requests.json").read_text()):
    own = folder / "dump" / str(request["index"])
    own.mkdir()
    answer = {"index": request["index"]}
    if request["does"] == "abort":
        print("F0000 Check failed: the kernel is bad", file=sys.stderr, flush=True)
        os.abort()
    if request["does"] == "hang":
        time.sleep(60)
    if request["does"] == "refuse":
        answer["error"] = "refused: NotImplementedError: no"
    if request["does"] == "compile":
        shutil.copytree(os.environ["FAKE_DUMP"], own, dirs_exist_ok=True)
        answer["estimated_cycles"] = 40
    print("libtpu says something of its own")
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    (tmp_path / "fake_compile_child.py").write_text(CHILD)
    monkeypatch.setattr(compiler_process, "CHILD", "fake_compile_child")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAKE_DUMP", str(Path(__file__).parent / "data" / "kernel_dump"))


def requests(*does: str) -> list[dict]:
    return [{"index": index, "does": what} for index, what in enumerate(does)]


def test_a_crash_costs_only_its_own_request(child):
    asked = requests("compile", "abort", "refuse", "empty", "compile")
    asked[3]["does"] = "nothing"  # answers, but with no dump and no cycles
    found = list(compiler_process.answers(asked[:3] + asked[4:], timeout_s=30))
    assert [answer.index for answer in found] == [0, 1, 2, 4]
    assert found[0].schedules[0].name == "kernel_int4"
    assert found[0].xla_cycles == 40
    assert found[1].error == (
        "the compiler aborted, signal 6: F0000 Check failed: the kernel is bad"
    )
    assert found[2].error == "refused: NotImplementedError: no"
    assert found[3].schedules == found[0].schedules
    assert all(answer.lasting for answer in found)


def test_a_compile_without_a_dump_is_an_answer_that_is_not_kept(child):
    [answer] = compiler_process.answers(requests("nothing"), timeout_s=30)
    assert "no schedule of a Pallas kernel" in (answer.error or "")
    assert not answer.lasting


def test_a_compile_that_takes_too_long_is_ended(child):
    hung, after = compiler_process.answers(requests("hang", "refuse"), timeout_s=1.0)
    assert hung.error == "the compiler took over 1 s"
    assert not hung.lasting
    assert after.index == 1


@pytest.fixture
def case():
    return dataclasses.replace(get_case("quantized_matmul", "int8", "bf16"), large=(16, 256, 128))


def test_results_are_kept_by_content(case, tmp_path, monkeypatch):
    asked = []

    def answers(requests, timeout_s):
        for request in requests:
            asked.append(request)
            yield compiler_process.Answer(request["index"], xla_cycles=7)

    monkeypatch.setattr(compiling, "has_compiler", lambda: True)
    monkeypatch.setattr(compiling, "answers", answers)
    first = compile_case(case, "v6e", cache=tmp_path)
    assert first == compile_case(case, "v6e", cache=tmp_path)
    assert len(asked) == 1
    compile_case(case, "7x", cache=tmp_path)
    compile_case(case, "v6e", (16, 256, 256), cache=tmp_path)
    compile_case(case, "v6e", cache=tmp_path, tiles=(16, 128, 128))
    assert len(asked) == 4
    monkeypatch.setattr(compiling, "libtpu_version", lambda: "9.9.9")
    compile_case(case, "v6e", cache=tmp_path)
    assert len(asked) == 5
    for path in tmp_path.iterdir():
        path.write_text("{ half a file")
    compile_case(case, "7x", cache=tmp_path)
    assert len(asked) == 6


def test_source_lines_are_no_part_of_the_content():
    def key(lines, body="abc", rows="bf16"):
        text = rf"{{\22body\22: \22{body}\22, \22debug_locations\22: \22{lines}\22}}"
        case = get_case("quantized_matmul", "int8", rows)
        return compiling._key(text, Job(case, "v6e", case.small))

    assert key("one") == key("two")
    assert key("one") != key("one", body="abd")
    assert key("one") != key("one", rows="fp8")  # factors of rows come in a layout of their own


def test_a_kernel_that_cannot_be_lowered_is_a_result(case, tmp_path, monkeypatch):
    def call(operands, **options):
        raise NotImplementedError("Mosaic has no such thing")

    monkeypatch.setattr(compiling, "has_compiler", lambda: True)
    bad = dataclasses.replace(case, call=call)
    [found] = compile_jobs([Job(bad, "v6e", bad.large)], cache=tmp_path)
    assert found.error == "not lowered: NotImplementedError: Mosaic has no such thing"
    assert lower_case(bad, "8i") == "NotImplementedError: Mosaic has no such thing"
    assert lower_case(case, "8i") is None
    plain = dataclasses.replace(case, call=lambda operands, **options: operands["x"])
    assert lower_case(plain, "8t") == "lowered without a Pallas kernel"


def test_without_libtpu_rung_3_is_not_run(case, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "has_compiler", lambda: False)
    found = compile_case(case, "v6e", cache=tmp_path)
    assert found == Compiled(not_run="libtpu not installed")
    row = on_chip(Job(case, "v6e", case.large), found)
    assert row == {"ok": None, "not_run": "libtpu not installed"}


def test_a_chip_without_a_compiler_is_refused(case):
    with pytest.raises(UserError, match="cannot compile for 8i; 7x is its proxy"):
        compile_case(case, "8i")
    with pytest.raises(UserError, match="did you mean 'v6e'"):
        compile_case(case, "v6")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [aot]")
def test_the_real_compiler_gives_a_schedule(case, tmp_path: Path):
    full = get_case("quantized_matmul", "int4", "bf16")
    jobs = [Job(full, chip, full.large) for chip in ("v5p", "v6e", "7x")]
    kernels = []
    for found in compile_jobs(jobs, cache=tmp_path):
        assert found.error is None
        kernels.append(max(found.schedules, key=lambda schedule: schedule.executed))
        assert kernels[-1].loop.bundles > 0
        assert kernels[-1].loop.slots["MATMUL"] > 0
    assert kernels[1].steps == 2 * kernels[0].steps  # v5p splits the grid in two
