"""The optimizer and its schedule, assembled from optax.

>>> optimizer = make_optimizer(TrainConfig(steps=200), config)
"""

import optax

from tpu_stack.models.abstract import map_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.training.config import TrainConfig


def make_schedule(train: TrainConfig) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then the decay that `train.schedule` names."""
    warmup = min(train.warmup_steps, train.steps)
    final = train.learning_rate * train.final_lr_ratio
    length = max(1, (train.decay_end or 0) - warmup)
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(
            train.learning_rate, length, alpha=train.final_lr_ratio
        ),
        "linear": lambda: optax.linear_schedule(train.learning_rate, final, length),
        "constant": lambda: optax.constant_schedule(train.learning_rate),
    }[train.schedule]()
    if warmup == 0:
        return decay
    start = train.learning_rate / warmup
    ramp = optax.linear_schedule(start, train.learning_rate, max(1, warmup - 1))
    return optax.join_schedules([ramp, decay], [warmup])


def make_optimizer(train: TrainConfig, config: ModelConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan 2024) for the hidden matrices.

    Gradients are clipped to `clip_norm` first. Weight decay applies to matrices, not to norms.
    """
    schedule = make_schedule(train)
    is_matrix = map_specs(config, lambda spec: spec.contract_axis is not None)
    adamw = optax.adamw(
        schedule, b1=train.b1, b2=train.b2, weight_decay=train.weight_decay, mask=is_matrix
    )
    if train.optimizer == "muon":
        label = lambda spec: (
            "muon" if spec.name.startswith("blocks.") and spec.contract_axis else "adamw"
        )  # noqa: E731
        dims = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        muon = optax.contrib.muon(
            schedule,
            weight_decay=train.weight_decay,
            muon_weight_dimension_numbers=map_specs(
                config, lambda spec: dims if label(spec) == "muon" else None
            ),
        )
        rule = muon
    else:
        rule = adamw
    if train.clip_norm:
        return optax.chain(optax.clip_by_global_norm(train.clip_norm), rule)
    return rule
