"""What the decoding batch carries between steps, and the pure steps that change it.

A row is a slot of the batch. All that a step needs to know about its request is on the device, so
that the host may send off the next step before it has read the last one's tokens.

>>> state = insert(state, logits_RV, Arrivals(...))
>>> cache, state, output = decode_step(config, dtype, params, cache, state, active_B, drafts_BK)
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tpu_stack.models.config import ModelConfig
from tpu_stack.models.decoder import Params, bind
from tpu_stack.models.paged_cache import PagedCache
from tpu_stack.serving.engine.sampling import SamplingRows, choose, log_probabilities
from tpu_stack.serving.requests import MAX_LOGPROBS
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.constrain import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """One batch of B slots.

    Attributes:
      tokens: [B], the last token of each row, not in the cache yet. positions: [B], where it
        stands. history: [B, S], the tokens at positions 0 to `positions`.
      counts: [B, V], how often each token is in the output. seen: [B, V], whether in the prompt.
      rows: sampling parameters.
    """

    tokens: Int[Array, " B"]
    positions: Int[Array, " B"]
    history: Int[Array, "B S"]
    counts: Int[Array, "B V"]
    seen: Bool[Array, "B V"]
    rows: SamplingRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arrivals:
    """Sequences that take slots.

    Attributes:
      slots: [R]; B or more for none. history: [R, S], prompt and output so far.
      prompts, lengths: [R], tokens of the prompt, and known in all. A sequence with no output yet
        gets its first token from the logits it comes with.
      rows: sampling parameters.
    """

    slots: Int[Array, " R"]
    history: Int[Array, "R S"]
    prompts: Int[Array, " R"]
    lengths: Int[Array, " R"]
    rows: SamplingRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What a step chose, for the host: `tokens[b, :counts[b]]` are row b's new tokens.

    `guessed[b]` counts what speculation proposed for it, right or wrong. Log-probabilities are
    zeros where no row asked for them.
    """

    tokens: Int[Array, "B T"]
    counts: Int[Array, " B"]
    guessed: Int[Array, " B"]
    logprobs: Float[Array, "B T"]
    top_ids: Int[Array, "B T n"]
    top_logprobs: Float[Array, "B T n"]


def empty_state(slots: int, length: int, vocab: int) -> DecodeState:
    """No row holds a sequence."""
    zeros = jnp.zeros((slots, vocab), jnp.int32)
    rows = jax.tree.map(jnp.asarray, SamplingRows.of([None] * slots, vocab))
    tokens, positions = jnp.zeros(slots, jnp.int32), jnp.zeros(slots, jnp.int32)
    history = jnp.zeros((slots, length), jnp.int32)
    return DecodeState(tokens, positions, history, zeros, zeros > 0, rows)


def prefill_step(
    config: ModelConfig,
    dtype: Any,
    params: Params,
    cache: PagedCache,
    tokens_RC: Int[Array, "R C"],
    starts_R: Int[Array, " R"],
    lengths_R: Int[Array, " R"],
) -> tuple[PagedCache, Float[Array, "R V"]]:
    """Runs one chunk of each row's prompt, and returns the logits after its last token.

    Args:
      starts_R: position of the chunk's first token. lengths_R: its tokens, 0 for an unused row.
    """
    offsets = jnp.arange(tokens_RC.shape[1])
    positions = jnp.where(offsets < lengths_R[:, None], starts_R[:, None] + offsets, -1)
    model = bind(config, params)
    outputs = model.hidden(tokens_RC, positions, cache=cache, dtype=dtype)
    assert outputs.cache is not None
    last = jnp.maximum(lengths_R - 1, 0)[:, None, None]
    last_RD = jnp.take_along_axis(outputs.hidden, last, axis=1)[:, 0]
    return outputs.cache, constrain(model.logits(last_RD), BATCH, None)


def insert(
    state: DecodeState, logits_RV: Float[Array, "R V"], arrivals: Arrivals
) -> tuple[DecodeState, StepOutput]:
    """The state with the sequences in their slots, and the first tokens of the fresh ones."""
    vocab, length = logits_RV.shape[1], arrivals.history.shape[1]
    fresh_R = arrivals.lengths == arrivals.prompts
    offsets = jnp.arange(length)
    in_prompt = offsets < arrivals.prompts[:, None]
    in_output = ~in_prompt & (offsets < arrivals.lengths[:, None])
    add = jax.vmap(lambda ids: jnp.zeros(vocab, jnp.int32).at[ids].add(1, mode="drop"))
    seen_RV = add(jnp.where(in_prompt, arrivals.history, vocab)) > 0
    counts_RV = add(jnp.where(in_output, arrivals.history, vocab))
    drawn_R = choose(logits_RV, arrivals.rows, counts_RV, seen_RV, arrivals.prompts, fresh_R)
    known_R = jnp.take_along_axis(arrivals.history, arrivals.lengths[:, None] - 1, axis=1)[:, 0]
    tokens_R = jnp.where(fresh_R, drawn_R, known_R)
    positions_R = jnp.where(fresh_R, arrivals.lengths, arrivals.lengths - 1)
    each = jnp.arange(tokens_R.shape[0])
    history_RS = arrivals.history.at[each, positions_R].set(tokens_R, mode="drop")
    counts_RV = counts_RV.at[each, tokens_R].add(fresh_R)
    new = DecodeState(tokens_R, positions_R, history_RS, counts_RV, seen_RV, arrivals.rows)
    put = lambda old, row: old.at[arrivals.slots].set(row, mode="drop")  # noqa: E731
    output = _output(
        logits_RV[:, None], tokens_R[:, None], fresh_R, fresh_R & False, arrivals.rows, fresh_R
    )
    return jax.tree.map(put, state, new), output


