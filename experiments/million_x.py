"""What a million times more effective compute in ten years would take.

    effective compute = chips x chip speed x precision x specialization x utilization x algorithms

`chips` is what is left to buy once the others are taken, and spending is chips times what one
costs. Speed, precision, specialization and price come from the history of the chip facts (v4 in
2021 to 8t and 8i in 2026); utilization, algorithms and the history of spending are assumptions,
each with its source. A fit's low and high are the least and most that it gives when any one chip is
left out. Everything is arithmetic over published figures, hence rung 4: projected. Speed and price
are taken apart although dearer chips are faster, so their extremes do not come together.

Command:   python experiments/million_x.py --json runs/million_x.json --plot runs/million_x.png
Hardware:  any CPU.
Expected:  central: the other factors make 1e7, so a tenth of today's chips at today's spending.
           Low: 169x the chips, 1,870x the spending. Without better algorithms, the rest central:
           3,180x the chips at 35,000x the spending, 2.85x a year, more than the 2.4x of late. The
           answer hangs on algorithms, on which no chip fact bears.
Cost:      seconds.
"""

import sys
from dataclasses import asdict, dataclass
from math import exp, log, log10, prod
from pathlib import Path
from typing import Any

import tyro

from tpu_stack.errors import UserError
from tpu_stack.files import replacing_file, write_json
from tpu_stack.hardware import get_chip

ANNOUNCED = {"v4": 2021, "v5e": 2023, "v5p": 2023, "v6e": 2024, "7x": 2025, "8t": 2026, "8i": 2026}
"""Year of Google's announcement. The chip facts carry no dates."""
TRAINING_LINE = ("v4", "v5p", "v6e", "7x", "8t")
"""The chip of each year that Google offered for training; v5e and 8i are the other kind."""
GENERATIONS_PER_YEAR = 1 / 2


@dataclass(frozen=True)
class Options:
    """Split a growth of effective compute into what multiplies to it; say what must be true."""

    target: float = 1e6
    """How many times more effective compute."""
    years: float = 10.0
    """In how many years."""
    train_share: float = 0.5
    """Share of a fleet's time that trains; the rest decodes. Weighs specialization."""
    json: Path | None = None
    """Also write the result to this file."""
    plot: Path | None = None
    """Also draw it: a PNG."""


@dataclass(frozen=True)
class Factor:
    """One multiplier over the whole time. Invariant: 0 < low <= central <= high.

    Attributes:
      kind: "history" (chip facts) or "assumption".
      source: which facts, or whose figure. truth: what has to be true for the central figure.
    """

    name: str
    low: float
    central: float
    high: float
    kind: str
    source: str
    truth: str

    def __post_init__(self):
        if not 0 < self.low <= self.central <= self.high:
            raise ValueError(f"{self.name}: not a range: {self.low}, {self.central}, {self.high}")


def growth_per_year(points: dict[str, tuple[int, float]]) -> tuple[float, float, float]:
    """(least, fitted, most) growth per year: least squares of log value by year over all chips, and
    the range of the fit when one chip is left out. `points`: chip -> (year, value)."""
    if len(points) < 3:
        raise ValueError(f"a fit with one left out needs three chips, got {list(points)}")
    whole = _slope(list(points.values()))
    without = [_slope([p for name, p in points.items() if name != left]) for left in points]
    return exp(min(*without, whole)), exp(whole), exp(max(*without, whole))


def _slope(points: list[tuple[int, float]]) -> float:
    years = [year for year, _ in points]
    middle = sum(years) / len(years)
    spread = sum((year - middle) ** 2 for year in years)
    return sum((year - middle) * log(value) for year, value in points) / spread


def history(fact: str) -> dict[str, tuple[int, float]]:
    """chip -> (year, value) of a fact along the training line, where it is published."""
    found = {name: getattr(get_chip(name), fact) for name in TRAINING_LINE}
    return {name: (ANNOUNCED[name], f.number) for name, f in found.items() if f and f.value}


def _fitted(name: str, fact: str, years: float, label: str, truth: str) -> Factor:
    points = history(fact)
    low, central, high = (rate**years for rate in growth_per_year(points))
    source = f"fit of {label} over {', '.join(points)}; range: one chip left out"
    return Factor(name, low, central, high, "history", source, truth)


