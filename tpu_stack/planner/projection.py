"""How long a step takes on a chip that is not here, *projected* by the fitted simulator.

Example:
    project("llama3_70b", "v5p:4x8x8")["train_step"]["terms_s"]
"""

import dataclasses
from typing import Any, Literal

from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.planner.backtest.calibration import Calibration
from tpu_stack.planner.memory.predict import limit_of
from tpu_stack.planner.memory.serve import ServeMemory
from tpu_stack.planner.request import place
from tpu_stack.planner.simulate.program import (
    serve_job,
    simulate_decode,
    simulate_prefill,
    simulate_train,
)
from tpu_stack.planner.workload import Workload
from tpu_stack.sharding.profiles import Profile

BATCHES = (1, 4, 16, 32, 64, 128, 256, 512)
"""Rows per engine that decoding is projected for."""


def project(
    model: str,
    profile: str,
    *,
    program: Literal["train", "serve"] | None = None,
    mesh: str | None = None,
    batch_size: int | None = None,
    seq_len: int = 4096,
    remat: Literal["none", "dots", "full"] | None = None,
    accumulate: int = 1,
    format: str = "int4",
    context: int = 4096,
    prompt: int = 1024,
) -> dict[str, Any]:
    """The step's terms in seconds, tokens per second and cost, JSON-ready.

    Args:
      model: a preset. profile: NAME:TOPOLOGY, counting chips. program: 8i serves and every other
        chip trains unless told. mesh: axis sizes; the default is the nearest legal mesh.
      batch_size, seq_len, remat, accumulate: of a train step; 8192 tokens a device by default.
      format, context, prompt: of serving: how weights are stored, positions that each sequence
        holds, tokens of a prompt.

    Raises UserError for what cannot be placed.
    """
    if program not in (None, "train", "serve"):
        raise UserError(f"program is {program!r}; the simulator projects train and serve")
    role = program or ("serve" if profile.startswith("8i") else "train")
    config, placed = place(model, profile, role, mesh, format)
    fitted = Calibration.load()
    if role == "train":
        placed = dataclasses.replace(placed, remat=remat) if remat else placed
        work = Workload.of(config, placed, placed, batch_size=batch_size, seq_len=seq_len)
        found = _train(config, placed, fitted.full, work, accumulate)
    else:
        found = _serve(config, placed, fitted.full, format, context, prompt)
    return {
        "model": model,
        "profile": placed.name,
        "role": role,
        "mesh": dict(placed.mesh),
        "label": "projected",
        "rung": "4 projected: a simulator with constants fitted to published results",
        **found,
        "notes": _notes(role, placed.chip_facts, fitted),
    }


def _train(
    config: ModelConfig, profile: Profile, fit: Any, work: Workload, accumulate: int
) -> dict[str, Any]:
    sizes = {"batch": work.batch_size, "seq_len": work.seq_len}
    step = simulate_train(config, profile, fit.train, **sizes, accumulate=accumulate)
    return {"batch_size": work.batch_size, "seq_len": work.seq_len, "train_step": step}


def _serve(
    config: ModelConfig, profile: Profile, fit: Any, format: str, context: int, prompt: int
) -> dict[str, Any]:
    job = serve_job(config, profile, format)
    memory, capacity = ServeMemory(config, profile, format), limit_of(profile)
    decode = []
    for batch in (job.replicas * size for size in BATCHES):
        total = memory.predict("decode", batch=batch, context=context, prompt=prompt).held_bytes
        step = simulate_decode(job, fit.train, fit.serve, batch=batch, context=context)
        decode.append(step | {"bytes_per_device": total, "fits": total <= capacity})
    return {
        "format": format,
        "context": context,
        "hbm_bytes_per_device": capacity,
        "prefill": simulate_prefill(job, fit.train, fit.serve, prompt=prompt),
        "decode": decode,
    }


def _notes(role: str, chip: Any, fitted: Calibration) -> list[str]:
    kinds = ("train",) if role == "train" else ("decode", "serve")
    notes = []
    if not any(f"{kind} {chip.name}" in fitted.seen for kind in kinds):
        notes.append(
            f"extrapolated: no published {' or '.join(kinds)} result on {chip.name} was calibrated"
            " on; its constants are those of the nearest chips"
        )
    if chip.price_usd_per_hour is None:
        notes.append(f"no price of {chip.name} is known, so no cost")
    return notes
