"""Chip facts agree with jax's table, keep every disagreement, and invent nothing."""

import subprocess
import sys

import pytest
from jax.experimental.pallas import tpu as pltpu

from tpu_stack.errors import UserError
from tpu_stack.hardware import CHIP_NAMES, CHIPS, Fact, chip_of_device_kind, get_chip
from tpu_stack.hardware.chips import FACT_NAMES

TPUS = tuple(name for name in CHIP_NAMES if name != "cpu")

# Written out here rather than read from the code: cores per chip, and JAX devices per chip.
CORES = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1, "7x": 2, "8t": 1, "8i": 2}
DEVICES = {"v4": 1, "v5e": 1, "v5p": 1, "v6e": 1, "7x": 2, "8t": 1, "8i": 2, "cpu": 1}

PER_CORE = {
    "hbm_bytes": "hbm_capacity_bytes",
    "hbm_bytes_per_s": "mem_bw_bytes_per_second",
    "vmem_bytes": "vmem_capacity_bytes",
    "smem_bytes": "smem_capacity_bytes",
    "cmem_bytes": "cmem_capacity_bytes",
    "bf16_flops_per_s": "bf16_ops_per_second",
    "fp8_flops_per_s": "fp8_ops_per_second",
    "int8_ops_per_s": "int8_ops_per_second",
    "int4_ops_per_s": "int4_ops_per_second",
}


@pytest.mark.parametrize("name", TPUS)
def test_values_are_jax_s_per_core_times_cores(name):
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(name), 1)
    chip = get_chip(name)
    for ours, theirs in PER_CORE.items():
        fact = getattr(chip, ours)
        per_chip = CORES[name] * getattr(info, theirs)
        if per_chip == 0 and fact.value != 0:
            assert [f.value for f in fact.disagreements if f.source == "JX"] == [0]
        else:
            assert (fact.value, fact.source) == (per_chip, "JX"), ours
    assert chip.lanes
    assert chip.lanes.value == info.num_lanes == 128
    assert chip.sublanes
    assert chip.sublanes.value == info.num_sublanes
    assert chip.sublanes.value == (16 if name == "8t" else 8)
    assert chip.mxu_columns
    assert chip.mxu_columns.value == info.mxu_column_size
    assert chip.vmem_bytes_per_core == info.vmem_capacity_bytes


@pytest.mark.parametrize("name", CHIP_NAMES)
def test_devices_and_cores(name):
    chip = get_chip(name)
    assert chip.devices_per_chip.value == DEVICES[name]
    assert chip.devices(8) == 8 * DEVICES[name]
    if name != "cpu":
        assert chip.require("tensor_cores") == CORES[name]


@pytest.mark.parametrize(
    ("name", "fact", "used", "kept"),
    [
        ("v4", "int8_ops_per_s", (275e12, "GD"), [(0, "JX")]),
        ("v5p", "fp8_flops_per_s", (459e12, "GD"), [(0, "JX")]),
        ("v5p", "hbm_bytes_per_s", (2.46e12, "JX"), [(2.765e12, "GD"), (2.8e12, "SB")]),
        ("v6e", "bf16_flops_per_s", (920e12, "JX"), [(918e12, "GD")]),
        ("8i", "fp8_flops_per_s", (8.808e15, "JX"), [(10.1e15, "BL")]),
        ("8i", "hbm_bytes", (309e9, "JX"), [(288e9, "DD")]),
        ("8t", "hbm_bytes", (231e9, "JX"), [(216e9, "DD")]),
        ("8t", "hbm_bytes_per_s", (6.4e12, "JX"), [(6.528e12, "DD")]),
        ("8i", "hbm_bytes_per_s", (8.6e12, "JX"), [(8.601e12, "DD")]),
        ("8i", "pod_chips", (1024, "DD"), [(1152, "DD")]),
        ("v5e", "ici_link_bytes_per_s_one_way", (45e9, "SB"), [(50e9, "GD")]),
        ("v5e", "hbm_bytes_per_s", (820e9, "JX"), [(819e9, "GD"), (810e9, "SB")]),
    ],
)
def test_disagreements_are_kept_and_never_averaged(name, fact, used, kept):
    found = getattr(get_chip(name), fact)
    assert (found.value, found.source) == used
    assert [(f.value, f.source) for f in found.disagreements] == kept
    assert found.chosen_because


def test_agreeing_sources_are_kept_too():
    vmem = get_chip("8i").vmem_bytes
    assert vmem is not None
    assert vmem.value == 384 * 2**20
    assert vmem.disagreements == ()
    assert [other.source for other in vmem.others] == ["DD"]


def test_documented_figures():
    chip = get_chip("8i")
    assert chip.ici_bytes_per_s_one_way == 19.2e12 / 8 / 2
    assert chip.require("fp4_flops_per_s") == 10.1e15
    assert chip.require("ici_max_hops") == 7
    assert get_chip("8t").require("pod_chips") == 9600
    assert get_chip("8t").require("dcn_bytes_per_s") == 4 * get_chip("7x").require(
        "dcn_bytes_per_s"
    )
    assert get_chip("v5p").require("dcn_bytes_per_s") == 50e9 / 8
    v6e = get_chip("v6e")
    assert v6e.gke_accelerator
    assert v6e.gke_accelerator.value == "tpu-v6e-slice"


