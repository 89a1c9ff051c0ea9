"""What the compiler's answers become: buffers labelled, a refusal's figure, or an error."""

import gzip
from typing import Any

import pytest

from tpu_stack.errors import UserError
from tpu_stack.models.presets import get_preset
from tpu_stack.planner.aot.request import make_request
from tpu_stack.planner.aot.result import Compiled, CompilerMissing, Memory, OutOfMemory, TimedOut
from tpu_stack.planner.aot.spec import CompileSpec
from tpu_stack.planner.hlo_program import ProgramReport
from tpu_stack.planner.memory import confirm as confirming

PROGRAM = """HloModule step, is_scheduled=true

ENTRY %main (w: f32[2,1024,4096]) -> f32[2,1024,4096] {
  %w = f32[2,1024,4096]{2,1,0:T(8,128)} parameter(0), metadata={op_name="state.params['wq']"}
  %x = f32[8,4096]{1,0:T(8,128)} fusion(%w), kind=kLoop, calls=%f, metadata={op_name="jit(f)/dot"}
  ROOT %y = f32[8,4096]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%f
}
"""
REQUEST = make_request(
    CompileSpec("llama3_8b", "v5e:2x2", "train", batch_size=32, seq_len=1024),
    get_preset("llama3_8b").replace(n_layers=2),
)
NONE: Any = None


def answer(monkeypatch, result):
    monkeypatch.setattr(confirming, "compile_program", lambda *args, **how: result)
    return confirming.confirm(REQUEST)


def test_a_program_gives_its_total_and_its_largest_buffers(monkeypatch, tmp_path):
    path = tmp_path / "program.hlo.gz"
    path.write_bytes(gzip.compress(PROGRAM.encode()))
    memory = Memory(arguments=100, outputs=70, aliased=60, temporaries=30, code=7)
    report = ProgramReport((), ())
    found = answer(
        monkeypatch,
        Compiled(NONE, memory, report, (), path, 0.0, 1.0, cached=True, compiler_bytes=0),
    )
    assert (found.total_bytes, found.fits, found.exact) == (147, True, True)
    assert found.held_bytes == 4 * 4096 * (2 * 1024 + 8 + 8)
    first = found.largest[0]
    assert first.what == "state.params['wq']"
    assert (
        first.owner
        == "all 2 layers; layers, tokens or d_model (fsdp=4), d_model or heads x head_dim"
    )


def test_a_refusal_for_memory_is_a_figure(monkeypatch):
    refused = OutOfMemory(NONE, "", 99, 50, True, (), 1.0, cached=False)
    found = answer(monkeypatch, refused)
    assert (found.total_bytes, found.fits, found.exact) == (99, False, False)


@pytest.mark.parametrize("result", [CompilerMissing(), TimedOut(NONE, 1.0)])
def test_no_answer_is_an_error_in_a_line(monkeypatch, result):
    with pytest.raises(UserError):
        answer(monkeypatch, result)
