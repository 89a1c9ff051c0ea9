"""What the decoding batch carries between steps, and how sequences and tokens enter it.

A row is a slot of the batch. All that a step needs to know about its request is on the device, so
that the host may send off the next step before it has read the last one's tokens.

    state, output = insert(state, logits_RV, InsertRows(...))
    output = step_output(...)
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tpu_stack.serving.engine.sampling import (
    Choice,
    SamplingRows,
    choose,
    token_logprobs,
    top_logprobs,
)
from tpu_stack.serving.requests import MAX_LOGPROBS


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
    output = step_output(
        logits_RV[:, None],
        Choice(tokens_R[:, None], choice.logprobs[:, None]),
        fresh_R.astype(jnp.int32),
        jnp.zeros_like(new.slots),
        new.rows,
        fresh_R,
    )
    return jax.tree.map(put, state, inserted), output


def advance(
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


def step_output(
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

    def asked_for(least: int, wanted: Any, none: Any) -> Any:
        asked = jnp.any((rows.logprobs >= least) & active_B)
        return jax.lax.cond(asked, wanted, lambda: none)

    zeros = jnp.zeros((B, T, n))
    ids, top_values = asked_for(1, top, (zeros.astype(jnp.int32), zeros))
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
