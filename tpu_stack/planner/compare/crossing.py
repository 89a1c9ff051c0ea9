"""The 2 x 2: every program on both chips, so that specialization is seen rather than believed.

A program keeps its mesh, so it has as many JAX devices on either chip; what is compared is per
chip. All of it is projected: no figure here was measured on any of the chips.

    [(cell["program"], cell["chip"], cell["bound"]) for cell in two_by_two(programs)]
"""

from collections.abc import Sequence
from typing import Any

ROLES = {"train_step": "train", "prefill": "serve", "decode": "serve"}
_SHOWN = (
    "chips", "devices", "time_s", "time_no_overlap_s", "tokens_per_s_per_chip", "bound",
    "bound_by_hops", "mfu", "breakdown", "label", "rung",
)  # fmt: skip


def two_by_two(programs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One cell per program and chip, from what `pricing.describe_program` says of each program.

    The chips come in the same order for every program: the page's columns rely on it.

    `of_best` is tokens/s a chip over the best among the chips that hold the program; None where it
    does not fit, as a rate that cannot be had is no rate.
    """
    chips = list(dict.fromkeys(chip for program in programs for chip in program["roofline"]))
    cells = [
        _cell(program, chip)
        for program in programs
        for chip in chips
        if chip in program["roofline"]
    ]
    for cell in cells:
        rates = [
            c["tokens_per_s_per_chip"]
            for c in cells
            if c["program"] == cell["program"] and c["fits"]
        ]
        cell["of_best"] = cell["tokens_per_s_per_chip"] / max(rates) if cell["fits"] else None
    return cells


def _cell(program: dict[str, Any], chip: str) -> dict[str, Any]:
    found = program["roofline"][chip]
    cell = {
        "role": ROLES[program["name"]],
        "program": program["name"],
        "chip": chip,
        "own": chip == program["chip"],
    }
    if "unavailable" in found:
        return {**cell, "fits": False, "unavailable": found["unavailable"]}
    memory = found["memory"]
    return {
        **cell,
        "fits": memory["fits"],
        "memory_share": memory["share"],
        **{name: found[name] for name in _SHOWN},
    }
