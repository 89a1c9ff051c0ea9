"""What a train step minimizes: the `Loss` protocol, and next-token prediction, its first instance.

A loss says what to divide by and what to sum; the step divides the one by the other over the whole
global batch, however it splits the batch. Distillation, policy gradients or a mixture of losses are
each one more class.

>>> loss = NextTokenLoss(config, dtype="bfloat16", remat="full")
>>> batch = {"tokens": tokens_BT, "loss_mask": tokens_BT > 2}
>>> float(loss.denominator(batch))
3.0
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tpu_stack.models.config import ModelConfig
from tpu_stack.models.decoder import Params, Remat, bind

Scalar = Float[Array, ""]
Terms = Scalar | dict[str, Scalar]
"""One sum, or several by name, each with a denominator of its own; they are added up."""


class Mean(NamedTuple):
    """A metric: sums over what was seen, added over micro-batches and reported as sum / count."""

    sum: Scalar
    count: Scalar


class Loss(Protocol):
    """What one step minimizes: the sum over terms of `sum / denominator` of the global batch.

    Both methods are traced. `batch` is any tree of arrays whose leading axis is the batch; `frozen`
    is any tree that no gradient goes to and that no step changes: a teacher, a reference policy,
    the base below adapters. Sums are float32 and additive over the batch's leading axis.
    """

    def denominator(self, batch: Any) -> Terms:
        """What the sums are divided by, of a whole global batch; 0 where there is nothing in it."""
        ...

    def __call__(
        self, params: Any, frozen: Any, batch: Any, key: PRNGKeyArray
    ) -> tuple[Terms, dict[str, Mean]]:
        """The sums over `batch`, a global batch or a part of it, named as the denominators are;
        and metrics.

        `params` are the float32 master weights. `key` is of this step and this part.
        """
        ...


@dataclass(frozen=True)
class NextTokenLoss:
    """Cross-entropy of the next token in nats, the mean over the labelled tokens of the batch.

    A mixture of experts adds the term "balance_loss": its routers' load-balance loss times
    `config.balance_loss`, the mean over the rows of the batch.

    Batches are those of `data.packing.Batch`. `dtype` is what weights and activations are computed
    in; `remat` and `unroll` are the decoder's.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: Remat = "none"
    unroll: int = 1

    def denominator(self, batch: Any) -> Terms:
        """The number of labelled tokens, and of rows for the balance loss; float32."""
        tokens = jnp.sum(batch["loss_mask"].astype(jnp.float32))
        if not self.config.n_experts:
            return tokens
        return {"loss": tokens, "balance_loss": _rows(batch)}

    def __call__(
        self, params: Params, frozen: Any, batch: Any, key: PRNGKeyArray
    ) -> tuple[Terms, dict[str, Mean]]:
        """The summed loss of float parameters, cast to `dtype`; see `Loss`."""
        cast = jax.tree.map(lambda w: w.astype(self.dtype), params)
        total, aux = self.summed(cast, batch)
        if not self.config.n_experts:
            return total, {}
        balance = self.config.balance_loss * aux["balance_loss"] * _rows(batch)
        return {"loss": total, "balance_loss": balance}, {}

    def summed(self, params: Params, batch: Any) -> tuple[Scalar, dict[str, Scalar]]:
        """The summed loss of parameters as they are, packed ones too, and the decoder's `aux`."""
        model = bind(self.config, params)
        fields = (batch["tokens"], batch["positions"], batch["segment_ids"])
        outputs = model.hidden(*fields, dtype=self.dtype, remat=self.remat, unroll=self.unroll)
        logits = model.logits(outputs.hidden)
        mask = batch["loss_mask"].astype(jnp.float32)
        loss = negative_log_likelihood(logits, batch["targets"])
        return jnp.sum(loss * mask), outputs.aux


def _rows(batch: Any) -> Scalar:
    return jnp.float32(batch["tokens"].shape[0])


def negative_log_likelihood(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """-log softmax(logits)[target] in nats, float32; keeps logits sharded over the vocabulary."""
    logits = logits_BTV.astype(jnp.float32)
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    picked = jnp.sum(jnp.where(vocabulary == targets_BT[..., None], logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked
