"""The registry of weight formats."""

import dataclasses

import pytest

from tpu_stack.errors import UserError
from tpu_stack.quant import FORMATS, get_format


def test_names_and_bits():
    assert set(FORMATS) == {"float32", "bf16", "int8", "int4"}
    assert get_format("int4").bits_per_weight() == 4.5
    assert get_format("int8").bits_per_weight(1024) == 8 + 32 / 1024
    assert get_format("bf16").bits_per_weight(1024) == 16
    assert not get_format("float32").quantized
    assert get_format("int8").quantized


def test_a_format_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_format("int8").bits = 7  # type: ignore[misc]


@pytest.mark.parametrize(("wrong", "near"), [("int44", "int4"), ("INT8", "int8"), ("bf61", "bf16")])
def test_unknown_format_suggests_the_nearest(wrong, near):
    with pytest.raises(UserError, match=rf"unknown weight format '{wrong}'; did you mean '{near}'"):
        get_format(wrong)


def test_a_name_like_nothing_lists_what_is_known():
    with pytest.raises(UserError, match="known formats: float32, bf16, int8, int4"):
        get_format("zzz")