def chip_speed(years: float) -> Factor:
    """bfloat16 FLOP/s of one chip, so that narrower formats count under precision alone."""
    truth = "chips keep gaining at a fixed format, although 8t has less bfloat16 than 7x"
    return _fitted("chip speed", "bf16_flops_per_s", years, "bf16 FLOP/s per chip", truth)


def chip_price(years: float) -> Factor:
    """What one chip-hour costs, times: it divides the chips that money buys."""
    truth = "a chip-hour grows dearer as it did; no price of 8t or 8i is public"
    return _fitted("chip price", "price_usd_per_hour", years, "price (second-hand)", truth)


def precision() -> Factor:
    """From bfloat16 training to the narrowest format of the newest chip: once, bits run out."""
    chip = get_chip("8t")
    bf16, fp8, fp4 = (chip.require(f"{name}_flops_per_s") for name in ("bf16", "fp8", "fp4"))
    return Factor(
        "precision", 1.0, fp8 / bf16, fp4 / bf16, "history",
        "8t's own rates: bf16 (low), fp8 (central), fp4 (high; by its documentation alone)",
        "training in fp8 loses nothing; there is no second such step",
    )  # fmt: skip


def specialization(train_share: float, years: float) -> Factor:
    """What two chips gain over the better one of them for both kinds of work."""
    once = {fmt: split_gain(fmt, train_share) for fmt in ("fp8", "fp4")}
    generations = max(1.0, years * GENERATIONS_PER_YEAR)
    ordered = sorted(once.values())
    return Factor(
        "specialization", ordered[0], ordered[-1], ordered[-1] ** generations, "history",
        "8t against 8i: peak to train, HBM to decode; by fp8 (no gain), by fp4; high: compounding"
        " every generation of two years",
        "the 2026 split pays once: at fp8 the facts give 8i the higher peak as well",
    )  # fmt: skip


def split_gain(fmt: str, train_share: float) -> float:
    """Throughput of a fleet of both chips over one of the better single chip, the same count.

    A chip does each kind of work at its rate over the best chip's: FLOP/s of `fmt` to train,
    HBM bytes/s to decode; the fleet spends `train_share` of its time, on the best chip, training.
    """
    facts = (f"{fmt}_flops_per_s", "hbm_bytes_per_s")
    rates = [[get_chip(name).require(fact) for name in ("8t", "8i")] for fact in facts]
    relative = [[rate / max(both) for rate in both] for both in rates]
    shares = (train_share, 1 - train_share)
    times = [
        sum(s / kind[chip] for s, kind in zip(shares, relative, strict=True)) for chip in (0, 1)
    ]
    return min(times)


def utilization() -> Factor:
    """From what large runs reach to what is thinkable; it can never exceed 1 / 0.40."""
    today = 0.40
    return Factor(
        "utilization", 1.0, 0.55 / today, 0.70 / today, "assumption",
        "MFU 0.38-0.43 at Llama 3 405B (arXiv 2407.21783, 3.3.2), 0.46 at PaLM (arXiv 2204.02311);"
        " low stays at 0.40, central 0.55, high 0.70",
        "larger meshes do not cost what faster links and overlap give",
    )  # fmt: skip


def algorithms(years: float) -> Factor:
    """Compute needed for a given loss, halving every so many months."""
    low, central, high = (2 ** (12 * years / months) for months in (14, 8, 5))
    return Factor(
        "algorithms", low, central, high, "assumption",
        "compute to reach a given loss halves every 8 months, 95% interval 5 to 14 (in the NeurIPS"
        " version, 90% interval 2 to 22), fitted over"
        " 2012-2023 (Ho et al. 2024, arXiv 2403.05812)",
        "a rate of twelve years holds for as long again, although it was partly gained by scale",
    )  # fmt: skip


def spending_history(years: float) -> Factor:
    """What the money for the largest runs would grow by if it went on as it did."""
    low, central, high = (rate**years for rate in (2.0, 2.4, 2.9))
    return Factor(
        "spending", low, central, high, "assumption",
        "amortized cost of the largest training runs grew 2.4x a year, 90% interval 2.0 to 2.9,"
        " 2016-2024 (Cottier et al. 2024, arXiv 2405.21015)",
        "ten years of it would be thousands of times today's budgets: not a forecast",
    )  # fmt: skip


