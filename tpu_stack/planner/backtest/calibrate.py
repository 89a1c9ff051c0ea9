"""Fits the simulator's constants to published rows: few constants, strong priors, none per row.

Every constant is moved in logarithm from its prior (`simulate.constants`) by least squares over
log(predicted / published), with a penalty for leaving the prior, errors beyond a few per cent
growing only linearly (pseudo-Huber), and families of many rows weighed down. Serving constants are
fitted after, and with, the training ones, which set the rate of large matmuls.

    python -m tpu_stack.planner.backtest.calibrate published.csv

writes `fitted.json` beside this file, in about a minute.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from tpu_stack.errors import UserError
from tpu_stack.files import write_json
from tpu_stack.planner.backtest.calibration import FITTED, Calibration, Fit, coverage, family
from tpu_stack.planner.backtest.predict import evaluate
from tpu_stack.planner.backtest.table import Row, read_rows

SHARES = {
    "hbm", "flash", "flash_wide", "int8", "fp8", "low_experts", "fsdp", "tensor", "expert", "data",
    "dcn", "weights_hbm", "cache_hbm", "decode_mxu", "prefill", "collectives",
}  # fmt: skip
"""Constants that cannot pass 1."""
WIDTHS = {"train": 0.7, "serve": 0.5, "mxu": 0.1, "serve shares": 0.2}
"""Standard deviations of the priors, in logarithm."""
ERRORS = {"train": 0.05, "decode": 0.1, "serve": 0.1}
"""Errors, in logarithm, that published rows of a kind are trusted to."""
MAX_STEPS = 100
"""Of a search; one that needs as many has not converged."""


def calibrate(rows: Sequence[Row], done: Callable[[str], None] = lambda name: None) -> Calibration:
    """Fits all rows, and all rows but those of each family; `done` is told each family."""
    usable = [row for row in rows if row.kind in ERRORS and _predictable(row)]
    full = fit(usable)
    without = {}
    for name in sorted({family(row) for row in usable}):
        without[name] = fit([row for row in usable if family(row) != name])
        done(name)
    ids = frozenset(row.id for row in usable)
    return Calibration(full, without, ids, coverage(usable))


def _predictable(row: Row) -> bool:
    try:
        evaluate(row, Fit(), [])
    except UserError:
        return False
    return True


def fit(rows: Sequence[Row]) -> Fit:
    """The constants that fit these rows, searched from the priors and from nowhere else.

    A search that began at the fit of all rows and stopped early would carry a left-out family's
    rows into the constants that predict them.
    """
    train = [row for row in rows if row.kind == "train"]
    serve = [row for row in rows if row.kind != "train"]
    found = _fit_part("train", train, Fit()) if train else Fit()
    return _fit_part("serve", serve, found) if serve else found


def _fit_part(part: str, rows: Sequence[Row], others: Fit) -> Fit:
    """`others` with the constants of one part fitted."""
    prior = getattr(Fit(), part)
    names = [field.name for field in dataclasses.fields(prior)]
    mean = np.log([getattr(prior, name) for name in names])
    width = np.array([_width(part, name) for name in names])
    sizes = Counter((row.kind, family(row)) for row in rows)
    weights = np.array([sizes[row.kind, family(row)] ** -0.25 for row in rows])

    def at(x: np.ndarray) -> Fit:
        values = dict(zip(names, map(float, np.exp(x)), strict=True))
        return dataclasses.replace(others, **{part: prior.with_changes(values)})

    def residuals(x: np.ndarray) -> np.ndarray:
        constants = at(x)
        errors = np.array(
            [np.log(evaluate(r, constants, []) / r.value) / ERRORS[r.kind] for r in rows]
        )
        huber = np.sign(errors) * np.sqrt(2 * (np.sqrt(1 + errors**2) - 1))
        return np.concatenate([huber * weights, (x - mean) / width])

    highest = np.where([name in SHARES for name in names], 0.0, np.inf)
    return at(least_squares(residuals, mean, bounds=(-np.inf, highest), max_nfev=MAX_STEPS).x)


def _width(part: str, name: str) -> float:
    if name.startswith("mxu"):
        return WIDTHS["mxu"]
    return WIDTHS["serve shares" if part == "serve" and name in SHARES else part]


def main(arguments: list[str]) -> int:
    """The command line: the table's path."""
    if len(arguments) != 1:
        print("usage: python -m tpu_stack.planner.backtest.calibrate FILE.csv", file=sys.stderr)
        return 2
    try:
        rows = read_rows(Path(arguments[0]))
    except (UserError, OSError) as error:
        print(f"calibrate: error: {error}", file=sys.stderr)
        return 2
    fitted: dict[str, Any] = calibrate(
        rows, lambda name: print("without", name, flush=True)
    ).as_json()
    write_json(FITTED, fitted)
    print(f"wrote {FITTED}: {len(fitted['rows'])} rows, {len(fitted['without'])} families")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