def test_a_chip_s_links_add_up_to_its_total():
    """Where both stand, ports x 2 ways x a link is the chip's total by the same source."""
    for name in ("v5e", "v5p", "v6e", "7x", "8t"):
        chip = get_chip(name)
        link = chip.ici_link_bytes_per_s_one_way
        assert link is not None
        total = chip.require("ici_bytes_per_s_bidirectional")
        derived = [f for f in (link, *link.others) if "derived" in f.note]
        assert [2 * f.number * chip.require("ici_ports") for f in derived] == [total]


def test_tpu8_has_no_invented_price_power_machine_or_label():
    for name in ("8t", "8i"):
        chip = get_chip(name)
        assert chip.is_projected
        assert chip.price_usd_per_hour is None
        assert chip.power_watts is None
        assert chip.gke_machine is None
        assert chip.gke_accelerator is None


def test_prices_say_that_they_are_second_hand():
    for name in ("v4", "v5e", "v5p", "v6e", "7x"):
        price = get_chip(name).price_usd_per_hour
        assert price is not None
        assert price.source == "XX"


def test_units_match_field_names():
    endings = {"_bytes": "bytes", "flops_per_s": "FLOP/s", "ops_per_s": "OP/s", "_watts": "W"}
    for chip in CHIPS.values():
        for name, fact in chip.facts().items():
            if fact is None:
                continue
            if "bytes_per_s" in name:
                assert fact.unit == "bytes/s"
            for ending, unit in endings.items():
                if name.endswith(ending) and not (ending == "ops_per_s" and "flops" in name):
                    assert fact.unit == unit, (chip.name, name)


def test_cpu_has_no_performance_fact_and_says_so():
    cpu = get_chip("cpu")
    present = [name for name, fact in cpu.facts().items() if fact is not None]
    assert present == ["devices_per_chip"]
    for name in ("hbm_bytes_per_s", "bf16_flops_per_s"):
        with pytest.raises(UserError, match=f"^chip cpu has no {name} .*only emulates"):
            cpu.require(name)


def test_a_zero_is_not_a_rate():
    with pytest.raises(UserError, match="chip 8i has no int8_ops_per_s: JX says 0"):
        get_chip("8i").require("int8_ops_per_s")
    with pytest.raises(UserError, match="chip 8t has no price_usd_per_hour"):
        get_chip("8t").require("price_usd_per_hour")


def test_unknown_chip_names_the_value_the_nearest_and_the_list():
    with pytest.raises(UserError) as error:
        get_chip("v6p")
    message = str(error.value)
    assert "'v6p'" in message
    assert "did you mean 'v" in message
    assert ", ".join(CHIP_NAMES) in message
    assert "\n" not in message
    with pytest.raises(UserError, match="did you mean 'v5e'"):
        get_chip("V5E")
    with pytest.raises(UserError, match=r"unknown chip ''; known: v4, "):
        get_chip("")


def test_chips_is_a_mapping_of_all_names():
    assert tuple(CHIPS) == CHIP_NAMES
    assert len(CHIPS) == 8
    assert "v3" not in CHIPS
    assert CHIPS["8i"] is get_chip("8i")
    assert set(FACT_NAMES) == set(get_chip("8t").facts())


def test_device_kinds_are_the_ones_jax_knows():
    from jax._src.tpu_info import chip_version_from_device_kind

    for chip in CHIPS.values():
        for kind in chip.device_kinds:
            assert chip_of_device_kind(kind) is chip
            if chip.name != "cpu":
                assert str(chip_version_from_device_kind(kind)) == chip.name
    assert chip_of_device_kind("NVIDIA H100 80GB HBM3") is None


def test_reading_facts_starts_no_jax_backend():
    """A backend that is up can no longer be given virtual devices; merely importing skips jax."""
    code = """
import sys
import tpu_stack.hardware as h
assert "jax" not in sys.modules, "importing hardware imported jax"
rows = h.chip_rows()
from jax._src import xla_bridge
assert not xla_bridge._backends, "reading facts started a backend"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_fact_refuses_a_silent_conflict():
    other = Fact(value=2, unit="bytes", source="GD")
    with pytest.raises(ValueError, match="disputed"):
        Fact(value=1, unit="bytes", source="JX", others=(other,))
    with pytest.raises(ValueError, match="unknown source"):
        Fact(value=1, unit="bytes", source="rumour")
    with pytest.raises(ValueError, match="unknown unit"):
        Fact(value=1, unit="GB", source="GD")
    with pytest.raises(ValueError, match="same unit"):
        Fact(value=1, unit="chips", source="JX", others=(other,))
    with pytest.raises(TypeError, match="is text"):
        _ = Fact(value="torus2d", unit="text", source="GD").number
