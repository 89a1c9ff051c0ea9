"""Dispatch, tuning and the published matrix: choices made from facts and static counts."""

import json

import jax.numpy as jnp
import pytest

from tpu_stack.errors import UserError
from tpu_stack.hardware import get_chip
from tpu_stack.planner.kernels import (
    measure,
    tune,
)
from tpu_stack.planner.kernels.bundles import Region, Schedule
from tpu_stack.planner.kernels.case_registry import get_case
from tpu_stack.planner.kernels.compile import Compiled
from tpu_stack.planner.kernels.explain import explain
from tpu_stack.planner.kernels.settings import distinct_settings
from tpu_stack.planner.kernels.targets import compile_target

PREFILL, DECODE = (2048, 4096, 14336), (16, 4096, 14336)


@pytest.mark.parametrize(
    ("format", "chip", "multiplied"),
    [
        ("int4_channel", "8i", ("float8_e4m3fn", "int4")),
        ("int4_channel", "8t", ("float8_e4m3fn", "int4")),
        ("int8", "v5e", ("int8", "int8")),
        ("int8", "v6e", ("int8", "int8")),
        ("fp8_e4m3", "7x", ("float8_e4m3fn", "float8_e4m3fn")),
    ],
)
def test_where_the_product_binds_the_fastest_operands_run(format, chip, multiplied):
    found = explain(format, chip, PREFILL)
    assert found.computed_as == multiplied
    assert get_chip(chip).matmul_is_native(*multiplied)
    assert found.support.startswith("native")


@pytest.mark.parametrize("chip", ["v6e", "7x"])
@pytest.mark.parametrize("format", ["int8", "int4", "int1"])
def test_where_reading_binds_activations_stay_exact(format, chip):
    found = explain(format, chip, DECODE)
    assert found.activation == "bf16"
    assert found.chosen_by.startswith("no narrower activation")
    assert any("moving the operands binds (projected)" in reason for reason in found.reasons)


def test_an_activation_may_be_asked_for():
    found = explain("int8", "8i", DECODE, activation="int8")
    assert found.chosen_by == "requested"
    assert found.support.startswith("emulated")
    json.dumps(found.as_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("int3", "8i", DECODE), "unknown weight format 'int3'; did you mean"),
        (("int4", "8x", DECODE), "unknown chip '8x'; did you mean"),
        (("int4", "v4", DECODE), "not compiled or lowered for v4"),
        (("bf16", "8i", DECODE), "bf16 is not quantized"),
        (("int4", "8i", DECODE, "fp16"), "unknown activation 'fp16'; did you mean 'bf16'"),
        (("int4", "8i", (16, 100, 128)), "K=100 is not a multiple of int4's group 32"),
    ],
)
def test_what_cannot_be_explained_is_refused(asked, says):
    with pytest.raises(UserError, match=says):
        explain(*asked)


@pytest.mark.parametrize(
    ("format", "shape"),
    [("int8", DECODE), ("int4", (2048, 4096, 4096)), ("nvfp4", DECODE), ("int1", (5, 640, 200))],
)
def test_settings_are_distinct_and_fit(format, shape):
    case, target = get_case("quantized_matmul", format, "bf16"), compile_target("v5p")
    found = distinct_settings(case, target, shape)
    assert len({(s.tiles, s.scale_mode) for s in found}) == len(found) >= 1
    assert all(2 * s.block_bytes < target.vmem_bytes for s in found)
    for setting in (found[0], found[-1]):
        options = {"tiles": setting.tiles, "scale_mode": setting.scale_mode}
        case.out_shape(shape, **options)  # the kernel takes it


