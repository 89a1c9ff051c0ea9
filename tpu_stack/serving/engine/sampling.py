"""Choosing tokens on the device: bias, penalties, temperature, truncation, a seed per request.

A row's token depends on its own logits, parameters, output and position only. Work that no row
asks for is skipped at run time, so that one compiled program serves every mix.

    rows = SamplingRows.of([SamplingParams(temperature=0.8, seed=1)], vocab=32000)
    choice = choose(logits_BV, rows, counts_BV, seen_BV, positions_B, active_B)
    choice.tokens, choice.logprobs
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from tpu_stack.serving.requests import MAX_BIASES, SamplingParams

_OUT = -jnp.inf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """`SamplingParams` of every row, as arrays; `bias_ids` of V or more are no bias, and
    `logprobs` is -1 where none are asked for."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition: Float[Array, " B"]
    presence: Float[Array, " B"]
    frequency: Float[Array, " B"]
    seed: UInt32[Array, " B"]
    logprobs: Int[Array, " B"]
    bias_ids: Int[Array, "B biases"]
    bias_values: Float[Array, "B biases"]

    @classmethod
    def of(cls, rows: Sequence[SamplingParams | None], vocab: int) -> "SamplingRows":
        """Host arrays; None is greedy."""
        params = [row or SamplingParams() for row in rows]
        ids = np.full((len(params), MAX_BIASES), vocab, np.int32)
        values = np.zeros((len(params), MAX_BIASES), np.float32)
        for row, each in enumerate(params):
            for entry, (token, bias) in enumerate(each.logit_bias.items()):
                ids[row, entry], values[row, entry] = token, bias

        names = {
            "repetition_penalty": "repetition",
            "presence_penalty": "presence",
            "frequency_penalty": "frequency",
        }
        whole: dict[str, type] = {"top_k": np.int32, "seed": np.uint32}
        columns: dict[str, Any] = {"bias_ids": ids, "bias_values": values}
        for name in ("temperature", "top_k", "top_p", "min_p", "seed", *names):
            column = [getattr(each, name) for each in params]
            columns[names.get(name, name)] = np.array(column, whole.get(name, np.float32))
        asked = [-1 if each.logprobs is None else each.logprobs for each in params]
        return cls(logprobs=np.array(asked, np.int32), **columns)  # type: ignore

    @property
    def adjusted(self) -> Bool[Array, " B"]:
        """Rows whose logits change before the draw."""
        penalties = (self.repetition != 1) | (self.presence != 0) | (self.frequency != 0)
        return penalties | jnp.any(self.bias_values != 0, axis=-1)


class Choice(NamedTuple):
    """The next token of every row, int32, and its log-probability under the distribution that it
    was drawn from, float32: after bias, penalties, temperature and truncation. 0 for a greedy row,
    which draws nothing, and where no active row asks for log-probabilities."""

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"]


def choose(
    logits_BV: Float[Array, "B V"],
    rows: SamplingRows,
    counts_BV: Int[Array, "B V"],
    seen_BV: Bool[Array, "B V"],
    positions_B: Int[Array, " B"],
    active_B: Bool[Array, " B"],
) -> Choice:
    """The next token of every row.

    Args:
      logits_BV: float32. counts_BV: how often each token is in the row's output.
      seen_BV: whether it is in its prompt. positions_B: where the new token will stand.
      active_B: rows whose answer matters.
    """
    logits_BV = jax.lax.cond(
        jnp.any(rows.adjusted & active_B),
        _adjust,
        lambda x, *_: x,
        logits_BV,
        rows,
        counts_BV,
        seen_BV,
    )
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    draws = rows.temperature > 0
    drawn_B, logprobs_B = jax.lax.cond(
        jnp.any(draws & active_B),
        lambda: _draw(logits_BV, rows, positions_B, active_B),
        lambda: (greedy_B, jnp.zeros(greedy_B.shape)),
    )
    return Choice(jnp.where(draws, drawn_B, greedy_B), jnp.where(draws, logprobs_B, 0.0))


