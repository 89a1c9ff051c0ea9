"""The 2 x 2 again, by the simulator: what the roofline leaves out is in its fitted constants.

The roofline is the least time possible; this is the time that published results of like programs
took, carried over. Terms are exposed time and sum to the step. Always projected, and extrapolated
for a chip on which no published result was calibrated: 8t and 8i take 7x's constants. Prefill is
its products alone, so where collectives bind it may undercut its roofline.

    add_simulated(two_by_two(programs), request)
"""

import dataclasses
from typing import Any

from tpu_stack.planner.backtest.calibration import Calibration
from tpu_stack.planner.request import Request
from tpu_stack.planner.simulate.program import (
    serve_job,
    simulate_decode,
    simulate_prefill,
    simulate_train,
)
from tpu_stack.sharding.profiles import Profile

_KINDS = {"train_step": ("train",), "prefill": ("decode", "serve"), "decode": ("decode", "serve")}


def add_simulated(cells: list[dict[str, Any]], request: Request) -> list[dict[str, Any]]:
    """The cells of `two_by_two` with `simulated` each: None where the chip cannot hold the mesh.

    `of_best` in it compares with the best simulated rate among the chips that the program fits.
    """
    fitted = Calibration.load()
    found = [
        {**cell, "simulated": None if "unavailable" in cell else _cell(cell, request, fitted)}
        for cell in cells
    ]
    for cell in found:
        if not cell["fits"]:
            continue
        rivals = [c for c in found if c["program"] == cell["program"] and c["fits"]]
        best = max(rival["simulated"]["tokens_per_s_per_chip"] for rival in rivals)
        cell["simulated"]["of_best"] = cell["simulated"]["tokens_per_s_per_chip"] / best
    return found


def _cell(cell: dict[str, Any], request: Request, fitted: Calibration) -> dict[str, Any]:
    program, chip = cell["program"], cell["chip"]
    step = _step(program, chip, request, fitted.full)
    return {
        "step_s": step["step_s"],
        "terms_s": step["terms_s"],
        "tokens_per_s_per_chip": step["tokens_per_s_per_chip"],
        "of_best": None,
        "extrapolated": not any(f"{kind} {chip}" in fitted.seen for kind in _KINDS[program]),
        "label": "projected",
        "rung": 4,
    }


def _step(program: str, chip: str, request: Request, fit: Any) -> dict[str, Any]:
    """`step_s`, `terms_s` and `tokens_per_s_per_chip` of the program on the chip."""
    work = request.workload
    if program == "train_step":
        profile = on_chip(request.train, chip)
        return simulate_train(
            request.config, profile, fit.train, batch=work.batch_size, seq_len=work.seq_len
        )
    job = serve_job(request.config, on_chip(request.serve, chip), request.format)
    if program == "decode":
        return simulate_decode(
            job, fit.train, fit.serve, batch=work.serve_batch, context=work.context
        )
    one = simulate_prefill(job, fit.train, fit.serve, prompt=work.prompt)
    seconds = one["seconds"] * work.prefill_step(request.serve).tokens / work.prompt
    rate = one["tokens_per_s_per_chip"]
    return {"step_s": seconds, "terms_s": {"products": seconds}, "tokens_per_s_per_chip": rate}


def on_chip(profile: Profile, chip: str) -> Profile:
    """The profile with its mesh on another chip: as many devices, hence maybe fewer chips."""
    moved = dataclasses.replace(profile, chip=chip)
    chips = profile.devices // moved.chip_facts.devices(1)
    return dataclasses.replace(moved, name=f"{chip}:{chips}", chips=chips)
