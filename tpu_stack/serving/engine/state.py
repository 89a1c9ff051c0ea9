"""What the decoding batch carries between steps, and the pure steps that change it.

A row is a slot of the batch. All that a step needs to know about its request is on the device, so
that the host may send off the next step before it has read the last one's tokens.

    state = insert(state, logits_RV, InsertRows(...))
    cache, state, output = decode_step(config, dtype, params, cache, state, active_B, drafts_BK)
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
from tpu_stack.serving.engine.sampling import (
    Choice,
    SamplingRows,
    choose,
    token_logprobs,
    top_logprobs,
)
from tpu_stack.serving.requests import MAX_LOGPROBS
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.constrain import constrain

SCORED_ROWS = 64
"""Tokens whose logits are computed at once when scoring; divides every chunk of a prompt."""


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
class InsertRows:
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

    `guessed[b]` counts what speculation proposed for it, right or wrong. `logprobs` are the
    model's own, `sampling_logprobs` those of the distribution that the tokens were drawn from;
    zeros where no row asked for them.
    """

    tokens: Int[Array, "B T"]
    counts: Int[Array, " B"]
    guessed: Int[Array, " B"]
    logprobs: Float[Array, "B T"]
    sampling_logprobs: Float[Array, "B T"]
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
    outputs, model = _run_chunk(config, dtype, params, cache, tokens_RC, starts_R, lengths_R)
    assert outputs.cache is not None
    return outputs.cache, _last_logits(model, outputs.hidden, lengths_R)


def score_step(
    config: ModelConfig,
    dtype: Any,
    params: Params,
    cache: PagedCache,
    tokens_RC: Int[Array, "R C"],
    starts_R: Int[Array, " R"],
    lengths_R: Int[Array, " R"],
    targets_RC: Int[Array, "R C"],
) -> tuple[PagedCache, Float[Array, "R V"], Float[Array, "R C"]]:
    """`prefill_step`, and the log-probability of `targets_RC[r, c]` as the token after token c."""
    outputs, model = _run_chunk(config, dtype, params, cache, tokens_RC, starts_R, lengths_R)
    assert outputs.cache is not None
    rows, chunk, _ = outputs.hidden.shape
    width = max(1, SCORED_ROWS // rows)

    def block(start: Int[Array, ""]) -> Float[Array, "R w"]:
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, width, axis=1)  # noqa: E731
        logits_RwV = constrain(model.logits(cut(outputs.hidden)), BATCH, None, None)
        return token_logprobs(logits_RwV, cut(targets_RC))

    scores = jax.lax.map(block, jnp.arange(0, chunk, width))
    scores_RC = jnp.moveaxis(scores, 0, 1).reshape(rows, chunk)
    return outputs.cache, _last_logits(model, outputs.hidden, lengths_R), scores_RC


def _run_chunk(config, dtype, params, cache, tokens_RC, starts_R, lengths_R):
    """The decoder's outputs on one chunk of each row, and the decoder."""
    offsets = jnp.arange(tokens_RC.shape[1])[None]
    positions = jnp.where(offsets < lengths_R[:, None], starts_R[:, None] + offsets, -1)
    model = bind(config, params)
    return model.hidden(tokens_RC, positions, cache=cache, dtype=dtype), model


def _last_logits(model, hidden_RCD, lengths_R) -> Float[Array, "R V"]:
    """After the last token of each row."""
    last = jnp.maximum(lengths_R - 1, 0)[:, None, None]
    last_RD = jnp.take_along_axis(hidden_RCD, last, axis=1)[:, 0]
    return constrain(model.logits(last_RD), BATCH, None)