def _adjust(logits_BV, rows: SamplingRows, counts_BV, seen_BV):
    """Logits with biases added, then penalties taken off."""
    add = jax.vmap(lambda x, ids, values: x.at[ids].add(values, mode="drop"))
    logits_BV = add(logits_BV, rows.bias_ids, rows.bias_values)
    repeated = seen_BV | (counts_BV > 0)
    penalty = rows.repetition[:, None]
    scaled = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    logits_BV = jnp.where(repeated, scaled, logits_BV)
    logits_BV = logits_BV - rows.presence[:, None] * (counts_BV > 0)
    return logits_BV - rows.frequency[:, None] * counts_BV


def _draw(logits_BV, rows: SamplingRows, positions_B, active_B):
    scaled_BV = logits_BV / jnp.maximum(rows.temperature, 1e-6)[:, None]
    truncates = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
    kept_BV = jax.lax.cond(
        jnp.any(truncates & (rows.temperature > 0)),
        lambda: truncate(scaled_BV, rows.top_k, rows.top_p, rows.min_p),
        lambda: scaled_BV,
    )

    def one(logits_V, seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.categorical(key, logits_V)

    drawn_B = jax.vmap(one)(kept_BV, rows.seed, positions_B).astype(jnp.int32)
    logprobs_B = jax.lax.cond(
        jnp.any((rows.logprobs >= 0) & active_B),
        lambda: token_logprobs(kept_BV, drawn_B),
        lambda: jnp.zeros(drawn_B.shape),
    )
    return drawn_B, logprobs_B


def truncate(
    logits_BV: Float[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
) -> Float[Array, "B V"]:
    """Logits with the tokens left out at -inf: `top_k` first, then `top_p` of what is left; `min_p`
    is a share of the likeliest token's probability.

    Thresholds are found bit by bit, in 32 passes over the row, where sorting takes far more on
    CPU and TPU alike; none where no row asks. Tokens tied with the last one kept are kept too.
    """
    rows, vocab = logits_BV.shape
    keys_BV = _ordered(logits_BV)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    lowest_B = jnp.zeros(rows, keys_BV.dtype)
    least_k = jax.lax.cond(
        jnp.any(top_k > 0),
        lambda: _threshold(keys_BV, jnp.ones_like(logits_BV), k.astype(jnp.float32)),
        lambda: lowest_B,
    )
    kept = keys_BV >= least_k[:, None]

    def least_of_mass() -> UInt32[Array, " B"]:
        probs_BV = jax.nn.softmax(jnp.where(kept, logits_BV, _OUT), axis=-1)
        return _threshold(keys_BV, probs_BV, top_p)

    least_p = jax.lax.cond(jnp.any(top_p < 1), least_of_mass, lambda: lowest_B)
    kept &= (keys_BV >= least_p[:, None]) | (top_p >= 1)[:, None]
    highest = jnp.max(logits_BV, axis=-1, keepdims=True)
    kept &= logits_BV >= highest + jnp.log(min_p)[:, None]
    return jnp.where(kept, logits_BV, _OUT)


def _ordered(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Whole numbers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(
    keys_BV: UInt32[Array, "B V"], mass_BV: Float[Array, "B V"], wanted_B: Float[Array, " B"]
) -> UInt32[Array, " B"]:
    """The largest threshold at or above which lies a mass of `wanted_B` or more."""

    def bit(i, least_B):
        trial = least_B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        mass = jnp.sum(jnp.where(keys_BV >= trial[:, None], mass_BV, 0.0), axis=-1)
        return jnp.where(mass >= wanted_B, trial, least_B)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(keys_BV.shape[0], jnp.uint32))


def token_logprobs(
    logits_BV: Float[Array, "*B V"], tokens_B: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """The log-probability of one token of each row, float32."""
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    return jnp.take_along_axis(logprobs_BV, tokens_B[..., None], axis=-1)[..., 0]


def top_logprobs(
    logits_BV: Float[Array, "B V"], count: int
) -> tuple[Int[Array, "B n"], Float[Array, "B n"]]:
    """The `count` likeliest tokens of each row, and their log-probabilities, likeliest first."""
    top, ids = jax.lax.top_k(jax.nn.log_softmax(logits_BV, axis=-1), count)
    return ids, top
