"""The optimizer and its schedule, assembled from optax.

>>> optimizer = make_optimizer(OptimizerConfig(schedule="cosine"), steps=200, config=config)
"""

import jax
import optax

from tpu_stack.models.abstract import map_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.sharding.axes import TensorSpec
from tpu_stack.training.config import OptimizerConfig

_ADAM_RMS = 0.2
"""Root mean square of AdamW's updates, in learning rates, that Liu et al. 2025 measured."""


def make_schedule(train: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then the decay that `train.schedule` names, which may
    end with the run, at `steps`."""
    end = train.decay_end(steps)
    warmup = min(train.warmup_steps, end or train.warmup_steps)
    final = train.learning_rate * train.final_lr_ratio
    length = max(1, (end or 0) - warmup)
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


def make_optimizer(
    train: OptimizerConfig, steps: int, config: ModelConfig
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan 2024) for the hidden matrices.

    Under "muon" the embedding, the unembedding and the norms keep AdamW; Muon's updates are scaled
    to AdamW's usual size (Liu et al. 2025, arXiv:2502.16982, equation 4), so that one learning rate
    and one weight decay serve both. Gradients are clipped to `clip_norm` first. Weight decay
    applies to matrices, not to norms.
    """
    schedule = make_schedule(train, steps)
    is_matrix = map_specs(config, lambda spec: spec.contract_axis is not None)
    rule = optax.adamw(
        schedule, b1=train.b1, b2=train.b2, weight_decay=train.weight_decay, mask=is_matrix
    )
    if train.optimizer == "muon":
        labels = map_specs(config, lambda spec: "muon" if _is_hidden(spec) else "adamw")
        rule = optax.partition({"muon": _muon(schedule, train), "adamw": rule}, labels)
    if train.clip_norm:
        return optax.chain(optax.clip_by_global_norm(train.clip_norm), rule)
    return rule


def _is_hidden(spec: TensorSpec) -> bool:
    return spec.name.startswith("blocks.") and spec.contract_axis is not None


def _muon(schedule: optax.Schedule, train: OptimizerConfig) -> optax.GradientTransformation:
    """Muon for weights [L, K, N], each layer's matrix orthogonalized by itself.

    `optax.contrib.muon` does the same, but its labels are computed from the parameters, which
    `optax.tree.map_params` (how `layout.py` finds each state's sharding) cannot see through.
    """
    matrices = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def dimensions(updates: optax.Updates) -> optax.Updates:
        return jax.tree.map(lambda _: matrices, updates)  # the tree lacks what AdamW updates

    def scaled(update: jax.Array) -> jax.Array:
        return update * (_ADAM_RMS * max(update.shape[-2:]) ** 0.5)

    return optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=dimensions),
        optax.stateless(lambda updates, params: jax.tree.map(scaled, updates)),
        optax.add_decayed_weights(train.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
