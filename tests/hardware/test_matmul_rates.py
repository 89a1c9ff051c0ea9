"""Which operand pairs are native, and the rate a pair is charged at."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu_stack.errors import UserError
from tpu_stack.hardware import CHIP_NAMES, get_chip
from tpu_stack.hardware.matmul import EXACT_CASTS, dtype_name

TPUS = tuple(name for name in CHIP_NAMES if name != "cpu")
WIDE = {"float32", "bfloat16"}
FP8 = {"float8_e5m2", "float8_e4m3fn"}
OLD_FLOAT = {"float32", "bfloat16", "float8_e5m2", "float8_e4m3b11fnuz"}
INT8, INT4 = {"int8", "uint8"}, {"int4", "uint4"}


def _pairs(*products):
    return {pair for left, right in products for pair in itertools.product(left, right)}


_V5 = _pairs((OLD_FLOAT, OLD_FLOAT), (INT8, INT8), (INT4, INT4))
# facts/chips.md, "Native matmul operands", written out.
NATIVE = {
    "v4": _pairs((WIDE, WIDE | {"int8"})),
    "v5e": _V5,
    "v5p": _V5,
    "v6e": _V5,
    "7x": _pairs((WIDE, WIDE | FP8), (FP8, FP8)),
    "8i": _pairs((WIDE, WIDE | FP8 | INT4), (FP8, FP8 | INT4)),
    "8t": _pairs((WIDE, WIDE | FP8 | {"int4"}), (FP8, FP8 | {"int4"})),
    "cpu": set(),
}


@pytest.mark.parametrize("name", CHIP_NAMES)
def test_native_pairs_are_the_table_s_and_no_other(name):
    chip = get_chip(name)
    found = {
        pair for pair in itertools.product(EXACT_CASTS, repeat=2) if chip.matmul_is_native(*pair)
    }
    assert found == NATIVE[name]


@pytest.mark.parametrize(
    ("chip", "lhs", "rhs", "rate", "support", "computed_as"),
    [
        # W4A16 on 8i: int4 has no rate of its own there, so bf16's.
        ("8i", "bf16", "int4", 1.101e15, "native", ("bfloat16", "int4")),
        ("8i", "fp8", "int4", 8.808e15, "native", ("float8_e4m3fn", "int4")),
        ("8i", "int8", "int8", 1.101e15, "emulated", ("bfloat16", "bfloat16")),
        ("8i", "fp4", "fp4", 8.808e15, "emulated", ("float8_e4m3fn", "float8_e4m3fn")),
        ("8i", "int4", "int4", 8.808e15, "emulated", ("float8_e4m3fn", "int4")),
        # Mixed natives run at the slower operand's rate: fp8 5.98e15 against int4 11.95e15.
        ("8t", "fp8", "int4", 5.9769e15, "native", ("float8_e4m3fn", "int4")),
        ("8t", "fp8", "uint4", 5.9769e15, "emulated", ("float8_e4m3fn", "float8_e4m3fn")),
        ("8t", "int8", "int8", 0.9961e15, "emulated", ("bfloat16", "bfloat16")),
        ("7x", "fp8", "int4", 4.6e15, "emulated", ("float8_e4m3fn", "float8_e4m3fn")),
        ("v5e", "int8", "int8", 394e12, "native", ("int8", "int8")),
        ("v5e", "int4", "uint4", 788e12, "native", ("int4", "uint4")),
        ("v5e", "int8", "int4", 394e12, "emulated", ("int8", "int8")),
        ("v5e", "int2", "int2", 788e12, "emulated", ("int4", "int4")),
        # e4m3fn is not v5e's fp8; a cast to that never happens, so bf16.
        ("v5e", "fp8", "fp8", 197e12, "emulated", ("bfloat16", "bfloat16")),
        ("v5e", "float8_e5m2", "float8_e5m2", 197e12, "native", ("float8_e5m2", "float8_e5m2")),
        ("v6e", "bf16", "int4", 920e12, "emulated", ("bfloat16", "bfloat16")),
        ("v4", "bf16", "int8", 275e12, "native", ("bfloat16", "int8")),
        ("v4", "int8", "int8", 275e12, "emulated", ("bfloat16", "int8")),
        ("v5p", "float16", "bf16", 459e12, "emulated", ("float32", "bfloat16")),
    ],
)
def test_rates(chip, lhs, rhs, rate, support, computed_as):
    found = get_chip(chip).peak_flops_per_s(lhs, rhs)
    assert found.flops_per_s_per_chip == rate
    assert (found.support, found.computed_as) == (support, computed_as)
    assert ("not native" in found.note) == (support == "emulated")


@given(
    name=st.sampled_from(TPUS),
    lhs=st.sampled_from(sorted(EXACT_CASTS)),
    rhs=st.sampled_from(sorted(EXACT_CASTS)),
)
def test_every_pair_has_a_positive_rate_through_a_native_pair(name, lhs, rhs):
    chip = get_chip(name)
    rate = chip.peak_flops_per_s(lhs, rhs)
    assert rate.flops_per_s_per_chip > 0
    assert chip.matmul_is_native(*rate.computed_as)
    assert (rate.support == "native") == chip.matmul_is_native(lhs, rhs)
    assert rate.computed_as[0] in (lhs, *EXACT_CASTS[lhs])
    assert rate.computed_as[1] in (rhs, *EXACT_CASTS[rhs])


def _every_finite_value(dtype: np.dtype) -> np.ndarray:
    """All finite values of a type of up to 16 bits, as float32 (which holds each exactly)."""
    if dtype.name.startswith(("int", "uint")):
        info = ml_dtypes.iinfo(dtype)
        return np.arange(int(info.min), int(info.max) + 1).astype(np.float32)
    if dtype.itemsize == 2:
        codes = np.arange(2**16, dtype=np.uint16)
    else:
        codes = np.arange(2 ** ml_dtypes.finfo(dtype).bits, dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        values = codes.view(dtype).astype(np.float32)
    return values[np.isfinite(values)]


@pytest.mark.parametrize(
    ("source", "target"), [(s, t) for s, casts in EXACT_CASTS.items() for t in casts]
)
def test_casts_are_exact(source, target):
    values = _every_finite_value(np.dtype(source))
    assert len(values) > 3
    np.testing.assert_array_equal(values.astype(np.dtype(target)).astype(np.float32), values)


def test_float32_says_which_precision_its_rate_means():
    rate = get_chip("8t").peak_flops_per_s("float32", "float32")
    assert rate.support == "native"
    assert "one bfloat16 pass" in rate.note


def test_types_and_aliases_are_names():
    import jax.numpy as jnp

    assert dtype_name(jnp.bfloat16) == dtype_name("bf16") == dtype_name(np.dtype("bfloat16"))
    assert dtype_name(ml_dtypes.int4) == "int4"
    assert dtype_name(np.float32) == "float32"


@pytest.mark.parametrize("bad", ["float8_e4m3", "bfloat61", "float64", "complex64", ""])
def test_unknown_types_are_one_line(bad):
    with pytest.raises(UserError) as error:
        get_chip("8i").peak_flops_per_s(bad, "int4")
    assert f"{bad!r} is not a matmul operand type" in str(error.value)
    assert "\n" not in str(error.value)


def test_cpu_has_no_rate():
    with pytest.raises(UserError, match="chip cpu has no bf16_flops_per_s"):
        get_chip("cpu").peak_flops_per_s("bf16", "bf16")
