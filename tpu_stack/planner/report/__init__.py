"""Self-contained HTML pages: they work offline, from one file, on a phone and on a desk.

Example:
    write_text(Path("report.html"), render(report))
"""

from tpu_stack.planner.report.demo import render
from tpu_stack.planner.report.page import render_comparison

__all__ = ["render", "render_comparison"]
