"""`plan compile`: what it prints and writes for each outcome, without a compiler."""

import json
from pathlib import Path

import pytest

from tpu_stack.cli import main as cli
from tpu_stack.cli.plan import compile as verb
from tpu_stack.errors import UserError
from tpu_stack.hardware.chips import get_chip
from tpu_stack.planner.aot import answer as answering
from tpu_stack.planner.aot.exposure import exposures, links_of
from tpu_stack.planner.aot.result import (
    Aborted,
    Allocation,
    Compiled,
    CompilerMissing,
    Memory,
    OutOfMemory,
    Target,
    TimedOut,
)
from tpu_stack.planner.hlo_program import read_program

EXCERPT = Path(__file__).parents[1] / "planner" / "data" / "v5e_2x4_mlp_step.hlo.txt"
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
HBM = int(get_chip("v5e").require("hbm_bytes"))
TARGET = Target("v5e:2x4", "v5e", "v5e", 8, MESH, HBM, HBM, "plain products", (False, False), 1.5e9)
PROXY = Target(
    "tpu7x:2x2x1", "7x", "8i", 8, MESH, 2 * HBM, HBM, "plain products", (False,) * 3, 2.2e9
)


def compiled(cached: bool) -> Compiled:
    report = read_program(EXCERPT.read_text(), MESH)
    links = links_of(TARGET.topology, TARGET.chip, MESH)
    times = exposures(report.collectives, links, TARGET.clock_hz)
    memory = Memory(2**30, 2**30, 2**30, 2**29, 2**20, 2**30)
    key = {"shapes": {"batch": 8, "seq_len": 64}}
    hlo = Path("program.hlo.gz")
    return Compiled(TARGET, memory, report, times, hlo, 1e9, 41.0, cached, 2**31, key)


@pytest.fixture
def answer(monkeypatch):
    """Sets what the compiler answers."""

    def is_now(result) -> None:
        monkeypatch.setattr(answering, "compile_spec", lambda *_, **__: result)

    return is_now


def test_prints_memory_collectives_and_operations(answer, capsys, tmp_path):
    answer(compiled(cached=True))
    file = tmp_path / "compile.json"
    assert verb.run(verb.Options(json=file)) == 0
    printed = capsys.readouterr().out
    for text in (
        "v5e:2x4 (8 JAX devices)", "no axis wraps", "batch 8, seq_len 64",
        "41.0 s when it was compiled (cached)",
        "1.5 GiB", "of v5e", "reduce-scatter", "fsdp", "not asynchronous", "on the wire: ",
        "rung 3", "projected",
    ):  # fmt: skip
        assert text in printed
    written = json.loads(file.read_text())
    assert written["outcome"] == "compiled"
    assert written["spec"]["model"] == "llama3_8b"
    assert written["memory"]["total_bytes"] == 2**30 + 2**29 + 2**20
    found = written["report"]["collectives"]
    assert len(found) == len(written["exposures"]) > 0
    assert {"kind", "bytes", "trips", "axes", "purpose", "cover_cycles"} < set(found[0])


def test_failures_are_said_and_exit_with_1(answer, capsys, tmp_path):
    largest = (Allocation(2**30, "f32[8,8]", "jit(step)/dot_general", "HLO temp"),)
    outcomes = {
        "OUT OF MEMORY: used 20.0 GiB of 16.0 GiB": OutOfMemory(
            TARGET, "Ran out", 20 * 2**30, 2**34, False, largest, 2.0, False
        ),
        "that is the HBM of 7x, the proxy; 8i has": OutOfMemory(
            PROXY, "Ran out", 20 * 2**30, 2**34, True, (), 2.0, False
        ),
        "NO PROGRAM: the compiler aborted": Aborted(TARGET, "the compiler aborted", 2.0, False),
        "TIMED OUT after 5 s": TimedOut(TARGET, 5.0),
    }
    for text, result in outcomes.items():
        answer(result)
        assert verb.run(verb.Options(json=tmp_path / "f.json")) == 1
        assert text in capsys.readouterr().out
        assert json.loads((tmp_path / "f.json").read_text())["outcome"] != "compiled"


def test_the_list_of_largest_allocations_is_printed(answer, capsys):
    largest = (Allocation(2**30, "f32[8,8]", "jit(step)/dot_general", "HLO temp"),)
    answer(OutOfMemory(TARGET, "Ran out", 2**35, 2**34, False, largest, 2.0, False))
    verb.run(verb.Options())
    printed = capsys.readouterr().out
    assert "largest allocations" in printed
    assert "jit(step)/dot_general" in printed


def test_missing_libtpu_is_one_line_and_still_written(answer, tmp_path):
    answer(CompilerMissing())
    with pytest.raises(UserError, match="libtpu"):
        verb.run(verb.Options(json=tmp_path / "m.json"))
    assert json.loads((tmp_path / "m.json").read_text())["outcome"] == "compiler missing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "v5e:32x32"], "a pod has 256"),
        (["--program", "tran"], "train"),
        (["--batch-sise", "3"], "perhaps you meant --batch-size"),
        (["--timeout", "-1"], "must be more than 0"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, message, tmp_path):
    monkeypatch.setitem(cli.VERBS, "plan", "what a model needs of which chips")
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "compile", "--cache", str(tmp_path), *arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