def test_cores_of_a_device_get_as_many_blocks_of_columns_in_every_setting():
    case = get_case("quantized_matmul", "nvfp4", "bf16")
    widths = {s.tiles[2] for s in distinct_settings(case, compile_target("v5p"), DECODE)}
    assert {512, 1024, 1792} == widths
    assert all(-(-14336 // width) % 2 == 0 for width in widths)
    one_core = {s.tiles[2] for s in distinct_settings(case, compile_target("v5e"), DECODE)}
    assert 2048 in one_core - widths  # seven blocks


def schedule(loop: int, steps: int) -> Schedule:
    return Schedule("k", loop + 10, Region(loop, {}), Region(10, {}), {}, (1, steps), 0, 1 << 20)


def test_the_search_takes_the_least_cycles(monkeypatch):
    case = get_case("quantized_matmul", "int4", "bf16")

    def compile_jobs(jobs, done, **_):
        found = []
        for job in jobs:
            done(job)
            bk, bn = job.options["tiles"][1:]
            if (bk, bn) == (4096, 512):
                found.append(Compiled(error="refused: too much"))
            else:
                steps = (4096 // bk) * (14336 // bn)
                found.append(Compiled([schedule(bk * bn // (2000 if bk == 512 else 1000), steps)]))
        return found

    monkeypatch.setattr(tune, "compile_jobs", compile_jobs)
    notes = []
    found = tune.search(case, "v6e", DECODE, done=notes.append)
    assert len(notes) == len(found)
    best, worst = found[0], found[-1]
    assert best.tiles[1] == 512
    assert worst.cycles is None
    assert worst.error == "refused: too much"
    assert sum(c.current for c in found) == 1
    costs = [c.cycles for c in found if c.cycles is not None]
    assert costs == sorted(costs)
    assert best.cycles == max(best.hbm_cycles, best.issued) + best.first_load
    # Bundles bind at 1000 values a bundle: 4096 * 14336 / 1000 is over the HBM cycles of 4.5 bits.
    assert tune.search(case, "v6e", DECODE, limit=1)[0].current


def test_on_the_chip_itself_wall_clock_decides(monkeypatch):
    case = get_case("quantized_matmul", "int4", "bf16")
    found = [
        tune.Candidate((16, 2048, bn), "before", cycles, current=bn == 128)
        for bn, cycles in ((1024, 100), (512, 110), (256, 120), (128, 130))
    ]
    assert tune.refine(case, "v6e", DECODE, found, top=2) == found  # no v6e here
    seconds = {1024: 3e-5, 512: 1e-5, 128: 2e-5}
    monkeypatch.setattr(measure, "local_chip", lambda: "v6e")
    monkeypatch.setattr(measure, "measure", lambda case, shape, tiles, **_: seconds[tiles[2]])
    refined = tune.refine(case, "v6e", DECODE, found, top=2)
    assert [c.tiles[2] for c in refined] == [512, 128, 1024, 256]
    assert tune.beats(refined[0], refined[1])
    assert not tune.beats(refined[2], refined[1])
    assert tune.beats(found[0], found[3])
    assert tune.refine(case, "7x", DECODE, found, top=2) == found


def test_a_call_is_timed_without_its_first():
    calls = []

    def call():
        calls.append(None)
        return jnp.zeros(())

    assert measure.median_seconds(call, calls=3, rounds=2) > 0
    assert len(calls) == 1 + 3 * 2
    assert measure.local_chip() is None


@pytest.mark.parametrize(
    ("op", "shape", "least"),
    [
        ("kv_attention", (16, 4096, 32), 20),
        ("kv_attention", (3, 300, 8), 4),
        ("quantize_rows", (2048, 4096), 5),
        ("quantize_rows", (5, 64), 1),
    ],
)
def test_other_ops_have_settings_that_their_kernels_take(op, shape, least):
    case, target = get_case(op, "int8", "bf16"), compile_target("v5p")
    found = distinct_settings(case, target, shape)
    assert len({s.tiles for s in found}) == len(found) >= least
    for setting in found:
        case.out_shape(shape, tiles=setting.tiles)
        assert 0 < setting.block_bytes <= case.nbytes(shape)
        assert setting.call_bytes <= case.nbytes(shape)


def test_long_steps_of_attention_pay_for_what_short_sequences_leave_empty():
    case, target = get_case("kv_attention", "bf16", "bf16"), compile_target("7x")
    shares = {s.tiles[0]: s.step_share for s in distinct_settings(case, target, (16, 4096, 32))}
    assert shares[32] == 1.0  # one step holds any sequence
    assert shares[16] == 0.75
    # Lengths 1 to 4096 in steps of 128 tokens: their mean number is 16.5 of 32.
    assert shares[1] == 16.5 / 32


def test_settings_of_experts_are_what_the_kernel_takes():
    case, target = get_case("grouped_matmul", "int4", "bf16"), compile_target("7x")
    found = distinct_settings(case, target, (37, 256, 200))
    assert {s.scale_mode for s in found} == {None, "before", "after_group"}  # None: some of each
    for setting in found:
        case.out_shape((37, 256, 200), **setting.options)
        assert 0 < setting.block_bytes <= setting.call_bytes == case.nbytes((37, 256, 200))


@pytest.mark.parametrize("rows", [0, 16, 33])
def test_rows_of_a_block_fill_tiles(rows):
    case = get_case("quantize_rows", "int8", "bf16")
    with pytest.raises(ValueError, match=rf"tiles \({rows},\): .* all 64 rows or a multiple of 32"):
        case.out_shape((64, 256), tiles=(rows,))
