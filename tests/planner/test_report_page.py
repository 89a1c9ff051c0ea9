"""The comparison's page: what it says, that it stands alone, and how it behaves in a browser."""

import json
import re
from html import unescape

import pytest
from browser import needs_browser, visit

from tpu_stack.cli import compare as verb
from tpu_stack.cli.main import main
from tpu_stack.planner.report import render_comparison
from tpu_stack.planner.report.charts import Axis, memory_bars, roofline_chart, term_bars, time_bars
from tpu_stack.planner.report.words import move_text, spec_text

SORT_AND_FILTER = """
  const column = n => [...page.querySelectorAll("#tensor-table tbody tr")]
    .filter(row => !row.hidden).map(row => row.cells[n].dataset.value || row.cells[n].textContent);
  const header = n => page.querySelectorAll("#tensor-table thead th")[n];
  found.names = column(0);
  header(4).firstElementChild.click();
  found.up = column(4); found.sortUp = header(4).getAttribute("aria-sort");
  header(4).firstElementChild.click();
  found.down = column(4); found.sortDown = header(4).getAttribute("aria-sort");
  header(0).firstElementChild.click();
  found.byName = column(0); found.sortGone = header(4).getAttribute("aria-sort");
  found.focusable = header(0).firstElementChild.tabIndex;
  const box = page.getElementById("filter");
  box.value = "MLP."; box.dispatchEvent(new frame.Event("input"));
  found.filtered = column(0); found.said = page.getElementById("shown").textContent;
"""


@pytest.fixture(scope="module")
def page(nano):
    return render_comparison(nano)


def test_the_page_needs_nothing_else(page):
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert "url(" not in page
    assert "@import" not in page


def test_every_part_is_there_with_its_rung(page, nano):
    for part in (
        "two-by-two",
        "rooflines",
        "times",
        "simulated",
        "memory",
        "tensors",
        "why",
        "reshard",
    ):
        assert f'id="{part}"' in page
    assert page.count("<svg") == 2  # one roofline a chip
    for key in ("two_by_two", "roofline", "simulated", "memory", "tensors", "products", "reshard"):
        assert nano["rungs"][key] in unescape(page)
    assert "projected" in page
    assert "dimension 1, 192: embed -&gt; fsdp=4 -&gt; 4 x 48" in page
    assert "all-gather fsdp" in page
    for program in ("train_step", "prefill", "decode"):
        assert page.count(f">{program}</text>") == 2


def test_the_two_by_two_stands_under_the_right_chips(page, nano):
    head = re.search(r'id="two-by-two".*?<thead>(.*?)</thead>', page, re.S)
    assert head is not None
    chips = re.findall(r'class="text">(\w+)<', head[1])
    assert chips == ["8t", "8i"]
    cells = re.findall(r'<span class="big[^"]*">([\d,]+)</span>', page)
    rates = {(c["program"], c["chip"]): c["tokens_per_s_per_chip"] for c in nano["two_by_two"]}
    wanted = [
        f"{rates[p, c]:,.0f}" for p in ("train_step", "prefill", "decode") for c in chips
    ]  # fmt: skip
    assert cells == wanted


def test_names_are_escaped(nano):
    assert "<script>alert" not in render_comparison(nano | {"model": "<script>alert(1)</script>"})


def test_a_chip_that_cannot_hold_a_program_says_so(nano):
    changed = json.loads(json.dumps(nano))
    reason = "1 devices do not fill 8i chips of 2"
    decode = next(p for p in changed["programs"] if p["name"] == "decode")
    decode["roofline"]["8t"] = {"chip": "8t", "unavailable": reason}
    cell = next(
        c for c in changed["two_by_two"] if (c["program"], c["chip"]) == ("decode", "8t")
    )  # fmt: skip
    cell.update(unavailable=reason, fits=False, simulated=None)
    page = render_comparison(changed)
    assert page.count(reason) == 2  # in the 2 x 2 and among the bars
    assert page.count(">decode</text>") == 1