def insert(
    state: DecodeState, logits_RV: Float[Array, "R V"], new: InsertRows
) -> tuple[DecodeState, StepOutput]:
    """The state with the sequences in their slots, and the first tokens of the fresh ones."""
    vocab, length = logits_RV.shape[1], new.history.shape[1]
    fresh_R = new.lengths == new.prompts
    offsets = jnp.arange(length)[None]
    in_prompt = offsets < new.prompts[:, None]
    in_output = ~in_prompt & (offsets < new.lengths[:, None])
    add = jax.vmap(lambda ids: jnp.zeros(vocab, jnp.int32).at[ids].add(1, mode="drop"))
    seen_RV = add(jnp.where(in_prompt, new.history, vocab)) > 0
    counts_RV = add(jnp.where(in_output, new.history, vocab))
    choice = choose(logits_RV, new.rows, counts_RV, seen_RV, new.prompts, fresh_R)
    known_R = jnp.take_along_axis(new.history, new.lengths[:, None] - 1, axis=1)[:, 0]
    tokens_R = jnp.where(fresh_R, choice.tokens, known_R)
    positions_R = jnp.where(fresh_R, new.lengths, new.lengths - 1)
    each = jnp.arange(tokens_R.shape[0])
    history_RS = new.history.at[each, positions_R].set(tokens_R, mode="drop")
    counts_RV = counts_RV.at[each, tokens_R].add(fresh_R)
    inserted = DecodeState(tokens_R, positions_R, history_RS, counts_RV, seen_RV, new.rows)
    put = lambda old, row: old.at[new.slots].set(row, mode="drop")  # noqa: E731
    output = _output(
        logits_RV[:, None],
        Choice(tokens_R[:, None], choice.logprobs[:, None]),
        fresh_R,
        fresh_R & False,
        new.rows,
        fresh_R,
    )
    return jax.tree.map(put, state, inserted), output


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
    offsets = jnp.arange(K + 1)[None]
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
    choice = Choice(*(jnp.stack(each, axis=1) for each in zip(*chosen, strict=True)))
    chosen_BT = choice.tokens
    true_BK = jnp.cumprod((chosen_BT[:, :-1] == drafts_BK).astype(jnp.int32), axis=1)
    new_B = jnp.where(active_B, 1 + jnp.sum(true_BK, axis=1), 0)
    guessed_B = jnp.where(active_B, jnp.sum(drafts_BK >= 0, axis=1), 0)
    output = _output(logits_BTV, choice, new_B, guessed_B, state.rows, active_B)
    return outputs.cache, _advance(state, chosen_BT, new_B), output


def _advance(
    state: DecodeState, chosen_BT: Int[Array, "B T"], new_B: Int[Array, " B"]
) -> DecodeState:
    """The state after `new_B` of the chosen tokens."""
    B, T = chosen_BT.shape
    offsets = jnp.arange(T)[None]
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


def _output(
    logits_BTV: Float[Array, "B T V"],
    choice: Choice,
    new_B: Int[Array, " B"],
    guessed_B: Int[Array, " B"],
    rows: SamplingRows,
    active_B: Bool[Array, " B"],
) -> StepOutput:
    """With log-probabilities where an active row wants them; `choice` is [B, T]."""
    B, T, V = logits_BTV.shape
    n = min(MAX_LOGPROBS, V)

    def top() -> tuple[Array, Array]:
        ids, logprobs = top_logprobs(logits_BTV.reshape(B * T, V), n)
        return ids.reshape(B, T, n), logprobs.reshape(B, T, n)

    def asked_for(least: int, wanted: Any, *none: Array) -> Any:
        asked = jnp.any((rows.logprobs >= least) & active_B)
        return jax.lax.cond(asked, wanted, lambda: none if len(none) > 1 else none[0])

    zeros = jnp.zeros((B, T, n))
    ids, top_values = asked_for(1, top, zeros.astype(jnp.int32), zeros)
    return StepOutput(
        choice.tokens,
        new_B.astype(jnp.int32),
        guessed_B.astype(jnp.int32),
        asked_for(0, lambda: token_logprobs(logits_BTV, choice.tokens), jnp.zeros((B, T))),
        choice.logprobs,
        ids,
        top_values,
    )


def insert_rows_of(
    slots: int,
    length: int,
    vocab: int,
    rows: int,
    sequences: list[tuple[int, list[int], int, Any]],
) -> InsertRows:
    """Host arrays for up to `rows` sequences: (slot, tokens, prompt length, SamplingParams)."""
    slot_R = np.full(rows, slots, np.int32)
    history = np.zeros((rows, length), np.int32)
    prompts, lengths = np.ones(rows, np.int32), np.ones(rows, np.int32)
    params: list[Any] = [None] * rows
    for row, (slot, tokens, prompt, sampling) in enumerate(sequences):
        slot_R[row], prompts[row], lengths[row], params[row] = slot, prompt, len(tokens), sampling
        history[row, : len(tokens)] = tokens
    arrays: Any = {"slots": slot_R, "history": history, "prompts": prompts, "lengths": lengths}
    return InsertRows(rows=SamplingRows.of(params, vocab), **arrays)
