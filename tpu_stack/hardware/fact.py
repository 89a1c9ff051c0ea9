"""A number about a chip, together with its source and the sources that contradict it.

Published TPU figures disagree (rounding, GB for GiB, plain conflict); a plan that averages them or
drops some cannot be checked. The unit is part of the fact, and `note` says when a figure is
derived.

>>> Fact(value=8_600_000_000_000, unit="bytes/s", source="JX").value
8600000000000
"""

from dataclasses import dataclass, replace
from typing import Any

SOURCES: dict[str, str] = {
    "JX": "jax 0.12's chip table (tpu_info), per TensorCore there, times the TensorCores here",
    "DD": "Google Cloud's technical deep dive on TPU 8t and 8i, April 2026",
    "BL": "blog.google's announcement of TPU 8 and its graphic, read second-hand",
    "GD": "Cloud TPU and GKE documentation pages",
    "SB": "jax-ml/scaling-book, 'How to think about TPUs'",
    "XX": "second-hand: check before use",
    "TS": "tpu_stack's own definition",
}

UNITS = (
    "bytes", "bytes/s", "FLOP/s", "OP/s", "chips", "devices", "cores", "count", "hops",
    "USD/hour", "ratio", "W", "text",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One figure, where it was read, and every other source's figure for the same thing.

    Invariants: `source` is a key of `SOURCES`; `others` share the unit and have no `others` of
    their own; wherever a source disagrees, `chosen_because` says why this one is used. Raises
    ValueError where one of these does not hold.
    """

    value: int | float | str
    unit: str
    source: str
    note: str = ""
    others: tuple["Fact", ...] = ()
    chosen_because: str = ""

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"unknown source {self.source!r}")
        if self.unit not in UNITS:
            raise ValueError(f"unknown unit {self.unit!r}")
        if any(other.unit != self.unit or other.others for other in self.others):
            raise ValueError(f"other sources of {self.value} {self.unit} must be flat, same unit")
        if self.disagreements and not self.chosen_because:
            raise ValueError(f"{self.value} {self.unit} is disputed and has no chosen_because")

    @property
    def disagreements(self) -> tuple["Fact", ...]:
        """Facts of other sources with another value; a rounded value counts as another."""
        return tuple(other for other in self.others if other.value != self.value)

    @property
    def number(self) -> int | float:
        """The value, for arithmetic. Raises TypeError for a fact that is text."""
        if isinstance(self.value, str):
            raise TypeError(f"{self.value!r} is text, not a number")
        return self.value

    def as_json(self) -> dict[str, Any]:
        """JSON-ready: value, unit, source, note, and the other sources split by agreement."""
        split = {True: [], False: []}
        for other in self.others:
            entry = {"value": other.value, "source": other.source, "note": other.note}
            split[other.value == self.value].append(entry)
        return {
            "value": self.value,
            "unit": self.unit,
            "source": self.source,
            "note": self.note,
            "chosen_because": self.chosen_because,
            "agreements": split[True],
            "disagreements": split[False],
        }


def choose(candidates: tuple[Fact, ...]) -> Fact | None:
    """The fact to use, out of one per source, with the rest in `others`; None if there is none.

    The first candidate wins, so callers put jax's table first. The exception: jax writes 0 for
    "Not Available", so the first figure that is not 0 replaces a 0.
    """
    if not candidates:
        return None
    first, because = candidates[0], "jax's table comes first wherever it has a figure"
    if first.source != "JX":
        because = first.note or "it is listed first"
    if first.value == 0:
        nonzero = [fact for fact in candidates if fact.value != 0]
        if nonzero:
            first, because = nonzero[0], "jax's 0 means Not Available, and this source has a figure"
    others = tuple(fact for fact in candidates if fact is not first)
    disputed = any(other.value != first.value for other in others)
    return replace(first, others=others, chosen_because=because if disputed else "")
