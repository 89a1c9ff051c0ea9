"""`tpu-stack plan backtest`: the simulator's error on results that others published."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from tpu_stack.cli.console import print_table
from tpu_stack.files import write_json
from tpu_stack.planner.backtest.calibration import Calibration
from tpu_stack.planner.backtest.score import backtest
from tpu_stack.planner.backtest.table import read_rows


@dataclass(frozen=True)
class Options:
    """Predict published TPU results row by row, and print each error and a summary.

    Rows that the simulator's constants were fitted on are cross-validated: predicted with constants
    fitted without the row's family of models.

    Example: tpu-stack plan backtest published.csv --json backtest.json
    """

    file: Annotated[Path, tyro.conf.Positional]
    """CSV with the columns of the project's table of published results."""
    json: Path | None = None
    """Also write everything to this file."""


def run(options: Options) -> None:
    """Predicts, and prints every row and the summary."""
    result = backtest(read_rows(options.file), Calibration.load())
    if options.json is not None:
        write_json(options.json, result)
    _print_rows(result["rows"])
    _print_summary(result)


def _print_rows(rows: list[dict[str, Any]]) -> None:
    table = []
    for row in rows:
        said = [row["reason"] and f"not predicted: {row['reason']}"]
        said += [row["extrapolated"] and f"extrapolated: {row['extrapolated']}", *row["assumed"]]
        table.append(
            [row["id"], row["kind"], row["chip"], row["metric"], f"{row['published']:,.4g}",
             "-" if row["predicted"] is None else f"{row['predicted']:,.4g}",
             "-" if row["error"] is None else f"{row['error']:+.1%}",
             "; ".join(filter(None, said))]
        )  # fmt: skip
    columns = ["row", "kind", "chip", "metric", "published", "predicted", "error", ""]
    print_table("published and predicted", columns, table)


def _print_summary(result: dict[str, Any]) -> None:
    table = []
    for kind, found in result["summary"].items():
        if not found["rows"] and not found["unpredicted"]:
            continue
        counts = f"{found['cross_validated']} cross-validated, {found['new']} new"
        if found["unpredicted"]:
            counts += f", {found['unpredicted']} not predicted"
        table.append([kind, "simulator", *_shares(found), counts])
        table.append([kind, "simulator, in sample", *_shares(found["in_sample"]), ""])
        for name, stats in found["baselines"].items():
            table.append([kind, result["baselines"][name], *_shares(stats), ""])
    columns = ["kind", "predictor", "rows", "median error", "90th percentile", "of which"]
    print_table(f"\nerrors ({result['rung']})", columns, table)
    chips = [[name, *_shares(stats)] for name, stats in result["by_chip"].items()]
    print_table("\nby chip", ["kind and chip", "rows", "median error", "90th percentile"], chips)


def _shares(stats: dict[str, Any] | None) -> list[str]:
    if stats is None or not stats["rows"]:
        return ["0", "-", "-"]
    return [str(stats["rows"]), f"{stats['median_abs_error']:.1%}", f"{stats['p90_abs_error']:.1%}"]
