"""Roofline arithmetic against figures worked by hand."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu_stack.errors import UserError
from tpu_stack.hardware import CHIP_NAMES, Work, decode_ridge_batch, get_chip, roofline

amounts = st.floats(min_value=0, max_value=1e18)


def test_compute_bound_by_hand():
    # 8t: 996.1e12 FLOP/s bf16, 6.4e12 B/s, 2.4e12 / 2 B/s of ICI one way.
    work = Work(flops_per_chip=996.1e12, hbm_bytes_per_chip=3.2e12, ici_bytes_per_chip=0.3e12)
    found = roofline(work, get_chip("8t"))
    assert found.compute_s == 1.0
    assert found.hbm_s == 0.5
    assert found.ici_s == found.exposed_ici_s == 0.25
    assert found.time_s == 1.25
    assert found.bound == "compute"
    assert found.ridge_flops_per_byte == 996.1e12 / 6.4e12
    assert found.intensity_flops_per_byte == 996.1e12 / 3.2e12
    assert (found.rung, found.label) == (4, "projected")


def test_memory_bound_with_native_and_emulated_operands():
    # 8i: 8.6e12 B/s; fp8 x int4 at 8.808e15 native, int8 x int8 at bf16's 1.101e15 emulated.
    native = Work(8.808e15, 17.2e12, operands=("fp8", "int4"))
    found = roofline(native, get_chip("8i"))
    assert (found.compute_s, found.hbm_s, found.time_s) == (1.0, 2.0, 2.0)
    assert (found.bound, found.rate.support) == ("memory", "native")
    emulated = roofline(Work(8.808e15, 17.2e12, operands=("int8", "int8")), get_chip("8i"))
    assert emulated.compute_s == 8.0
    assert (emulated.bound, emulated.rate.support) == ("compute", "emulated")


def test_overlap_hides_collectives_under_the_busy_time():
    work = Work(996.1e12, 3.2e12)  # busy for 1 s on 8t
    chip = get_chip("8t")
    assert roofline(work, chip, ici_s=3.0).time_s == 4.0
    assert roofline(work, chip, ici_s=3.0, overlap=0.5).time_s == 3.5
    assert roofline(work, chip, ici_s=3.0, overlap=1.0).time_s == 3.0
    assert roofline(work, chip, ici_s=0.5, overlap=1.0).time_s == 1.0
    assert roofline(work, chip, ici_s=3.0, overlap=1.0).bound == "ici"
    with pytest.raises(ValueError, match="overlap"):
        roofline(work, chip, overlap=1.5)


def test_per_device_amounts_count_both_devices_of_a_chip():
    per_device = {"flops_per_device": 1e12, "hbm_bytes_per_device": 2e9, "ici_bytes_per_device": 3}
    assert Work.from_devices(get_chip("8i"), **per_device) == Work(2e12, 4e9, 6)
    assert Work.from_devices(get_chip("8t"), **per_device) == Work(1e12, 2e9, 3)


def test_decode_ridge_on_8i_is_the_design_s():
    """DESIGN.md: W4A16 about batch 32, W4 with fp8 activations about 256."""
    chip = get_chip("8i")
    assert decode_ridge_batch(chip, 4, "bf16", "int4") == pytest.approx(32, rel=0.01)
    assert decode_ridge_batch(chip, 4, "fp8", "int4") == pytest.approx(256, rel=0.01)
    # By hand: 4 / 8 / 2 * 1.101e15 / 8.6e12.
    assert decode_ridge_batch(chip, 4, "bf16", "int4") == pytest.approx(32.0058, rel=1e-5)
    with pytest.raises(ValueError, match="weight_bits"):
        decode_ridge_batch(chip, 0, "bf16", "int4")


def test_decode_ridge_is_where_the_roofs_meet():
    chip, parameters = get_chip("7x"), 1e9
    batch = decode_ridge_batch(chip, 8, "fp8", "fp8")
    found = roofline(Work(2 * parameters * batch, parameters, operands=("fp8", "fp8")), chip)
    assert found.compute_s == pytest.approx(found.hbm_s, rel=1e-12)


@given(
    name=st.sampled_from([name for name in CHIP_NAMES if name != "cpu"]),
    flops=amounts,
    hbm=amounts,
    ici=amounts,
    overlap=st.floats(min_value=0, max_value=1),
)
def test_time_lies_between_the_largest_roof_and_the_sum(name, flops, hbm, ici, overlap):
    found = roofline(Work(flops, hbm, ici), get_chip(name), overlap=overlap)
    roofs = (found.compute_s, found.hbm_s, found.ici_s)
    assert found.time_s >= max(roofs) * (1 - 1e-12)
    assert found.time_s <= max(roofs[:2]) + roofs[2]
    assert found.label == "projected"
    by_name = dict(zip(("compute", "memory", "ici"), roofs, strict=True))
    assert by_name[found.bound] == max(roofs)


def test_missing_facts_stop_the_answer():
    with pytest.raises(UserError, match="chip cpu has no bf16_flops_per_s"):
        roofline(Work(1, 1), get_chip("cpu"))


def test_work_is_finite_and_not_negative():
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="not an amount of work"):
            Work(1, bad)


def test_json_is_plain():
    found = roofline(Work(1e12, 0.0), get_chip("8i"))
    read = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert read["intensity_flops_per_byte"] is None
    assert read["label"] == "projected"
    assert read["rate"]["support"] == "native"