def decode_step(
    config: ModelConfig,
    dtype: Any,
    params: Params,
    cache: PagedCache,
    state: DecodeState,
    active_B: Bool[Array, " B"],
    drafts_BK: Int[Array, "B K"],
) -> tuple[PagedCache, DecodeState, StepOutput]:
    """Feeds each active row its last token and K guesses; keeps the guesses that come true.

    Position by position the target's own choice is made, from the same key as without guesses, and
    a guess is kept when it is that choice: the output is, token for token, what it would have been
    without speculation, whatever proposes the guesses. That is the coupling by common random
    numbers, in place of Leviathan et al.'s (2023, arXiv:2211.17192) rejection. Guesses below 0 are
    none.
    """
    B, K = drafts_BK.shape
    fed_BT = jnp.concatenate([state.tokens[:, None], drafts_BK], axis=1)
    offsets = jnp.arange(K + 1)
    places_BT = state.positions[:, None] + offsets
    positions_BT = jnp.where(active_B[:, None], places_BT, -1)
    model = bind(config, params)
    tokens = jnp.maximum(fed_BT, 0)
    outputs = model.hidden(tokens, positions_BT, cache=cache, dtype=dtype)
    assert outputs.cache is not None
    logits_BTV = constrain(model.logits(outputs.hidden), BATCH, None, None)

    counts_BV, chosen = state.counts, []
    for t in range(K + 1):  # the counts of step t hold the guesses before it
        if t:
            counts_BV = counts_BV.at[jnp.arange(B), tokens[:, t]].add(1)
        now = (state.rows, counts_BV, state.seen, places_BT[:, t] + 1, active_B)
        chosen.append(choose(logits_BTV[:, t], *now))
    chosen_BT = jnp.stack(chosen, axis=1)
    true_BK = jnp.cumprod((chosen_BT[:, :-1] == drafts_BK).astype(jnp.int32), axis=1)
    new_B = jnp.where(active_B, 1 + jnp.sum(true_BK, axis=1), 0)
    guessed_B = jnp.where(active_B, jnp.sum(drafts_BK >= 0, axis=1), 0)
    output = _output(logits_BTV, chosen_BT, new_B, guessed_B, state.rows, active_B)
    return outputs.cache, _advance(state, chosen_BT, new_B), output


def _advance(
    state: DecodeState, chosen_BT: Int[Array, "B T"], new_B: Int[Array, " B"]
) -> DecodeState:
    """The state after `new_B` of the chosen tokens."""
    B, T = chosen_BT.shape
    offsets = jnp.arange(T)
    kept_BT = offsets < new_B[:, None]
    row = jnp.arange(B)[:, None]
    vocab, length = state.counts.shape[1], state.history.shape[1]
    places = jnp.where(kept_BT, state.positions[:, None] + 1 + offsets, length)
    counted = jnp.where(kept_BT, chosen_BT, vocab)
    last = jnp.take_along_axis(chosen_BT, jnp.maximum(new_B - 1, 0)[:, None], axis=1)[:, 0]
    return replace(
        state,
        tokens=jnp.where(new_B > 0, last, state.tokens),
        positions=state.positions + new_B,
        history=state.history.at[row, places].set(chosen_BT, mode="drop"),
        counts=state.counts.at[row, counted].add(1, mode="drop"),
    )


def _output(logits_BTV, chosen_BT, new_B, guessed_B, rows: SamplingRows, active_B) -> StepOutput:
    """With log-probabilities where an active row wants them."""
    B, T, V = logits_BTV.shape
    flat = logits_BTV.reshape(B * T, V)
    n = min(MAX_LOGPROBS, V)

    def wanted():
        return log_probabilities(flat, chosen_BT.reshape(-1))

    def none():
        zeros = jnp.zeros((B * T, n))
        return zeros[:, 0], zeros.astype(jnp.int32), zeros

    chosen, ids, top = jax.lax.cond(jnp.any(rows.logprobs & active_B), wanted, none)
    return StepOutput(
        chosen_BT,
        new_B.astype(jnp.int32),
        guessed_B.astype(jnp.int32),
        chosen.reshape(B, T),
        ids.reshape(B, T, n),
        top.reshape(B, T, n),
    )


def arrivals_of(
    slots: int,
    length: int,
    vocab: int,
    rows: int,
    sequences: list[tuple[int, list[int], int, Any]],
) -> Arrivals:
    """Host arrays for up to `rows` sequences: (slot, tokens, prompt length, SamplingParams)."""
    slot_R = np.full(rows, slots, np.int32)
    history = np.zeros((rows, length), np.int32)
    prompts, lengths = np.ones(rows, np.int32), np.ones(rows, np.int32)
    params: list[Any] = [None] * rows
    for row, (slot, tokens, prompt, sampling) in enumerate(sequences):
        slot_R[row], prompts[row], lengths[row], params[row] = slot, prompt, len(tokens), sampling
        history[row, : len(tokens)] = tokens
    arrays: Any = {"slots": slot_R, "history": history, "prompts": prompts, "lengths": lengths}
    return Arrivals(rows=SamplingRows.of(params, vocab), **arrays)