def split(options: Options) -> dict[str, Any]:
    """The result, JSON-ready. Raises UserError for a target, time or share out of range."""
    if not options.target > 1:
        raise UserError(f"--target is {options.target:g}; it must be more than 1")
    if not 0 < options.years <= 50:
        raise UserError(f"--years is {options.years:g}; it must be above 0 and at most 50")
    if not 0 <= options.train_share <= 1:
        raise UserError(f"--train-share is {options.train_share:g}; it must be from 0 to 1")
    years = options.years
    factors = [
        chip_speed(years), precision(), specialization(options.train_share, years), utilization(),
        algorithms(years),
    ]  # fmt: skip
    price, spending = chip_price(years), spending_history(years)
    cases = ("low", "central", "high")
    scenarios = {
        case: _scenario({f.name: getattr(f, case) for f in factors}, price.central, options)
        for case in cases
    }
    central = {f.name: f.central for f in factors}
    scenarios["no better algorithms"] = _scenario(
        central | {"algorithms": 1.0}, price.central, options
    )
    swings = {
        f.name: {
            case: _scenario(central | {f.name: getattr(f, case)}, price.central, options)["chips"]
            for case in ("low", "high")
        }
        for f in factors
    }
    return {
        "target": options.target,
        "years": years,
        "factors": [asdict(f) for f in (*factors, price, spending)],
        "scenarios": scenarios,
        "sensitivity_chips": swings,
        "sensitivity_spending": {
            "chip price": {
                case: _scenario(central, getattr(price, case), options)["spending"]
                for case in ("low", "high")
            }
        },
        "pod": _pod_history(years),
        "since_v4": _since_v4(),
        "rung": "4 projected: arithmetic over published figures and named assumptions",
    }


def _scenario(by_factor: dict[str, float], price: float, options: Options) -> dict[str, Any]:
    """What must be bought, given the other factors: chips, and what they cost."""
    others = prod(by_factor.values())
    chips = options.target / others
    spending = chips * price
    return {
        "factors": by_factor,
        "without_more_chips": others,
        "chips": chips,
        "chips_per_year": chips ** (1 / options.years),
        "spending": spending,
        "spending_per_year": spending ** (1 / options.years),
    }


def _pod_history(years: float) -> dict[str, Any]:
    """How the chips of one pod grew along the training chips with a 3D torus, extended."""
    first, last = get_chip("v4"), get_chip("8t")
    grown = last.require("pod_chips") / first.require("pod_chips")
    rate = grown ** (1 / (ANNOUNCED["8t"] - ANNOUNCED["v4"]))
    watt = get_chip("8t").require("perf_per_watt_vs_7x")
    return {"v4_to_8t": grown, "extended": rate**years, "perf_per_watt_8t_over_7x": watt}


def _since_v4() -> dict[str, float]:
    """What the facts say of the five years from v4 to 8t, per chip: the split that is known."""
    old, new = get_chip("v4"), get_chip("8t")
    speed = new.require("bf16_flops_per_s") / old.require("bf16_flops_per_s")
    ratio = new.require("fp8_flops_per_s") / new.require("bf16_flops_per_s")
    hbm = new.require("hbm_bytes_per_s") / old.require("hbm_bytes_per_s")
    return {"bf16": speed, "fp8_over_bf16": ratio, "together": speed * ratio, "hbm": hbm}


