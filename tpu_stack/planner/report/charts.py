"""Geometry of the comparison page's charts: numbers in, coordinates and percentages out.

The page draws them as inline SVG and as plain boxes, so that they scale to a phone, follow light
and dark, and can be read by a screen reader; a plotting library's SVG does none of these.

    roofline_chart("8i", comparison["programs"])["points"][0]["label"]  # 'train_step'
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log10
from typing import Any

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 40
_LABEL_HEIGHT, _LABEL_WIDTH = 15, 72

PARTS = (
    ("compute", "compute_s"),
    ("memory beyond compute", "memory_s"),
    ("exposed collectives", "exposed_ici_s"),
)
"""What a projected time is made of: words, key of the breakdown. In the order they are drawn."""


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis: values from `low` to `high` onto pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a value, to a tenth."""
        share = (log10(value) - log10(self.low)) / (log10(self.high) - log10(self.low))
        return round(self.start + share * (self.end - self.start), 1)

    def decades(self) -> list[float]:
        """The powers of ten on the axis."""
        first, last = ceil(log10(self.low) - 1e-9), floor(log10(self.high) + 1e-9)
        return [10.0**power for power in range(first, last + 1)]


def roofline_chart(chip: str, programs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One chip's roofline, log-log, with every program that it can hold placed on it.

    x is FLOPs per HBM byte, y is FLOP/s of one chip. A point under its roof is bound by
    collectives. There is a roof for every distinct rate of the programs' operand types.
    """
    found = {
        program["name"]: program["roofline"][chip]
        for program in programs
        if "unavailable" not in program["roofline"].get(chip, {"unavailable": ""})
    }
    reached = {name: line["flops_per_chip"] / line["time_s"] for name, line in found.items()}
    peaks: dict[float, str] = {}
    for line in found.values():
        peak = line["rate"]["flops_per_s_per_chip"]
        peaks.setdefault(peak, " x ".join(line["rate"]["computed_as"]))
    lines = list(found.values())
    bandwidth = lines[0]["hbm_bytes_per_chip"] / lines[0]["hbm_s"]
    intensities = [line["intensity_flops_per_byte"] for line in lines]
    ridges = [line["ridge_flops_per_byte"] for line in lines]
    low_x, high_x = min([*intensities, *ridges]) / 8, max([*intensities, *ridges]) * 8
    low_y = min(min(reached.values()) / 4, bandwidth * low_x)
    x = Axis(low_x, high_x, LEFT, WIDTH - RIGHT)
    y = Axis(low_y, max(peaks) * 3, HEIGHT - BOTTOM, TOP)
    return {
        "chip": chip,
        "width": WIDTH,
        "height": HEIGHT,
        "frame": {"left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM},
        "x_ticks": [{"at": x.at(value), "power": round(log10(value))} for value in x.decades()],
        "y_ticks": [{"at": y.at(value), "power": round(log10(value))} for value in y.decades()],
        "roofs": [_roof(x, y, peak, bandwidth, name) for peak, name in peaks.items()],
        "points": _points(x, y, found, reached),
        "bandwidth": bandwidth,
    }


def _roof(x: Axis, y: Axis, peak: float, bandwidth: float, name: str) -> dict[str, Any]:
    corners = ((x.low, bandwidth * x.low), (peak / bandwidth, peak), (x.high, peak))
    path = " ".join(f"{x.at(left)},{y.at(up)}" for left, up in corners)
    return {"points": path, "label": name, "peak": peak, "y": y.at(peak) - 10}


def _points(
    x: Axis, y: Axis, found: dict[str, dict[str, Any]], reached: dict[str, float]
) -> list[dict[str, Any]]:
    """The programs' places; labels that would cover each other are moved down."""
    points = []
    for name, line in found.items():
        left, up = x.at(line["intensity_flops_per_byte"]), y.at(reached[name])
        point = {
            "label": name, "x": left, "y": up, "bound": line["bound"],
            "flops_per_s": reached[name], "intensity": line["intensity_flops_per_byte"],
        }  # fmt: skip
        if line["intensity_flops_per_byte"] < line["ridge_flops_per_byte"]:
            places = {"label_x": left + 9, "label_y": up + 17, "anchor": "start"}
        else:  # the roof is flat here: below the point is free
            inside = min(max(left, LEFT + _LABEL_WIDTH / 2), WIDTH - RIGHT - _LABEL_WIDTH / 2)
            places = {"label_x": round(inside, 1), "label_y": up + 21, "anchor": "middle"}
        points.append(point | places)
    points.sort(key=lambda point: point["label_y"])
    for above, below in pairwise(points):
        if abs(above["label_x"] - below["label_x"]) < _LABEL_WIDTH:
            below["label_y"] = max(below["label_y"], above["label_y"] + _LABEL_HEIGHT)
    return points


def time_bars(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The 2 x 2 as bars, program by program; all bars of a program share a scale.

    The scale is the longest time with nothing overlapped. A bar's parts are percentages of it;
    `hidden` is what the collectives would add if nothing overlapped.
    """
    groups = []
    for program in dict.fromkeys(cell["program"] for cell in cells):
        members = [cell for cell in cells if cell["program"] == program]
        priced = [cell for cell in members if "unavailable" not in cell]
        longest = max(cell["time_no_overlap_s"] for cell in priced)
        bars = []
        for cell in members:
            if "unavailable" in cell:
                bars.append({"chip": cell["chip"], "unavailable": cell["unavailable"]})
                continue
            parts = [
                {"name": name, "seconds": cell["breakdown"][key],
                 "percent": 100 * cell["breakdown"][key] / longest}
                for name, key in PARTS
            ]  # fmt: skip
            hidden = cell["time_no_overlap_s"] - cell["time_s"]
            bars.append(
                {"chip": cell["chip"], "own": cell["own"], "fits": cell["fits"], "parts": parts,
                 "time_s": cell["time_s"], "bound": cell["bound"], "hidden_s": hidden,
                 "hidden_percent": 100 * hidden / longest}
            )  # fmt: skip
        groups.append({"program": program, "bars": bars})
    return groups


def term_bars(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The simulated steps as bars, program by program; the bars of a program share a scale.

    Terms under half a percent of the program's longest step are drawn and named together.
    """
    groups = []
    for program in dict.fromkeys(cell["program"] for cell in cells):
        members = [c for c in cells if c["program"] == program and c["simulated"]]
        longest = max(cell["simulated"]["step_s"] for cell in members)
        bars = []
        for cell in members:
            found = cell["simulated"]
            terms = {k: v for k, v in found["terms_s"].items() if v >= 0.005 * longest}
            rest = found["step_s"] - sum(terms.values())
            terms |= {"the rest": rest} if rest > 1e-9 * longest else {}
            parts = [
                {"name": name, "seconds": seconds, "percent": 100 * seconds / longest}
                for name, seconds in terms.items()
            ]
            bars.append(
                {"chip": cell["chip"], "own": cell["own"], "parts": parts, **found,
                 "fits": cell["fits"]}
            )  # fmt: skip
        groups.append({"program": program, "bars": bars})
    return groups


def memory_bars(programs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each program holds on each chip against its HBM.

    The percentages are of the HBM, or of what is held where that is more, so that no bar leaves
    its box; `limit_percent` is where the HBM ends.
    """
    bars = []
    for program in programs:
        for chip, line in program["roofline"].items():
            if "unavailable" in line:
                continue
            memory = line["memory"]
            scale = max(memory["bytes_per_chip"], memory["hbm_bytes_per_chip"])
            parts = [
                {"name": name, "bytes": held, "percent": 100 * held / scale}
                for name, held in memory["terms_per_chip"].items()
            ]
            bars.append(
                {"program": program["name"], "chip": chip, "parts": parts, **memory,
                 "limit_percent": 100 * memory["hbm_bytes_per_chip"] / scale}
            )  # fmt: skip
    return bars
