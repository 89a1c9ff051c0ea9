"""The comparison as one self-contained HTML page: works offline, on a phone and on a desk.

>>> write_text(Path("compare.html"), render_comparison(compare(request)))
"""

from pathlib import Path
from typing import Any

import jinja2

from tpu_stack.planner.report.charts import PARTS, memory_bars, roofline_chart, term_bars, time_bars
from tpu_stack.planner.report.words import move_text, spec_text
from tpu_stack.units import bytes_text, seconds_text, si_text

TEMPLATE = Path(__file__).with_name("comparison.html.jinja")


def render_comparison(result: dict[str, Any]) -> str:
    """The page for a comparison as `planner.compare.compare` returns it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=bytes_text, seconds=seconds_text, si=si_text, spec=spec_text, move=move_text
    )
    chips = list(dict.fromkeys(c["chip"] for c in result["two_by_two"] if "unavailable" not in c))
    return environment.get_template(TEMPLATE.name).render(
        cmp=result,
        chips=list(dict.fromkeys(cell["chip"] for cell in result["two_by_two"])),
        rooflines=[roofline_chart(chip, result["programs"]) for chip in chips],
        times=time_bars(result["two_by_two"]),
        terms=term_bars(result["two_by_two"]),
        memories=memory_bars(result["programs"]),
        part_names=[name for name, _ in PARTS],
    )
