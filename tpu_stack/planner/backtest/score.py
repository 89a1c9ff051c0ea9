"""The backtest: every row predicted, its error, and the errors of the baselines beside it.

Example:
    result = backtest(read_rows(Path("published.csv")), Calibration.load())
    result["summary"]["train"]["median_abs_error"]
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tpu_stack.planner.backtest.baselines import NAMES, baselines
from tpu_stack.planner.backtest.calibration import Calibration, family
from tpu_stack.planner.backtest.predict import Prediction, predict
from tpu_stack.planner.backtest.table import KINDS, Row

RUNG = "4 projected: a simulator with constants fitted to published results"
DEFINITIONS = {
    "error": "predicted / published - 1, in the row's own metric",
    "predicted": "for rows the constants were fitted on, with those fitted without the row's family"
    " of models (cross-validated); for any other row, with the fit of all",
    "in_sample": "the value with the constants fitted on all rows, the row itself among them",
}


def backtest(rows: list[Row], calibration: Calibration) -> dict[str, Any]:
    """JSON-ready: `rows`, `summary` by kind, `by_chip`, `baselines`, `definitions`."""
    found = {row.id: predict(row, calibration) for row in rows}
    rules = baselines(rows)
    values = {row.id: found[row.id].value for row in rows if found[row.id].value is not None}
    return {
        "rung": RUNG,
        "definitions": DEFINITIONS,
        "rows": [_row_json(row, found[row.id]) for row in rows],
        "summary": {kind: _summary(rows, kind, values, found, rules) for kind in KINDS},
        "by_chip": {
            f"{kind} {chip}": stats
            for kind, chip in dict.fromkeys((row.kind, row.chip) for row in rows)
            if (stats := _stats([r for r in rows if (r.kind, r.chip) == (kind, chip)], values))
        },
        "baselines": dict(NAMES),
    }


def _row_json(row: Row, found: Prediction) -> dict[str, Any]:
    error = None if found.value is None else found.value / row.value - 1
    return {
        "id": row.id,
        "kind": row.kind,
        "chip": row.chip,
        "family": family(row),
        "metric": row.metric,
        "published": row.value,
        "predicted": found.value,
        "error": error,
        "in_sample": found.in_sample,
        "held_out": found.held_out or None,
        "reason": found.reason or None,
        "assumed": found.assumed,
        "extrapolated": found.extrapolated or None,
    }


def _stats(rows: list[Row], values: Mapping[str, float | None]) -> dict[str, Any] | None:
    pairs = [(values.get(row.id), row.value) for row in rows]
    errors = [abs(found / published - 1) for found, published in pairs if found is not None]
    if not errors:
        return None
    return {
        "rows": len(errors),
        "median_abs_error": float(np.median(errors)),
        "p90_abs_error": float(np.percentile(errors, 90)),
    }


def _summary(
    rows: list[Row],
    kind: str,
    values: Mapping[str, float | None],
    found: Mapping[str, Prediction],
    rules: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Errors of one kind; the baselines' over the very rows that were predicted."""
    own = [row for row in rows if row.kind == kind]
    predicted = [row for row in own if values.get(row.id) is not None]
    stats = _stats(own, values) or {"rows": 0, "median_abs_error": None, "p90_abs_error": None}
    held = [row for row in predicted if found[row.id].held_out]
    in_sample = {row.id: found[row.id].in_sample for row in held}
    return {
        **stats,
        "unpredicted": len(own) - len(predicted),
        "cross_validated": len(held),
        "new": len(predicted) - len(held),
        "in_sample": _stats(held, in_sample),
        "baselines": {name: _stats(predicted, rule) for name, rule in rules.items()},
    }