def report(result: dict[str, Any]) -> str:
    """The result as text: factors, scenarios, sensitivities, what would have to be true."""
    lines = [f"{result['target']:,.0f}x in {result['years']:g} years ({result['rung']})", ""]
    lines.append(f"{'factor':16}{'low':>12}{'central':>12}{'high':>12}  {'by':11}source")
    for f in result["factors"]:
        cells = "".join(f"{_times(f[case]):>12}" for case in ("low", "central", "high"))
        lines.append(f"{f['name']:16}{cells}  {f['kind']:11}{f['source']}")
    lines += [
        "",
        f"{'scenario':24}{'others':>12}{'chips':>12}{'a year':>9}{'spending':>12}{'a year':>9}",
    ]
    for name, s in result["scenarios"].items():
        lines.append(
            f"{name:24}{_times(s['without_more_chips']):>12}{_times(s['chips']):>12}"
            f"{s['chips_per_year']:8.2f}x{_times(s['spending']):>12}{s['spending_per_year']:8.2f}x"
        )
    lines += ["", "chips needed when one factor is at its low or high, the others central:"]
    for name, swing in result["sensitivity_chips"].items():
        lines.append(f"{name:24}{_times(swing['low']):>12}{_times(swing['high']):>12}")
    cost = result["sensitivity_spending"]["chip price"]
    lines.append(
        f"spending with the chip price at its low or high: {_times(cost['low'])},"
        f" {_times(cost['high'])}"
    )
    since, pod = result["since_v4"], result["pod"]
    lines += [
        "",
        f"v4 to 8t, one chip: bf16 {since['bf16']:.1f}x, fp8 over bf16 "
        f"{since['fp8_over_bf16']:.1f}x, together {since['together']:.1f}x; "
        f"HBM {since['hbm']:.1f}x; a pod {pod['v4_to_8t']:.1f}x",
        f"a pod that grows on so is {pod['extended']:.1f}x: more chips than that are more pods",
        f"power: 8t does {pod['perf_per_watt_8t_over_7x']:g}x Ironwood's work a watt (up to); watts"
        " themselves are not published",
        "",
        "what would have to be true at the central figures:",
        *[f"- {f['name']}: {f['truth']}" for f in result["factors"]],
    ]
    return "\n".join(lines)


def _times(value: float) -> str:
    """12.3x, 0.15x, 3.3e+04x."""
    return f"{value:.3g}x"


def draw(result: dict[str, Any], path: Path) -> None:
    """Ranges of the factors, and how each scenario reaches the target, on a log scale: a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    _draw_ranges(left, result["factors"])
    _draw_scenarios(right, result)
    figure.suptitle(
        f"{result['target']:,.0f}x effective compute in {result['years']:g} years: projected"
    )
    with replacing_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130)
    pyplot.close(figure)


def _draw_ranges(axes: Any, factors: list[dict[str, Any]]) -> None:
    for row, f in enumerate(reversed(factors)):
        color = "#2b9c8c" if f["kind"] == "history" else "#d9822b"
        axes.plot([f["low"], f["high"]], [row, row], color=color, linewidth=6, alpha=0.35)
        axes.plot([f["central"]], [row], "o", color=color)
    axes.set_yticks(range(len(factors)), [f["name"] for f in reversed(factors)])
    axes.set_xscale("log")
    axes.axvline(1, color="#888", linewidth=0.8)
    axes.set_xlabel("times (green: from chip facts, orange: assumed)")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_scenarios(axes: Any, result: dict[str, Any]) -> None:
    """Stacked log10 shares; where the others overshoot, fewer chips are needed: a bar below 0."""
    colors = ("#3f74d6", "#8d6cc9", "#2b9c8c", "#5c6670", "#d9822b", "#b3261e")
    names = list(result["scenarios"])
    for place, scenario in enumerate(result["scenarios"].values()):
        bottom = 0.0
        parts = {**scenario["factors"], "chips": scenario["chips"]}
        for (name, value), color in zip(parts.items(), colors, strict=True):
            height = log10(value)
            start = bottom if height >= 0 else 0.0
            axes.bar(place, height, bottom=start, color=color, label=name if place == 0 else None)
            bottom += max(0.0, height)
    target = log10(result["target"])
    axes.axhline(target, color="#222", linewidth=1, linestyle="--")
    axes.axhline(0, color="#888", linewidth=0.8)
    axes.set_xticks(range(len(names)), [name.replace("better ", "better\n") for name in names])
    axes.set_ylabel("powers of ten (chips: what is left to buy)")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)


def main() -> int:
    """The command line."""
    options = tyro.cli(Options)
    try:
        result = split(options)
        print(report(result))
        if options.json is not None:
            write_json(options.json, result)
        if options.plot is not None:
            draw(result, options.plot)
    except UserError as error:
        print(f"million_x: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
