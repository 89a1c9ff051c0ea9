"""Reading what a compiled program holds: tiles, live ranges, sharing. HLO and counts by hand."""

import pytest

from tpu_stack.planner.hlo_text import parse
from tpu_stack.planner.memory.buffers import array_bytes, most_held
from tpu_stack.planner.memory.tiles import padded_bytes, tiled_bytes

LOOP = """HloModule step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%body (state: (f32[8,128], f32[8,128])) -> (f32[8,128], f32[8,128]) {
  %state = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %a = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=0
  %b = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %wide = f32[8,1024]{1,0:T(8,128)} broadcast(%a), dimensions={0,1}
  %next = f32[8,128]{1,0:T(8,128)} fusion(%wide, %b), kind=kLoop, calls=%f
  ROOT %out = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) tuple(%a, %next)
}

%condition (s: (f32[8,128], f32[8,128])) -> pred[] {
  %s = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  ROOT %yes = pred[]{:T(128)} constant(true)
}

ENTRY %main (x: f32[8,128], y: f32[8,128]) -> (f32[8,128], f32[8,128]) {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %y = f32[8,128]{1,0:T(8,128)} parameter(1)
  %near = f32[8,128]{1,0:T(8,128)S(1)} copy(%y)
  %first = f32[8,256]{1,0:T(8,128)} fusion(%near), kind=kLoop, calls=%f
  %second = f32[8,128]{1,0:T(8,128)} fusion(%first), kind=kLoop, calls=%f
  %init = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) tuple(%x, %second)
  %loop = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) while(%init), condition=%condition, body=%body
  %p = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=0
  %q = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  %sum = f32[8,128]{1,0:T(8,128)} add(%p, %q)
  ROOT %result = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) tuple(%sum, %q)
}
"""  # noqa: E501
CHOICE = """HloModule step, is_scheduled=true

%first (one: (f32[8,128])) -> f32[8,128] {
  %one = (f32[8,128]{1,0:T(8,128)}) parameter(0)
  ROOT %same = f32[8,128]{1,0:T(8,128)} get-tuple-element(%one), index=0
}

%second (two: (f32[8,128], f32[8,128])) -> f32[8,128] {
  %two = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %other = f32[8,128]{1,0:T(8,128)} get-tuple-element(%two), index=1
  %wide = f32[8,512]{1,0:T(8,128)} broadcast(%other), dimensions={0,1}
  ROOT %narrow = f32[8,128]{1,0:T(8,128)} fusion(%wide), kind=kLoop, calls=%f
}

ENTRY %main (which: pred[], x: f32[8,128]) -> f32[8,128] {
  %which = pred[]{:T(128)} parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} parameter(1)
  %a = (f32[8,128]{1,0:T(8,128)}) tuple(%x)
  %b = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) tuple(%x, %x)
  ROOT %out = f32[8,128]{1,0:T(8,128)} conditional(%which, %b, %a), BRANCHES
}
"""
TILE = 4 * 8 * 128


@pytest.mark.parametrize(
    ("type_text", "expected"),
    [
        ("f32[8,128]{1,0:T(8,128)}", TILE),
        ("f32[9,100]{1,0:T(8,128)}", 2 * TILE),
        ("f32[100,9]{0,1:T(8,128)}", 2 * TILE),
        ("bf16[2,151936]{1,0:T(2,128)(2,1)}", 2 * 2 * 151_936),
        ("s4[64,128]{1,0:T(64,128)(8,1)E(4)}", 64 * 128 // 2),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 0),
        ("s32[]{:T(128)}", 4 * 128),
    ],
)
def test_bytes_follow_the_layout(type_text, expected):
    assert array_bytes(type_text) == expected


def test_a_buffer_lives_until_it_is_last_read_and_a_loop_works_in_place():
    held = most_held(parse(LOOP), LOOP.split("\n", 1)[0])
    own = {buffer.instruction: buffer.bytes for buffer in held if buffer.argument is None}
    assert own == {"second": TILE, "wide": 8 * TILE}
    assert [buffer.bytes for buffer in held if buffer.argument is not None] == [TILE, TILE]


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%second, %first}", "true_computation=%second, false_computation=%first"],
)
def test_each_branch_has_an_operand_of_its_own_and_the_larger_counts(branches):
    held = most_held(parse(CHOICE.replace("BRANCHES", branches)), "")
    own = {buffer.instruction: buffer.bytes for buffer in held if buffer.argument is None}
    assert own == {"wide": 4 * TILE, "out": TILE}


def test_an_operand_that_the_compiler_writes_over_is_one_buffer():
    shared = LOOP.replace(
        "%second = f32[8,128]{1,0:T(8,128)} fusion(%first), kind=kLoop, calls=%f",
        "%twin = f32[8,256]{1,0:T(8,128)} fusion(%first), kind=kLoop, calls=%f, backend_config="
        '{"aliasing_operands":{"lists":[{"indices":["0","1"]}]}}\n'
        "  %second = f32[8,128]{1,0:T(8,128)} fusion(%twin, %first), kind=kLoop, calls=%f",
    ).replace("f32[8,1024]", "f32[8,128]")
    held = most_held(parse(shared), shared.split("\n", 1)[0])
    own = {buffer.instruction: buffer.bytes for buffer in held if buffer.argument is None}
    assert own == {"first": 2 * TILE, "second": TILE}


@pytest.mark.parametrize(
    ("shape", "bits", "expected"),
    [
        ((151_936, 1), 32, 4 * 151_936),  # lies along the lanes
        ((32, 4096, 64), 32, 4 * 32 * 4096 * 64),
        ((8, 1024, 192), 16, 2 * 8 * 1024 * 192),
        ((16, 100), 32, 4 * 16 * 128),
        ((1000,), 32, 4 * 1024),
        ((), 32, 4 * 128),
    ],
)
def test_padding_is_the_least_that_a_choice_of_lanes_gives(shape, bits, expected):
    assert padded_bytes(shape, bits) == expected


def test_tiles_pad_both_axes():
    assert tiled_bytes([3, 9, 130], 32, [8, 128]) == 4 * 3 * 16 * 256
