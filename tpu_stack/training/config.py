"""What a training run is asked to do, apart from model, profile and data.

Each part configures one thing, and functions ask for the part that they read. `TrainConfig` is all
of them in one, whose fields are a run's flags (`--train.NAME`).

>>> train = TrainConfig(steps=200, batch_size=16, schedule="cosine")
>>> train.decay_end(train.steps)
200
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_origin

from tpu_stack.errors import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients move the parameters.

    Attributes:
      optimizer: "adamw", or "muon" for the hidden matrices with AdamW for the rest.
      learning_rate: peak. warmup_steps: linear, from 0.
      schedule: what follows the warm-up. "constant" does not depend on how many steps are run, so
        a run can be lengthened; "cosine" and "linear" fall to final_lr_ratio * learning_rate.
      decay_steps: the step at which the decay ends; 0 means at the last step.
      clip_norm: global gradient norm is clipped to it; 0 turns clipping off.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    decay_steps: int = 0
    final_lr_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        names = ("warmup_steps", "learning_rate", "final_lr_ratio", "weight_decay", "clip_norm")
        _at_least(self, 0, *names, "decay_steps", "b1", "b2")
        for name in ("b1", "b2"):
            if getattr(self, name) >= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be below 1")
        _one_of(self, "optimizer", "schedule")

    def decay_end(self, steps: int) -> int | None:
        """The step at which the learning rate stops falling in a run of `steps`; None for never."""
        return None if self.schedule == "constant" else self.decay_steps or steps


@dataclass(frozen=True)
class BatchConfig:
    """What one step sees.

    Attributes:
      batch_size: sequences per step over all devices. seq_len: T, tokens per sequence.
      accumulate: micro-batches a step is split into; the gradient is that of the whole batch.
    """

    batch_size: int = 16
    seq_len: int = 256
    accumulate: int = 1

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "accumulate")
        _at_least(self, 2, "seq_len")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )


@dataclass(frozen=True)
class ComputeConfig:
    """How the model is computed.

    Attributes:
      compute_dtype, remat: override the profile's policy.
      unroll: layers per iteration of the layer scan.
    """

    compute_dtype: str | None = None
    remat: Literal["none", "dots", "full"] | None = None
    unroll: int = 1

    def __post_init__(self) -> None:
        _at_least(self, 1, "unroll")
        _one_of(self, "remat")
        if self.compute_dtype not in (None, "float32", "bfloat16"):
            raise UserError(
                f"compute_dtype is {self.compute_dtype!r}; float32 or bfloat16 would do"
            )


@dataclass(frozen=True)
class LoopConfig:
    """How long the loop runs, and what it does on the way.

    Attributes:
      steps: optimizer steps in all, counted from 0 whatever a run resumes from.
      eval_every, log_every, checkpoint_every: in steps; 0 turns it off (a final evaluation and
        checkpoint always happen).
      eval_batches: batches of an intermediate evaluation; 0 is the whole validation split.
      seed: of initialization and data order.
    """

    steps: int = 200
    eval_every: int = 0
    eval_batches: int = 8
    log_every: int = 10
    checkpoint_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps")
        _at_least(self, 0, "eval_every", "eval_batches", "log_every", "checkpoint_every")


@dataclass(frozen=True)
class TrainConfig(LoopConfig, ComputeConfig, OptimizerConfig, BatchConfig):
    """Hyperparameters of the batch, the optimizer, the computation and the loop."""

    def __post_init__(self) -> None:
        for part in TrainConfig.__bases__:
            part.__post_init__(self)  # type: ignore[attr-defined]

    def trajectory(self) -> dict[str, Any]:
        """The fields that decide the sequence of states; a resumed run must agree on them."""
        free = ("steps", "decay_steps", *("eval_every", "eval_batches"))
        free += ("log_every", "checkpoint_every")
        fields = {name: value for name, value in asdict(self).items() if name not in free}
        return dict(fields, decay_end=self.decay_end(self.steps))


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        whole = _KIND[name] is int
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise UserError(f"{name} is {value!r}; it must be a {'whole ' if whole else ''}number")
        if not value >= least:  # NaN too
            raise UserError(f"{name} is {value}; it must be at least {least}")


def _one_of(config: Any, *names: str) -> None:
    """Raises UserError where a field has none of its Literal's values, nor None if it may be so."""
    for name in names:
        kind, value = _KIND[name], getattr(config, name)
        allowed = get_args(kind) if get_origin(kind) is Literal else ()
        for part in () if allowed else get_args(kind):
            allowed += get_args(part) if get_origin(part) is Literal else (None,)
        if value not in allowed:
            known = ", ".join(str(each) for each in allowed if each is not None)
            raise UserError(f"{name} is {value!r}; {known} would do")


_KIND = {field.name: field.type for field in fields(TrainConfig)}
