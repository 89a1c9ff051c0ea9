"""The train step: a pure function from (state, batch) to (state, metrics).

>>> step = make_train_step(config, optimizer, train, dtype="bfloat16", remat="full")
>>> state, metrics = jax.jit(step, donate_argnums=0)(state, batch)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tpu_stack.models.config import ModelConfig
from tpu_stack.models.decoder import Params, bind
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.constrain import constrain
from tpu_stack.training.config import TrainConfig

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that changes from step to step.

    Attributes:
      step: int32, steps taken. params: float32 master weights. opt_state: of the optimizer.
      key: PRNG key; step-specific keys are folded in from `step`, so it never changes.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    key: PRNGKeyArray


def negative_log_likelihood(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """-log softmax(logits)[target] in nats, float32; keeps logits sharded over the vocabulary."""
    logits = logits_BTV.astype(jnp.float32)
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    picked = jnp.sum(jnp.where(vocabulary == targets_BT[..., None], logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def summed_loss(
    config: ModelConfig, params: Params, batch: Batch, *, dtype: Any, remat: Any, unroll: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of the loss over labelled tokens, and their number, both float32 scalars."""
    total, count, _ = loss_and_balance(
        config, params, batch, dtype=dtype, remat=remat, unroll=unroll
    )
    return total, count


def loss_and_balance(
    config: ModelConfig, params: Params, batch: Batch, *, dtype: Any, remat: Any, unroll: int
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""] | None]:
    """As `summed_loss`, and the routers' load-balance loss over all tokens, None without any."""
    model = bind(config, params)
    fields = (batch["tokens"], batch["positions"], batch["segment_ids"])
    outputs = model.hidden(*fields, dtype=dtype, remat=remat, unroll=unroll)
    logits = model.logits(outputs.hidden)
    mask = batch["loss_mask"].astype(jnp.float32)
    loss = negative_log_likelihood(logits, batch["targets"])
    return jnp.sum(loss * mask), jnp.sum(mask), outputs.aux.get("balance_loss")


def make_train_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    train: TrainConfig,
    *,
    dtype: Any,
    remat: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step function; jit it with the state's shardings and donate the state.

    The gradient is that of the mean loss over the labelled tokens of the whole global batch,
    however the batch is split into micro-batches or over devices. A mixture of experts adds its
    load-balance loss times `config.balance_loss`, the mean over micro-batches; "loss" is without.
    """

    def loss_of(params: Params, batch: Batch, tokens: Float[Array, ""]):
        cast = jax.tree.map(lambda w: w.astype(dtype), params)
        total, _, balance = loss_and_balance(
            config, cast, batch, dtype=dtype, remat=remat, unroll=train.unroll
        )
        loss = total / tokens
        if balance is None:
            return loss, loss
        return loss + config.balance_loss / train.accumulate * balance, loss

    def loss_and_gradient(params: Params, batch: Batch, tokens: Float[Array, ""]):
        (_, loss), grads = jax.value_and_grad(loss_of, has_aux=True)(params, batch, tokens)
        return loss, grads

    def gradient(params: Params, batch: Batch):
        tokens = jnp.maximum(jnp.sum(batch["loss_mask"].astype(jnp.float32)), 1.0)
        if train.accumulate == 1:
            return loss_and_gradient(params, batch, tokens)

        def add_micro_batch(sums, micro):
            micro = {name: constrain(x, BATCH, None) for name, x in micro.items()}
            found = loss_and_gradient(params, micro, tokens)
            return jax.tree.map(jnp.add, sums, found), None

        parts = train.accumulate
        micro_batches = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add_micro_batch, zeros, micro_batches)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, grads = gradient(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return train_step
