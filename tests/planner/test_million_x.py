"""The million-fold question: fits by hand, and that what multiplies gives the target again."""

import importlib.util
import json
from math import prod
from pathlib import Path

import pytest

from tpu_stack.errors import UserError
from tpu_stack.hardware import get_chip

PATH = Path(__file__).parents[2] / "experiments" / "million_x.py"


@pytest.fixture(scope="module")
def million():
    spec = importlib.util.spec_from_file_location("million_x", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_clean_exponential_is_found_whatever_is_left_out(million):
    points = {str(year): (year, 3.0 * 1.5 ** (year - 2020)) for year in (2020, 2021, 2023, 2026)}
    assert million.growth_per_year(points) == pytest.approx((1.5, 1.5, 1.5))


def test_an_outlier_widens_the_range(million):
    points = {"a": (2020, 1.0), "b": (2021, 2.0), "c": (2022, 4.0), "d": (2023, 4.0)}
    least, fitted, most = million.growth_per_year(points)
    assert least < fitted < most
    assert most == pytest.approx(2.0)  # without d the rest doubles every year
    with pytest.raises(ValueError, match="three chips"):
        million.growth_per_year({"a": (2020, 1.0), "b": (2021, 2.0)})


@pytest.mark.parametrize(("target", "years"), [(1e6, 10.0), (10.0, 2.0)])
def test_what_multiplies_gives_the_target(million, target, years):
    result = million.split(million.Options(target=target, years=years))
    prices = {f["name"]: f for f in result["factors"]}["chip price"]
    for scenario in result["scenarios"].values():
        assert scenario["chips"] * prod(scenario["factors"].values()) == pytest.approx(target)
        assert scenario["spending"] == pytest.approx(scenario["chips"] * prices["central"])
        assert scenario["chips_per_year"] ** years == pytest.approx(scenario["chips"])
    needed = [result["scenarios"][case]["chips"] for case in ("low", "central", "high")]
    assert needed[0] > needed[1] > needed[2]
    for swing in result["sensitivity_chips"].values():
        assert swing["low"] >= needed[1] >= swing["high"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_factors_are_the_chip_facts(million):
    chip = get_chip("8t")
    precision = million.precision()
    bf16 = chip.require("bf16_flops_per_s")
    assert precision.central == chip.require("fp8_flops_per_s") / bf16
    assert precision.high == chip.require("fp4_flops_per_s") / bf16
    since = million.split(million.Options())["since_v4"]
    assert since["together"] == pytest.approx(
        chip.require("fp8_flops_per_s") / get_chip("v4").require("bf16_flops_per_s")
    )
    assert set(million.history("price_usd_per_hour")) == {"v4", "v5p", "v6e", "7x"}


def test_specialization_by_hand(million):
    """fp4: 8t trains 10.1/12.6 faster, 8i reads HBM 6.4/8.6 faster; the better alone is 8i."""
    alone = min(0.5 + 0.5 * 8.6 / 6.4, 0.5 * 12.6 / 10.1 + 0.5)
    assert million.split_gain("fp4", 0.5) == pytest.approx(alone, rel=1e-3)
    assert million.split_gain("fp8", 0.5) == 1.0  # 8i has the higher fp8 peak as well
    assert million.split_gain("fp4", 1.0) == 1.0  # one kind of work needs one chip
    assert million.specialization(0.5, 10).high == pytest.approx(alone**5, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.0}, "--target is 1"),
        ({"target": float("nan")}, "--target is nan"),
        ({"years": 0.0}, "--years is 0"),
        ({"train_share": 1.5}, "--train-share is 1.5"),
    ],
)
def test_bad_input_is_refused(million, options, message):
    with pytest.raises(UserError, match=message):
        million.split(million.Options(**options))


def test_the_command_prints_and_writes(million, tmp_path, monkeypatch, capsys):
    files = ["--json", str(tmp_path / "m.json"), "--plot", str(tmp_path / "m.png")]
    monkeypatch.setattr("sys.argv", ["million_x.py", "--target", "100", "--years", "3", *files])
    assert million.main() == 0
    printed = capsys.readouterr().out
    for name in ("chip speed", "precision", "specialization", "utilization", "algorithms"):
        assert f"- {name}: " in printed
    assert "projected" in printed
    assert json.loads((tmp_path / "m.json").read_text())["target"] == 100
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("sys.argv", ["million_x.py", "--years", "0"])
    assert million.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
