"""Choosing the next token from logits: greedy, temperature, top-k, top-p, one seed per row.

A row's token depends on its own logits, seed and position only, never on the rest of the batch.

>>> tokens_B = sample(logits_BV, Sampling.of(batch=2, temperature=0.8, seed=0), positions_B)
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

_MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Per-row sampling parameters.

    Attributes:
      temperature: [B]; 0 is greedy. top_k: [B]; 0 keeps all. top_p: [B]; 1 keeps all.
      seed: [B].
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    seed: UInt32[Array, " B"]

    @classmethod
    def of(
        cls,
        batch: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> "Sampling":
        """The same parameters for every row; row b is seeded with `seed + b`."""
        return cls(
            jnp.full(batch, temperature, jnp.float32),
            jnp.full(batch, top_k, jnp.int32),
            jnp.full(batch, top_p, jnp.float32),
            jnp.arange(batch, dtype=jnp.uint32) + jnp.uint32(seed),
        )


def sample(
    logits_BV: Float[Array, "B V"], sampling: Sampling, positions_B: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The next token of every row, int32; `positions_B` is where it will stand in its sequence."""

    def one(logits, temperature, top_k, top_p, seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        scaled = logits / jnp.maximum(temperature, 1e-6)
        drawn = jax.random.categorical(key, _truncated(scaled, top_k, top_p))
        return jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)

    return jax.vmap(one)(
        logits_BV,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.seed,
        positions_B,
    )


def _truncated(logits_V, top_k, top_p):
    """Logits outside the `top_k` largest, or outside the smallest set of mass `top_p`, masked."""
    descending = jnp.sort(logits_V, descending=True)
    rank_cut = jnp.where(top_k > 0, top_k, logits_V.size)
    before = jnp.cumsum(jax.nn.softmax(descending)) - jax.nn.softmax(descending)
    keep = (jnp.arange(logits_V.size) < rank_cut) & (before < top_p)
    least = jnp.min(jnp.where(keep, descending, jnp.inf))
    return jnp.where(logits_V >= least, logits_V, _MASKED)
