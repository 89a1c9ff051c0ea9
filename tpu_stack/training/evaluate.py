"""Validation loss of any parameters, float or packed, over a whole split.

Batches are read while the next one is computed; packed parameters are evaluated as they are.

    from tpu_stack.data.pipeline import eval_batches

    evaluator = Evaluator(config, dtype="bfloat16", batch=layout.batch)
    evaluator.run(params, eval_batches(corpus, data), corpus.val).perplexity
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import jax
from jax.sharding import NamedSharding

from tpu_stack.data.packing import Batch, TokenStream
from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.decoder import Params
from tpu_stack.training.batches import place_batch
from tpu_stack.training.losses import NextTokenLoss


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per token; `bits_per_byte` counts UTF-8 bytes and so compares tokenizers."""

    loss: float
    tokens: int
    bits_per_byte: float | None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    def metrics(self) -> dict[str, float]:
        """What is logged of it."""
        return {"loss": self.loss, "perplexity": self.perplexity}

    def to_dict(self) -> dict[str, float | int | None]:
        """JSON-ready fields, perplexity included."""
        return dict(asdict(self), perplexity=self.perplexity)


class Evaluator:
    """Compiles the loss once and runs it over batches. Parameters may be QTensors."""

    def __init__(self, config: ModelConfig, *, dtype: Any, batch: NamedSharding, unroll: int = 1):
        loss = NextTokenLoss(config, dtype=dtype, unroll=unroll)

        def losses(params: Params, fields: dict[str, Any]):
            return loss.summed(params, fields)[0], fields["loss_mask"].sum()

        self._losses = jax.jit(losses)
        self._batch = batch

    def run(
        self,
        params: Params,
        batches: Iterable[Batch],
        stream: TokenStream,
        limit: int | None = None,
    ) -> Evaluation:
        """Mean loss over the labelled tokens of `batches`, or of the first `limit` of them.

        `bits_per_byte` is None under a limit, as the bytes of `stream` cover the whole split.
        Call it inside the sharding scope of the parameters. Raises UserError when the loss is not
        finite.
        """
        total, tokens = 0.0, 0
        under_way: tuple[jax.Array, jax.Array] | None = None
        for batch in islice(batches, limit):
            placed = place_batch(batch, self._batch)
            previous, under_way = under_way, self._losses(params, placed)
            total, tokens = _added(total, tokens, previous)
        total, tokens = _added(total, tokens, under_way)
        if not math.isfinite(total):
            raise UserError(f"the validation loss is {total}: the parameters hold NaN or infinity")
        bits = total / math.log(2) / stream.predicted_bytes if limit is None else None
        return Evaluation(total / max(tokens, 1), tokens, bits)


def _added(
    total: float, tokens: int, part: tuple[jax.Array, jax.Array] | None
) -> tuple[float, int]:
    """The sums with those of one batch, waited for while the next one is computed."""
    if part is None:
        return total, tokens
    loss, count = jax.device_get(part)
    return total + float(loss), tokens + int(count)
