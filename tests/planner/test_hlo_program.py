"""Cycles, cover, sources and what collectives serve, from small texts and the saved excerpt."""

import json
from pathlib import Path

import pytest

from tpu_stack.hardware.chips import get_chip
from tpu_stack.planner.aot.exposure import Exposure, exposures, links_of
from tpu_stack.planner.hlo_attribution import argument_name
from tpu_stack.planner.hlo_cycles import Costs, operations
from tpu_stack.planner.hlo_frames import Frames, Source
from tpu_stack.planner.hlo_loops import Scope
from tpu_stack.planner.hlo_program import ProgramReport, read_program
from tpu_stack.planner.hlo_text import parse
from tpu_stack.planner.links import one_execution_s

DATA = Path(__file__).parent / "data"
MESH = {"data": 2, "fsdp": 2, "tensor": 2}

# Written by hand in libtpu 0.0.52's own forms: the tables of frames, a scan over a stack of
# weights that gathers each, and a permute with that loop and a copy between its start and its end.
PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=8

FileNames
1 "/somewhere/tpu_stack/planner/programs.py"
2 "/somewhere/tpu_stack/models/layers.py"
3 "/somewhere/tpu_stack/quant/matmul.py"

FunctionNames
1 "trace_train"
2 "Block.hidden.<locals>.step"
3 "matmul"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=88 end_line=88 column=1 end_column=2}
3 {file_name_id=3 function_name_id=3 line=54 end_line=54 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

%body (carried: (s32[], bf16[3,64,8])) -> (s32[], bf16[3,64,8]) {
  %carried = (s32[], bf16[3,64,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %w = bf16[3,64,8]{2,1,0} get-tuple-element(%carried), index=1
  %zero = s32[] constant(0)
  %slice = bf16[1,64,8]{2,1,0} dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,64,8}
  %gather = bf16[1,128,8]{2,1,0} all-gather(%slice), channel_id=1, replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}, dimensions={1}, metadata={op_name="jit(step)/jvp()/while/body/dot_general" stack_frame_id=3}
  %fusion.1 = bf16[8]{0} fusion(%gather), kind=kLoop, calls=%inner, metadata={op_name="jit(step)/jvp()/while/body/mul" stack_frame_id=2}, backend_config={"window_config":{"estimated_cycles":"700"}}
  ROOT %out = (s32[], bf16[3,64,8]{2,1,0}) tuple(%next, %w)
}

%condition (carried.1: (s32[], bf16[3,64,8])) -> pred[] {
  %carried.1 = (s32[], bf16[3,64,8]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carried.1), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %three), direction=LT
}

%inner (x: bf16[1,128,8]) -> bf16[8] {
  %x = bf16[1,128,8]{2,1,0} parameter(0)
  ROOT %y = bf16[8]{0} slice(%x), slice={[0:8]}
}

ENTRY %main (param.1: f32[3,64,8], param.2: bf16[8,16]) -> bf16[8,16] {
  %param.1 = f32[3,64,8]{2,1,0} parameter(0), metadata={op_name="state.params[\\'blocks\\'][\\'mlp\\'][\\'w_up\\']"}
  %param.2 = bf16[8,16]{1,0} parameter(1), metadata={op_name="batch[\\'tokens\\']"}
  %cast = bf16[3,64,8]{2,1,0} convert(%param.1), backend_config={"window_config":{"estimated_cycles":"50"}}
  %first = s32[] constant(0)
  %start = (s32[], bf16[3,64,8]{2,1,0}) tuple(%first, %cast)
  %permute = (bf16[8,16]{1,0}, bf16[8,16]{1,0}, u32[], u32[]) collective-permute-start(%param.2), channel_id=2, source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
  %loop = (s32[], bf16[3,64,8]{2,1,0}) while(%start), condition=%condition, body=%body
  %copy.1 = bf16[8,16]{1,0} copy(%param.2), backend_config={"window_config":{"estimated_cycles":"11"}}
  %done = bf16[8,16]{1,0} collective-permute-done(%permute)
  %kernel = bf16[8,16]{1,0} custom-call(%done), custom_call_target="tpu_custom_call"
  ROOT %sum = bf16[8,16]{1,0} add(%kernel, %copy.1), backend_config={"window_config":{"estimated_cycles":"9"}}
}
"""  # noqa: E501


def test_cycles_multiply_out_loops_and_kernels_have_none():
    report = read_program(PROGRAM, MESH)
    found = {op.name: (op.cycles, op.trips) for op in report.operations}
    assert found == {
        "cast": (50, 1),
        "fusion.1": (700, 3),
        "copy.1": (11, 1),
        "kernel": (None, 1),
        "sum": (9, 1),
    }
    assert report.cycles == 50 + 3 * 700 + 11 + 9
    assert report.unestimated == 1
    assert report.operations[0].name == "fusion.1"
    assert report.operations[0].source == "step (models/layers.py:88)"


def test_a_product_that_the_cost_model_does_not_know_is_no_number():
    """The compiler then writes nearly 2**63."""
    text = PROGRAM.replace('"estimated_cycles":"9"', '"estimated_cycles":"9223372036854775807"')
    report = read_program(text, MESH)
    assert report.cycles == 50 + 3 * 700 + 11
    assert report.unestimated == 2


def test_collectives_name_what_they_serve_and_what_covers_them():
    report = read_program(PROGRAM, MESH)
    permute, gather = report.collectives
    assert gather.purpose == "gather of blocks.mlp.w_up, forward"
    assert (gather.trips, gather.axes, gather.cover_cycles) == (3, ("fsdp",), None)
    assert permute.purpose == "move of batch.tokens"
    assert (permute.overlapped, permute.cover_cycles) == (True, 3 * 700 + 11)


def test_exposed_time_is_what_the_cover_leaves():
    report = read_program(PROGRAM, MESH)
    links = links_of("v5e:2x4", "v5e", MESH)
    clock_hz = 1e12  # so fast that nothing hides the permute
    permute, gather = exposures(report.collectives, links, clock_hz)
    own = one_execution_s("collective-permute", 8 * 16 * 2, links.links(("tensor",), 2))
    assert permute == Exposure(own, (3 * 700 + 11) / clock_hz)
    assert permute.exposed_s == pytest.approx(own - permute.cover_s)
    assert gather.exposed_s == gather.own_s > 0
    slow, _ = exposures(report.collectives, links, 1e3)
    assert slow.exposed_s == 0
    unknown, _ = exposures(report.collectives, links, None)
    assert unknown.exposed_s == unknown.own_s
    assert get_chip("v5e").devices(1) == 1  # a permute over tensor leaves the chip


def test_sources_prefer_the_model_over_the_product_it_calls():
    frames = Frames.of(PROGRAM)
    assert [str(s) for s in frames.stack("stack_frame_id=3")] == [
        "matmul (/somewhere/tpu_stack/quant/matmul.py:54)",
        "Block.hidden.<locals>.step (/somewhere/tpu_stack/models/layers.py:88)",
        "trace_train (/somewhere/tpu_stack/planner/programs.py:10)",
    ]
    source = frames.source("stack_frame_id=3")
    assert source is not None
    assert source.place == "models/layers.py:88"
    assert source.line()  # that file has such a line
    assert source._replace(place="models/none.py:1").line() == ""
    assert frames.source("no frame") is None
    assert Frames.of("HloModule m\n\nENTRY %e () -> s32[] {\n}").callers == {}


@pytest.mark.parametrize(
    ("op_name", "name"),
    [
        ("state.params['blocks']['mlp']['w_up']", "blocks.mlp.w_up"),
        (r"state.params[\'embed\']", "embed"),
        ("params['blocks']['attention']['wq'].values", "blocks.attention.wq.values"),
        ("state.opt_state[1][0].mu['embed']", "state.opt_state.1.0.mu.embed"),
        ("batch['tokens']", "batch.tokens"),
        ("", None),
    ],
)
def test_argument_names(op_name, name):
    assert argument_name(op_name) == name


def test_cover_of_the_excerpt_is_between_start_and_done():
    """Backend configs were cut from the excerpt, so give every fusion of it 100 cycles."""
    text = (DATA / "v5e_2x4_mlp_step.hlo.txt").read_text()
    lines = [
        f'{line}, backend_config={{"estimated_cycles":"100"}}' if " fusion(" in line else line
        for line in text.splitlines()
    ]
    found = read_program("\n".join(lines), MESH).collectives
    chained = [c for c in found if c.overlapped and c.kind == "all-gather"]
    assert [c.cover_cycles is not None and c.cover_cycles % 100 == 0 for c in chained] == [True] * 3
    assert all((c.cover_cycles or 0) >= 100 for c in chained)
    assert all(c.cover_cycles is None for c in found if not c.overlapped)


def test_a_conditional_counts_its_costliest_branch():
    text = """HloModule branches, num_partitions=1
%a (x: s32[]) -> s32[] {
  %x = s32[] parameter(0)
  ROOT %xa = s32[] copy(%x), backend_config={"estimated_cycles":"5"}
}
%b (x.1: s32[]) -> s32[] {
  %x.1 = s32[] parameter(0)
  ROOT %xb = s32[] copy(%x.1), backend_config={"estimated_cycles":"8"}
}
ENTRY %main (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  ROOT %c = s32[] conditional(%p, %p, %p), branch_computations={%a, %b}
}
"""
    module = parse(text)
    assert [op.name for op in operations(module, Frames.of(text))] == ["xb"]
    conditional = module.entry.instructions["c"]
    assert Costs(module).instruction(Scope(module.entry), conditional) == 8


def test_a_report_survives_json():
    report = read_program((DATA / "v5e_2x4_mlp_step.hlo.txt").read_text(), MESH)
    assert ProgramReport.from_json(json.loads(json.dumps(report.as_json()))) == report


@pytest.mark.parametrize(
    ("place", "inside"),
    [
        ("/a/tpu_stack/models/layers.py:8", "models/layers.py:8"),
        ("/a/tpu_stack/tpu_stack/models/layers.py:8", "models/layers.py:8"),
        ("/a/site-packages/tpu_stack/training/step.py:8", "training/step.py:8"),
        ("/a/tpu_stack/.venv/lib/site-packages/jax/_src/lax.py:8", ""),
        ("/a/tpu_stack/tests/planner/test_x.py:8", ""),
        ("/a/models/layers.py:8", ""),
    ],
)
def test_the_package_is_found_in_a_checkout_of_any_name(place, inside):
    source = Frames({1: (Source("f", place), 0)}).source("stack_frame_id=1")
    assert (source.place if source else "") == inside
