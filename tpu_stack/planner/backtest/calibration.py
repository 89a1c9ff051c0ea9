"""The fitted constants as data: for all published rows, and without each family of models.

`fitted.json` is written by `python -m tpu_stack.planner.backtest.calibrate FILE.csv` and says which
rows it was fitted on. A row that is among them is predicted with the constants fitted without its
family, so that its error is one of prediction; any other row is new and gets the fit of all.

    Calibration.load().full.train.mxu("v5e")
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tpu_stack.planner.backtest.table import Row
from tpu_stack.planner.simulate.constants import PRIOR, SERVE_PRIOR, Constants, ServeConstants

FITTED = Path(__file__).with_name("fitted.json")
FAMILIES = (
    "gpt3", "gpt-oss", "llama2", "llama3", "llama4", "mixtral-like", "mixtral", "mistral",
    "deepseek", "gemma", "qwen", "palm", "fuji", "honeycrisp", "marin", "maxtext",
)  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """Constants of training (and of large matmuls everywhere), and of serving."""

    train: Constants = PRIOR
    serve: ServeConstants = SERVE_PRIOR


@dataclass(frozen=True)
class Calibration:
    """Attributes:
    full: fitted on all rows. without: family -> fitted on the rows of the others.
    rows: ids of the rows it was fitted on.
    seen: "kind chip" -> {"rows", "max_chips", "min_params_b", "max_params_b", "experts"}.
    """

    full: Fit
    without: Mapping[str, Fit]
    rows: frozenset[str]
    seen: Mapping[str, Mapping[str, Any]]

    @classmethod
    @cache
    def load(cls) -> "Calibration":
        """The constants that come with the project."""
        return cls.from_json(json.loads(FITTED.read_text()))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Calibration":
        """The inverse of `as_json`."""
        fits = {name: _fit(values) for name, values in data["without"].items()}
        return cls(_fit(data["full"]), fits, frozenset(data["rows"]), data["seen"])

    def as_json(self) -> dict[str, Any]:
        """JSON-ready: every constant by name."""
        return {
            "full": _fit_json(self.full),
            "without": {name: _fit_json(fit) for name, fit in sorted(self.without.items())},
            "rows": sorted(self.rows),
            "seen": dict(self.seen),
        }

    def extrapolates(self, row: Row) -> str:
        """In what the row lies outside what the constants were fitted on; "" if in nothing."""
        seen = self.seen.get(f"{row.kind} {row.chip}")
        if seen is None:
            return f"no {row.kind} row on {row.chip} was calibrated on"
        outside = []
        if row.number("experts") and not seen["experts"]:
            outside.append(f"no {row.kind} row with experts on {row.chip}")
        chips, params = row.number("n_chips") or 1, row.number("params_b")
        if chips > 2 * seen["max_chips"]:
            outside.append(f"{chips:g} chips, at most {seen['max_chips']:g} were calibrated on")
        if params and not seen["min_params_b"] / 2 <= params <= 2 * seen["max_params_b"]:
            low, high = seen["min_params_b"], seen["max_params_b"]
            outside.append(f"{params:g}B parameters, outside {low:g}B to {high:g}B")
        return "; ".join(outside)


def family(row: Row) -> str:
    """The family of the row's model: a known one, else the leading letters of its name."""
    name = row.text["model"].lower()
    for known in FAMILIES:
        if known in name or known in name.replace("-", ""):
            return known
    found = re.match(r"[a-z]+", name)
    return found[0] if found else name


def coverage(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """What `seen` says of these rows."""
    seen: dict[str, dict[str, Any]] = {}
    for row in rows:
        params = row.number("params_b") or 1.0
        entry = seen.setdefault(
            f"{row.kind} {row.chip}",
            {"rows": 0, "max_chips": 0, "min_params_b": params, "max_params_b": params,
             "experts": False},
        )  # fmt: skip
        entry["rows"] += 1
        entry["max_chips"] = max(entry["max_chips"], row.number("n_chips") or 1)
        entry["min_params_b"] = min(entry["min_params_b"], params)
        entry["max_params_b"] = max(entry["max_params_b"], params)
        entry["experts"] |= bool(row.number("experts"))
    return seen


def _fit(values: Mapping[str, Any]) -> Fit:
    return Fit(Constants(**values["train"]), ServeConstants(**values["serve"]))


def _fit_json(fit: Fit) -> dict[str, dict[str, float]]:
    parts = {"train": fit.train, "serve": fit.serve}
    return {
        name: {field: float(f"{value:.4g}") for field, value in vars(part).items()}
        for name, part in parts.items()
    }
