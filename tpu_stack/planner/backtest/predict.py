"""One row, one prediction: which constants it is made with, and what it took for granted.

Example:
    predict(row, Calibration.load()).value
"""

from dataclasses import dataclass, field, replace

from tpu_stack.errors import UserError
from tpu_stack.planner.backtest import recipe, serving, training
from tpu_stack.planner.backtest.calibration import Calibration, Fit, family
from tpu_stack.planner.backtest.table import Row
from tpu_stack.planner.simulate.constants import Constants
from tpu_stack.planner.simulate.layout import Layout
from tpu_stack.planner.simulate.train import TrainJob, train_step


@dataclass(frozen=True)
class Prediction:
    """The predicted value in the row's own metric; None with a `reason` where there is none.

    Attributes:
      held_out: the family left out of the constants' fit, "" where the row was not part of it.
      in_sample: the value with the constants fitted on all rows, this one among them.
      assumed: what the row does not say. extrapolated: what the calibration has not seen.
      terms: seconds by term.
    """

    value: float | None = None
    reason: str = ""
    held_out: str = ""
    in_sample: float | None = None
    assumed: list[str] = field(default_factory=list)
    extrapolated: str = ""


def predict(row: Row, calibration: Calibration) -> Prediction:
    """Predicts the row; one that the constants were fitted on, without its model's family."""
    assumed: list[str] = []
    try:
        value_all = evaluate(row, calibration.full, assumed)
    except UserError as error:
        return Prediction(reason=str(error))
    fitted_on = row.id in calibration.rows and family(row) in calibration.without
    held_out = family(row) if fitted_on else ""
    value = evaluate(row, calibration.without[held_out], []) if held_out else value_all
    return Prediction(
        value,
        held_out=held_out,
        in_sample=value_all if held_out else None,
        assumed=assumed,
        extrapolated="; ".join(filter(None, (calibration.extrapolates(row), _too_large(row)))),
    )


def _too_large(row: Row) -> str:
    """That the weights alone, without optimizer or cache, exceed the memory of their chips."""
    layout = training.layout_of(row, [], "fsdp" if row.kind == "train" else "tensor")
    arch, chip = recipe.architecture(row), layout.chip
    if row.kind == "train":
        copies, width = layout.data * layout.slices, 4.0
    else:
        job, _ = serving.serve_job(row)
        copies, width = job.replicas, job.weight_bytes
    held = arch.total_parameters * width * copies / layout.chips
    capacity = chip.require("hbm_bytes")
    if held <= capacity:
        return ""
    return f"does not fit: {held / 1e9:.0f} GB of weights on chips of {capacity / 1e9:.0f} GB"


def evaluate(row: Row, fit: Fit, assumed: list[str]) -> float:
    """The row's metric under these constants; what is assumed is appended to `assumed`.

    Raises UserError with the reason where the row cannot be predicted.
    """
    if row.kind == "train":
        job, found = training.train_job(row)
        assumed += found
        if not row.mesh:
            job = _best_mesh(job, fit.train, assumed)
        step = train_step(job, fit.train)
        return training.in_metric(row, step.tokens_per_s_per_chip)
    job, found = serving.serve_job(row)
    assumed += found
    if row.kind == "decode":
        return serving.predict_decode(row, job, fit.train, fit.serve, assumed)
    if row.kind == "serve":
        return serving.predict_serve(row, job, fit.train, fit.serve, assumed)
    return serving.predict_prefill(row, job, fit.train, assumed)


def _best_mesh(job: TrainJob, constants: Constants, assumed: list[str]) -> TrainJob:
    """The job on the mesh of fsdp and tensor (up to 16) that the simulator finds fastest."""
    devices = job.layout.fsdp
    jobs = []
    for tensor in (1, 2, 4, 8, 16):
        if devices % tensor == 0:
            layout = Layout(
                job.layout.chip, job.layout.chips, job.layout.slices,
                fsdp=devices // tensor, tensor=tensor,
            )  # fmt: skip
            jobs.append(replace(job, layout=layout))
    best = min(jobs, key=lambda one: train_step(one, constants).step_s)
    assumed[:] = [text for text in assumed if not text.startswith("mesh not given")]
    assumed.append(f"mesh not given: {best.layout.text}, the simulator's best, was assumed")
    return best