def test_a_roofline_by_hand():
    line = {
        "flops_per_chip": 1e12, "hbm_bytes_per_chip": 1e10, "hbm_s": 0.01, "time_s": 0.02,
        "intensity_flops_per_byte": 100.0, "ridge_flops_per_byte": 100.0, "bound": "ici",
        "rate": {"flops_per_s_per_chip": 1e14, "computed_as": ["bfloat16", "int4"]},
    }  # fmt: skip
    chart = roofline_chart("8i", [{"name": "decode", "roofline": {"8i": line}}])
    (roof,) = chart["roofs"]
    corners = [tuple(map(float, corner.split(","))) for corner in roof["points"].split()]
    assert chart["bandwidth"] == pytest.approx(1e12)
    (point,) = chart["points"]
    assert point["flops_per_s"] == pytest.approx(5e13)  # half of the roof
    assert point["x"] == corners[1][0]  # at the ridge
    assert point["y"] > corners[1][1]  # and below it
    assert roof["label"] == "bfloat16 x int4"
    (low, low_y), (ridge, top), (_, flat) = corners
    assert low < ridge
    assert low_y > top == flat


def test_an_axis_places_decades_evenly():
    axis = Axis(1.0, 1000.0, 0.0, 300.0)
    assert [axis.at(value) for value in axis.decades()] == [0.0, 100.0, 200.0, 300.0]
    assert Axis(0.5, 20.0, 300.0, 0.0).decades() == [1.0, 10.0]


def test_bars_add_up(nano):
    for group in time_bars(nano["two_by_two"]):
        longest = 0.0
        for bar in group["bars"]:
            whole = sum(part["percent"] for part in bar["parts"]) + bar["hidden_percent"]
            assert whole <= 100.0001
            longest = max(longest, whole)
        assert longest == pytest.approx(100)
    for group in term_bars(nano["two_by_two"]):
        widths = [sum(part["percent"] for part in bar["parts"]) for bar in group["bars"]]
        assert max(widths) == pytest.approx(100)
        for bar, width in zip(group["bars"], widths, strict=True):
            assert sum(part["seconds"] for part in bar["parts"]) == pytest.approx(bar["step_s"])
            assert 0 < width <= 100.0001
    for bar in memory_bars(nano["programs"]):
        assert sum(part["percent"] for part in bar["parts"]) == pytest.approx(100 * bar["share"])
    over = json.loads(json.dumps(nano["programs"][:1]))
    memory = over[0]["roofline"]["8t"]["memory"]
    memory["hbm_bytes_per_chip"] = memory["bytes_per_chip"] // 2
    bar = next(bar for bar in memory_bars(over) if bar["chip"] == "8t")
    assert sum(part["percent"] for part in bar["parts"]) == pytest.approx(100)
    assert bar["limit_percent"] == pytest.approx(50, abs=0.01)


def test_words_for_specs_and_moves():
    assert spec_text([None, "fsdp", ["data", "tensor"]], {"fsdp": 4, "data": 1, "tensor": 2}) == (
        "-, fsdp, (data)+tensor"
    )
    move = {"kind": "all-gather", "axes": ["fsdp"], "shards": 8}
    assert move_text(move, {"fsdp": 64}) == "all-gather fsdp 8 of 64"
    assert move_text(move, {"fsdp": 8}) == "all-gather fsdp"
    assert move_text({"kind": "send", "axes": None, "shards": 16}, {}) == "send to 16"


def test_the_verb_writes_the_page_whole(tmp_path, monkeypatch, nano, page, capsys):
    monkeypatch.setattr(verb, "compare_profiles", lambda options: nano)
    out = tmp_path / "compare.html"
    assert main(["compare", "--model", "nano", "--html", str(out)]) == 0
    assert out.read_text() == page
    assert list(tmp_path.iterdir()) == [out]
    capsys.readouterr()


@needs_browser
@pytest.mark.parametrize("width", [390, 1440])
def test_in_a_browser(page, nano, tmp_path, width):
    found = visit(page, width, tmp_path, SORT_AND_FILTER)
    assert found["width"] == width
    assert found["scroll"] <= width  # no page scroll sideways: tables scroll inside
    assert not found["wide"]
    assert all(drawn >= 250 for drawn in found["drawn"])
    names = [tensor["name"] for tensor in nano["tensors"]]
    states = sorted(t["train"]["state_bytes_per_device"] for t in nano["tensors"])
    assert found["names"] == names
    assert [int(value) for value in found["up"]] == states
    assert [int(value) for value in found["down"]] == states[::-1]
    assert (found["sortUp"], found["sortDown"]) == ("ascending", "descending")
    assert found["sortGone"] is None
    assert sorted(found["byName"]) == sorted(names)
    assert found["byName"][0].startswith("blocks.")
    assert found["focusable"] == 0
    assert found["filtered"]
    assert all("mlp." in name for name in found["filtered"])
    assert found["said"] == f"{len(found['filtered'])} of {len(names)}"
