"""The Pareto front as a picture: every plan a faint dot, those that none beats joined by a line.

Example:
    write_plot(found, Path("front.png"))
"""

from itertools import cycle
from pathlib import Path

from tpu_stack.errors import UserError
from tpu_stack.files import replacing_file
from tpu_stack.planner.search.candidate import Plan
from tpu_stack.planner.search.find import Found
from tpu_stack.planner.search.goals import COST, LATENCY, Objective

SUFFIXES = (".png", ".svg", ".pdf")
LABELS = 8
"""Points of the front that are numbered and named below: its ends and some between."""
COLOURS = ("#3b6fb6", "#c8553d", "#4d8f5b", "#8a63a8", "#b58a2b", "#4b4b4b")


def check_path(path: Path) -> None:
    """Raises UserError for a kind of file that is not written."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--plot {path}: the name must end in {', '.join(SUFFIXES)}")


def write_plot(found: Found, path: Path) -> None:
    """Draws `found.plans` and `found.front`; the file is written whole or not at all.

    Raises UserError for an unknown suffix or a file that cannot be written.
    """
    check_path(path)
    from matplotlib.figure import Figure

    goal = found.question.goal
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    _dots(axes, found, goal.second, goal.first)
    _line(axes, found.front, goal.second, goal.first)
    _key(figure, axes, found.front, goal.second, goal.first)
    axes.set_title(_title(found), loc="left", fontsize=11)
    axes.set_xlabel(goal.second.label)
    axes.set_ylabel(goal.first.label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    for objective, axis, scale in (
        (goal.second, axes.xaxis, axes.set_xscale),
        (goal.first, axes.yaxis, axes.set_yscale),
    ):
        if objective in (LATENCY, COST):
            scale("log")
            axis.set_major_formatter("{x:g}")
    axes.margins(x=0.06, y=0.1)
    axes.legend(frameon=False, loc="best", fontsize=8)
    with replacing_file(path) as partial:
        figure.savefig(partial, format=path.suffix.lower()[1:], dpi=140)


def _title(found: Found) -> str:
    ask, program = found.question.ask, found.question.program
    goal = f"{ask.goal} of {program}" if ask.goal == "cost" else ask.goal
    return f"{ask.model} on {', '.join(ask.chips)}: {goal}, projected (rung 4)"


def _dots(axes, found: Found, x: Objective, y: Objective) -> None:
    """Every plan, by chip."""
    chips = dict.fromkeys(plan.candidate.profile.chip for plan in found.plans)
    for chip, colour in zip(chips, cycle(COLOURS), strict=False):
        plans = [plan for plan in found.plans if plan.candidate.profile.chip == chip]
        xs, ys = [x.shown(plan) for plan in plans], [y.shown(plan) for plan in plans]
        axes.scatter(xs, ys, s=9, alpha=0.3, color=colour, linewidths=0, label=f"a plan on {chip}")


def _line(axes, front: list[Plan], x: Objective, y: Objective) -> None:
    """The front, each point of it a dot."""
    points = sorted((x.shown(plan), y.shown(plan)) for plan in front)
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, "o-", color="#202020", markersize=4, linewidth=1.2, label="Pareto front")


def _key(figure, axes, front: list[Plan], x: Objective, y: Objective) -> None:
    """Numbers at some points of the front, and what they stand for below the axes."""
    from matplotlib.lines import Line2D

    last, count = len(front) - 1, min(LABELS, len(front))
    places = sorted({round(last * i / max(1, count - 1)) for i in range(count)})
    handles, names = [], []
    for number, place in enumerate(places, 1):
        plan, at = front[place], (0, -13) if x.rising else (7, -10)
        axes.annotate(
            str(number), (x.shown(plan), y.shown(plan)), xytext=at,
            textcoords="offset points", fontsize=9, fontweight="bold",
        )  # fmt: skip
        handles.append(Line2D([], [], linestyle="", marker=f"${number}$", color="#202020"))
        names.append(plan.candidate.text)
    figure.legend(
        handles, names, loc="outside lower left", ncols=2, fontsize=8, frameon=False,
        handletextpad=0.3,
    )  # fmt: skip
