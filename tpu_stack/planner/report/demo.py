"""The demo's report as one self-contained HTML page: no script, no request, works offline.

Example:
    write_text(Path("report.html"), render(json.loads(Path("report.json").read_text())))
"""

import io
from typing import Any

from tpu_stack.planner.report.templates import template


def render(report: dict[str, Any]) -> str:
    """The page for a report as `tpu-stack demo` writes it."""
    return template("demo.html.jinja").render(
        report=report,
        loss_curve=loss_curve(report["train"]),
        format_bars=format_bars(report["eval"]),
    )


def loss_curve(train: dict[str, Any]) -> str:
    """The training loss by step, with validation points, as inline SVG."""
    figure, axes = _figure(6.4, 2.6)
    steps, losses = zip(*train["losses"], strict=True)
    axes.plot(steps, losses, linewidth=1.2, color="#1a73e8", label="training")
    if train["evaluations"]:
        points = [(step, found["loss"]) for step, found in train["evaluations"]]
        axes.plot(*zip(*points, strict=True), "o", color="#d93025", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    return _svg(figure)


def format_bars(evaluations: dict[str, Any]) -> str:
    """Weight bytes per device by format, with the perplexity above each bar, as inline SVG."""
    figure, axes = _figure(4.2, 2.6)
    names = list(evaluations)
    sizes = [evaluations[name]["bytes_per_device"] / 1024 for name in names]
    bars = axes.bar(names, sizes, color="#1a73e8", width=0.6)
    labels = [f"perplexity {evaluations[name]['perplexity']:.2f}" for name in names]
    axes.bar_label(bars, labels, padding=2, fontsize=8)
    axes.margins(y=0.18)
    axes.set_ylabel("KiB of weights per device")
    return _svg(figure)


def _figure(width: float, height: float):
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure) -> str:
    from matplotlib import pyplot

    buffer = io.StringIO()
    with pyplot.rc_context({"svg.hashsalt": "tpu_stack"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
