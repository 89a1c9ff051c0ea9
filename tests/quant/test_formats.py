"""The registry of weight formats."""

import dataclasses

import jax.numpy as jnp
import pytest

from tpu_stack.errors import UserError
from tpu_stack.quant import FORMATS, get_format

QUANTIZED = [fmt for fmt in FORMATS.values() if fmt.quantized]

# Bits a weight with its scale, K = 1024: bits + scale bits / group.
BITS = {
    "int8": 8 + 32 / 1024,
    "fp8_e4m3": 8 + 32 / 1024,
    "fp8_e5m2": 8 + 32 / 1024,
    "int4": 4 + 16 / 32,
    "int4_g64": 4 + 16 / 64,
    "int4_g128": 4 + 16 / 128,
    "int4_channel": 4 + 32 / 1024,
    "mxfp4": 4 + 8 / 32,
    "nvfp4": 4 + 8 / 16,
    "int2": 2 + 16 / 32,
    "int2_g64": 2 + 16 / 64,
    "int2_g128": 2 + 16 / 128,
    "ternary": 2 + 16 / 32,
    "ternary_g64": 2 + 16 / 64,
    "ternary_g128": 2 + 16 / 128,
    "int1": 1 + 16 / 32,
    "int1_g64": 1 + 16 / 64,
    "int1_g128": 1 + 16 / 128,
}


def test_names_and_bits():
    assert set(FORMATS) == {"float32", "bf16", *BITS}
    for name, bits in BITS.items():
        fmt = get_format(name)
        assert fmt.quantized
        assert fmt.name == name
        assert fmt.bits_per_weight(1024) == bits
    assert get_format("bf16").bits_per_weight(1024) == 16
    assert not get_format("float32").quantized


@pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda fmt: fmt.name)
def test_fields_agree_with_each_other(fmt):
    assert fmt.kind == ("bits" if fmt.bits == 1 else fmt.kind)
    assert fmt.low <= -abs(fmt.high) < 0 < fmt.high
    assert fmt.low <= fmt.scale_anchor <= fmt.high
    if fmt.kind == "integer":
        info = jnp.iinfo(fmt.dtype)
        assert fmt.bits == info.bits
        assert info.min <= fmt.low - fmt.offset
        assert fmt.high - fmt.offset <= info.max
    if fmt.kind == "float":
        assert fmt.high == float(jnp.finfo(fmt.dtype).max)
    low, high = fmt.scale_search
    assert 0 < low <= 1 <= high
    assert jnp.dtype(fmt.operand).itemsize == 1
    assert fmt.group is None or fmt.granule % fmt.group == 0


def test_packed_bytes_of_a_column():
    assert get_format("int8").column_bytes(33) == 33
    assert get_format("int4").column_bytes(33) == 17
    assert get_format("int2").column_bytes(33) == 9
    for rows, words in [(1, 8), (256, 8), (257, 16), (512, 16)]:
        assert get_format("int1").rows_stored(rows) == words
        assert get_format("int1").column_bytes(rows) == 4 * words
    assert get_format("int1").granule == 256
    assert get_format("int2").granule == 32
    assert get_format("int8").granule is None


def test_a_format_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_format("int8").bits = 7  # type: ignore[misc]


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("int44", "int4"),
        ("INT8", "int8"),
        ("bf61", "bf16"),
        ("mxfp", "mxfp4"),
        ("tenary", "ternary"),
    ],
)
def test_unknown_format_suggests_the_nearest(wrong, near):
    with pytest.raises(UserError, match=rf"unknown weight format '{wrong}'; did you mean '{near}'"):
        get_format(wrong)


def test_a_name_like_nothing_lists_what_is_known():
    with pytest.raises(UserError, match="known formats: float32, bf16, int8, fp8_e4m3, fp8_e5m2"):
        get_format("zzz")
