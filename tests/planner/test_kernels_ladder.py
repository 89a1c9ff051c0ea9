"""The ladder over the registry: what must pass does, and planted faults do not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_stack.errors import UserError
from tpu_stack.hardware import CHIPS
from tpu_stack.planner.kernels import case_registry, verify
from tpu_stack.planner.kernels.case_registry import find_cases, get_case
from tpu_stack.planner.kernels.cases import array_bytes, parse_shape
from tpu_stack.planner.kernels.compile import Compiled, Job
from tpu_stack.planner.kernels.targets import COMPILE_TARGETS, compile_target
from tpu_stack.quant import FORMATS

SMALL = (3, 256, 130)


@pytest.fixture(scope="module")
def int8():
    return dataclasses.replace(get_case("quantized_matmul", "int8", "bf16"), small=SMALL)


def test_every_quantized_format_is_a_case():
    found = {case.format for case in find_cases("quantized_matmul", activation="bf16")}
    assert found == {name for name, fmt in FORMATS.items() if fmt.quantized}
    names = [case.name for case in case_registry.candidates()]
    assert len(set(names)) == len(names)


def test_abstract_operands_are_those_that_are_made():
    def shapes(operands):
        return jax.tree.map(lambda a: (a.shape, jnp.dtype(a.dtype)), operands)

    for format, activation in (
        ("int8", "int8"),
        ("nvfp4", "fp8"),
        ("int2", "bf16"),
        ("int1", "bf16"),
    ):
        case = get_case("quantized_matmul", format, activation)
        assert shapes(case.operands(SMALL, 0)) == shapes(case.abstract(SMALL)), case.name


def test_grouped_rows_are_ragged_and_some_are_padding():
    case = get_case("grouped_matmul", "int8", "bf16")
    for shape in (case.small, (19, 128, 130)):
        sizes = np.asarray(case.operands(shape, 0)["group_sizes"])
        assert sizes.shape == (8,)
        assert 0 in sizes
        assert len(set(sizes.tolist())) > 2
        assert 0 < sizes.sum() < shape[0]


def test_grouped_steps_and_bytes_are_those_of_random_routing():
    from tpu_stack.planner.kernels import compile as compiling
    from tpu_stack.planner.kernels.bundles import UNBOUNDED, Region, Schedule

    case, shape = get_case("grouped_matmul", "int4", "bf16"), (19, 128, 130)
    # Sorted rows in blocks of 16: a product for every pair that meets.
    owners = np.sort(np.random.default_rng(1).integers(0, 8, (4000, 19)))
    met = [len({(row // 16, expert) for row, expert in enumerate(owner)}) for owner in owners]
    busy = np.mean([len(set(owner)) for owner in owners.tolist()])
    region = Region(10, {})
    found = Compiled([Schedule("k", 20, region, region, {}, (2, UNBOUNDED, 1), 0, 0)])
    assert not found.schedules[0].bounded
    job = Job(case, "v6e", shape, {"tiles": (16, 256, 128)})
    counted = compiling._with_steps(job, found)
    steps = counted.schedules[0].grid[1]
    deviation = np.std(met) / 16  # of an average of 256
    assert abs(steps - np.mean(met)) < 4 * deviation
    assert counted.cycles == round(10 * 2 * steps) + 10
    expert_bytes = 128 * 130 // 2 + 4 * 130 * 2
    rest = 2 * 19 * 128 + 4 * 8 + 2 * 19 * 130
    assert case.nbytes(shape) == pytest.approx(rest + busy * expert_bytes, rel=0.03)


def test_bytes_count_packed_values():
    case = get_case("quantized_matmul", "int4", "bf16")
    m, k, n = case.large
    scales = k // 32 * n * 2
    assert case.nbytes(case.large) == 2 * m * k + k * n // 2 + scales + 2 * m * n
    assert array_bytes(jax.ShapeDtypeStruct((3, 3), jnp.int2)) == 3


def test_unknown_names_get_the_nearest():
    with pytest.raises(UserError, match="unknown op 'quantised_matmul'; did you mean 'quantized_m"):
        find_cases("quantised_matmul")
    with pytest.raises(UserError, match="unknown format 'int5'; did you mean"):
        find_cases(format="int5")
    with pytest.raises(UserError, match="unknown activation 'fp16'; did you mean 'bf16'"):
        find_cases(activation="fp16")


def test_a_pair_that_the_kernel_refuses_says_why(monkeypatch):
    def call(operands, **options):
        raise ValueError("x is float64")

    bad = dataclasses.replace(get_case("quantized_matmul", "int8", "bf16"), call=call)
    monkeypatch.setattr(case_registry, "candidates", lambda: (bad,))
    with pytest.raises(UserError, match=r"no kernel takes .* any, int8, any: x is float64"):
        find_cases(format="int8")


@pytest.mark.parametrize("text", ["16,4096", "16,4096,x", "16,0,8", "", "16;2;3"])
def test_a_shape_that_is_none_is_refused(text):
    case = get_case("quantized_matmul", "int8", "bf16")
    with pytest.raises(UserError):
        case.check_shape(parse_shape(text))


def test_a_misaligned_shape_says_why():
    case = get_case("quantized_matmul", "int4", "bf16")
    with pytest.raises(UserError, match="K=100 is not a multiple of int4's group 32"):
        case.check_shape((4, 100, 100))


def test_each_form_of_a_kernel_is_interpreted_once():
    case = get_case("quantized_matmul", "mxfp4", "bf16")
    found = verify.interpret(
        case, [case.small, *case.aligned], verify.kinds_of(("v5e", "v6e", "7x"))
    )
    # Ragged columns: decoded alike but for VMEM's bounds, and by turns on 7x. Whole lanes: bytes
    # of products 128 deep on v5e and 256 on v6e.
    assert found["programs"] == 3 + 4
    assert found["ok"]
    assert verify.kinds_of(("v6e",)) == [None, "TPU v6 lite"]


@pytest.mark.parametrize(
    ("op", "format", "activation", "shape"),
    [
        ("quantized_matmul", "int8", "int8", SMALL),
        ("quantized_matmul", "int4", "bf16", SMALL),
        ("quantized_matmul", "int1", "fp8", SMALL),
        ("grouped_matmul", "nvfp4", "bf16", (19, 128, 130)),
        ("kv_attention", "int8", "bf16", (2, 130, 4)),
        ("quantize_rows", "fp8_e4m3", "bf16", (5, 130)),
    ],
)
def test_the_kernel_holds_in_the_interpreter(op, format, activation, shape):
    case = get_case(op, format, activation)
    found = verify.interpret(case, [case.check_shape(shape)])
    assert found["ok"], found
    assert 0 < found["error"] <= case.limit


def test_a_wrong_kernel_does_not_hold(int8):
    def off_by(factor):
        return dataclasses.replace(int8, call=lambda a, **options: int8.call(a, **options) * factor)

    assert not verify.interpret(off_by(1.01), [SMALL])["ok"]
    assert verify.interpret(off_by(np.nan), [SMALL])["error"] == float("inf")


def test_a_kernel_that_reads_unset_memory_does_not_hold(int8):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def kernel(x_ref, o_ref, scratch_ref):
        o_ref[...] = x_ref[...] + scratch_ref[...]

    def call(operands, interpret, **options):
        m, n = SMALL[0], SMALL[2]
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
            scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)],
            interpret=interpret,
        )(jnp.zeros((m, n), jnp.float32))

    found = verify.interpret(dataclasses.replace(int8, call=call), [SMALL])
    assert found["error"] == float("inf")
    assert not found["ok"]


def test_what_the_interpreter_raises_is_the_finding(int8):
    def call(operands, **options):
        raise RuntimeError("a race\nwas found")

    found = verify.interpret(dataclasses.replace(int8, call=call), [SMALL])
    assert found["failure"] == "RuntimeError: a race was found"
    assert not found["ok"]


def test_the_ladder_lists_what_did_not_hold(int8, monkeypatch):
    results = {"v6e": Compiled(error="aborted, signal 6: bad"), "7x": Compiled(not_run="no libtpu")}
    monkeypatch.setattr(
        verify, "compile_jobs", lambda jobs, **_: [results[job.chip] for job in jobs]
    )
    bad = dataclasses.replace(int8, limit=1e-30, large=(16, 256, 128))
    notes = []
    [found] = verify.verify_cases([bad], ["v6e", "7x", "8i"], done=notes.append)
    assert notes == [f"{bad.name}: {what}" for what in ("interpret", "lowered 8i", "lowered 7x")]
    assert found["lowered"] == {"8i": {"ok": True}, "7x": {"ok": True}}
    interpreted, compiled = found["failed"]
    assert "interpret: error" in interpreted
    assert compiled == f"{bad.name}: compiled for v6e: aborted, signal 6: bad"


def test_a_large_shape_is_compiled_and_a_small_one_interpreted(int8):
    assert verify._interpreted_shapes(int8, (16, 4096, 14336)) == [int8.small, *int8.aligned]
    assert verify._interpreted_shapes(int8, (16, 256, 128)) == [(16, 256, 128)]


@pytest.mark.parametrize(("chip", "devices"), [("v5p", 1), ("7x", 2), ("v6e", 1)])
def test_cycles_are_of_one_device(chip, devices):
    # v5p is one device of two TensorCores, which share a kernel's grid; 7x is two devices.
    target = compile_target(chip)
    per_device = CHIPS[chip].require("hbm_bytes_per_s") / devices
    assert target.hbm_cycles(1e9) / target.clock_hz == pytest.approx(1e9 / per_device)


def test_the_fraction_is_of_the_longer_roof(int8):
    from tpu_stack.planner.kernels.bundles import Region, Schedule

    empty = Region(0, {})
    shape = (16, 4096, 14336)
    hbm = COMPILE_TARGETS["v6e"].hbm_cycles(int8.nbytes(shape))

    def row(bundles):
        schedule = Schedule("k", bundles, empty, Region(bundles, {}), {}, (1,), 0, 0)
        return verify.on_chip(Job(int8, "v6e", shape), Compiled([schedule]))

    assert row(100)["fraction"] == 1.0
    assert row(100)["bound"] == "HBM"
    twice = row(round(2 * hbm))
    assert twice["fraction"] == pytest.approx(0.5, rel=1e-4)
    assert twice["bound"] == "bundles"
    long = (2048, 4096, 14336)
    schedule = Schedule("k", 100, empty, Region(100, {}), {}, (1,), 0, 0)
    prefill = verify.on_chip(Job(int8, "v6e", long), Compiled([schedule]))
    assert prefill["mxu_cycles"] > prefill["hbm_cycles"] > 100
    assert (prefill["fraction"], prefill["bound"]) == (1.0, "MXU")  # never above the peak
    assert twice["support"] == "emulated"  # v6e multiplies int8 by int8, not bfloat16 by int8
