"""The CPU benchmark runs and says what it ran; what it measures is nobody's test."""

import json
import sys

import numpy as np
import pytest

from tpu_stack.quant import FORMATS, bench, get_format


@pytest.mark.parametrize("format", bench.SUITE)
def test_random_weights_are_valid(format):
    q = bench.random_weight(get_format(format), (128, 8)).check()
    assert q.shape == (128, 8)
    assert np.isfinite(q.dequantize()).all()
    assert q.dequantize().any()


def test_rows_and_json(tmp_path, monkeypatch, capsys):
    out = tmp_path / "bench.json"
    arguments = ["--formats", "int8", "int1", "--m", "1", "--shape", "128", "64", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--json", str(out)])
    bench.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["format"] for row in rows] == ["float32", "int8", "int1"]
    assert rows[0]["ratio_to_float32"] == 1
    assert {row["held_as"] for row in rows} == {"float32", "int8"}
    assert all(row["median_s"] >= row["least_s"] > 0 for row in rows)
    assert "int1" in capsys.readouterr().out
    assert set(bench.SUITE) <= set(FORMATS)
