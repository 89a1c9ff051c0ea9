"""The comparison as one self-contained HTML page: works offline, on a phone and on a desk.

Example:
    write_text(Path("compare.html"), render_comparison(compare(request)))
"""

from typing import Any

from tpu_stack.planner.report.charts import PARTS, memory_bars, roofline_chart, term_bars, time_bars
from tpu_stack.planner.report.templates import template
from tpu_stack.planner.report.words import move_text, spec_text


def render_comparison(result: dict[str, Any]) -> str:
    """The page for a comparison as `planner.compare.compare` returns it."""
    chips = list(dict.fromkeys(c["chip"] for c in result["two_by_two"] if "unavailable" not in c))
    page = template("comparison.html.jinja", spec=spec_text, move=move_text)
    return page.render(
        cmp=result,
        chips=list(dict.fromkeys(cell["chip"] for cell in result["two_by_two"])),
        rooflines=[roofline_chart(chip, result["programs"]) for chip in chips],
        times=time_bars(result["two_by_two"]),
        terms=term_bars(result["two_by_two"]),
        memories=memory_bars(result["programs"]),
        part_names=[name for name, _ in PARTS],
    )
