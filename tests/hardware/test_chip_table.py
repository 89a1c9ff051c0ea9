"""What `tpu-stack chips` shows: text for people, JSON for machines."""

import json

import pytest

from tpu_stack.errors import UserError
from tpu_stack.hardware import CHIP_NAMES, chip_as_json, chip_rows, get_chip
from tpu_stack.hardware.table import format_value


def test_rows_cover_every_chip_and_show_conflicts():
    rows = {row.fact: row for row in chip_rows()}
    assert all(tuple(row.values) == CHIP_NAMES for row in rows.values())
    assert rows["hbm_bytes"].values["8t"] == "231 GB (216 GB DD)"
    assert rows["vmem_bytes"].values["8i"] == "384 MiB"
    assert rows["int4_ops_per_s"].values["8i"] == "not available"
    assert rows["price_usd_per_hour"].values["8i"] == "-"
    assert rows["price_usd_per_hour"].source == "XX"
    assert rows["ici_bytes_per_s_bidirectional"].values["8t"] == "2.4 TB/s (derived)"


def test_tpu8_rates_say_projected():
    for row in chip_rows(["8t", "8i", "v6e"]):
        if row.fact.startswith("matmul"):
            assert row.values["8t"].endswith("(projected)")
            assert row.values["8i"].endswith("(projected)")
            assert "projected" not in row.values["v6e"]
        if row.fact == "evidence":
            assert "projected" in row.values["8t"]


def test_emulated_rates_say_what_they_run_as():
    rows = {row.fact: row for row in chip_rows(["8i"])}
    cell = rows["matmul int8 x int8"].values["8i"]
    assert cell == "emulated 1.101 PFLOP/s as bfloat16 x bfloat16 (projected)"
    assert rows["matmul fp8 x int4"].values["8i"] == "native 8.808 PFLOP/s (projected)"


def test_unknown_name():
    with pytest.raises(UserError, match="unknown chip '8x'"):
        chip_rows(["8x"])


@pytest.mark.parametrize("name", CHIP_NAMES)
def test_json_is_plain_and_complete(name):
    read = json.loads(json.dumps(chip_as_json(get_chip(name)), allow_nan=False))
    assert read["name"] == name
    for fact in read["facts"].values():
        assert fact is None or fact["source"] in read["sources"]
    assert (read["matmul"] == {}) == (name == "cpu")


def test_json_keeps_agreements_and_disagreements():
    facts = chip_as_json(get_chip("8i"))["facts"]
    assert facts["hbm_bytes"]["value"] == 309_000_000_000
    assert facts["hbm_bytes"]["unit"] == "bytes"
    assert [(d["value"], d["source"]) for d in facts["hbm_bytes"]["disagreements"]] == [
        (288 * 10**9, "DD")
    ]
    assert [a["source"] for a in facts["vmem_bytes"]["agreements"]] == ["DD"]
    assert facts["gke_machine"] is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (6_528_000_000_000, "bytes/s", "6.528 TB/s"),
        (128 * 2**20, "bytes", "128 MiB"),
        (32 * 2**30, "bytes", "32 GiB"),
        (16 * 10**9, "bytes", "16 GB"),
        (0, "bytes", "0 B"),
        (0, "FLOP/s", "not available"),
        (996_100_000_000_000, "FLOP/s", "996.1 TFLOP/s"),
        (3.22, "USD/hour", "$3.22/hour"),
        (2.7, "ratio", "2.7x"),
        (9600, "chips", "9600"),
        (1024, "count", "1024"),
        ("torus3d", "text", "torus3d"),
    ],
)
def test_format_value(value, unit, text):
    assert format_value(value, unit) == text
