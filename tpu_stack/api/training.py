"""`ts.train`: a model, a training profile, some text, a folder for the run.

Example:
    result = train("nano", "8t", data=["plays.txt"], out="runs/a", steps=100, batch_size=8)
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tpu_stack.api.settings import as_paths, check_names
from tpu_stack.data.pipeline import DataConfig
from tpu_stack.errors import UserError
from tpu_stack.sharding.placement import PlacementOptions
from tpu_stack.training.config import TrainConfig
from tpu_stack.training.run import TrainResult, make_job
from tpu_stack.training.run import train as train_job
from tpu_stack.training.trainer import Hook


def train(
    model: str | None = "nano",
    profile: str = "8t",
    *,
    data: str | Path | Sequence[str | Path] = (),
    out: str | Path | None = None,
    init: str | Path | None = None,
    resume: bool = False,
    text: DataConfig = DataConfig(tokenizer="bpe:2048"),  # noqa: B008
    place: PlacementOptions = PlacementOptions(),  # noqa: B008
    hooks: Sequence[Hook] = (),
    **settings: Any,
) -> TrainResult:
    """Trains under `profile`; on a CPU its mesh is emulated.

    Args:
      model: a preset. profile: NAME[:TOPOLOGY], counting chips.
      data: files and folders of text; the default is Python's standard library.
      out: folder of the run; without one nothing is written.
      init: a run folder whose model, tokenizer and newest weights it begins with, in place of
        `model`. resume: continue the run in `out`, bit for bit.
      text: how the text is split and tokenized. hooks: told of steps, metrics and the end.
      settings: fields of `TrainConfig`, such as steps=200 or learning_rate=3e-3.

    SIGTERM and the first Ctrl-C end the run after the step under way, saved; the result's
    `stopped_by` is then the signal's number: look at it before going on.

    Raises UserError as the verb does, and for a setting that `TrainConfig` has not.
    """
    check_names("train", settings, [field.name for field in fields(TrainConfig)])
    if resume and out is None:
        raise UserError("resume continues the run in `out`, and out is None; name its folder")
    train_config = TrainConfig(**settings)
    paths = as_paths(data) or text.paths
    job = make_job(
        None if init is not None else model,
        profile,
        replace(text, paths=paths),
        train_config,
        init=None if init is None else Path(init),
        placement=place,
    )
    return train_job(job, None if out is None else Path(out), resume=resume, hooks=hooks)
