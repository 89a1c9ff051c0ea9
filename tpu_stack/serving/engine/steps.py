"""The programs of an engine that run the model: prefill, score, decode; and how they are compiled.

The planner compiles the same ones for chips that are not here (planner/serve_programs.py).

    decode = jit_decode((config,), profile, mesh, guesses=0)
    caches, state, output = decode(params, caches, state, tables_BM, active_B)
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from tpu_stack.models.config import ModelConfig
from tpu_stack.models.decoder import Params, bind
from tpu_stack.models.paged_cache import PAGES_AXES, PagedCache
from tpu_stack.serving.engine.draft import draft_tokens
from tpu_stack.serving.engine.guess import guess
from tpu_stack.serving.engine.sampling import Choice, choose, token_logprobs
from tpu_stack.serving.engine.state import DecodeState, StepOutput, advance, step_output
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.constrain import constrain
from tpu_stack.sharding.profiles import Profile

Caches = tuple[PagedCache, ...]
"""The model's and, where there is one, the draft's, without tables: a program brings its own."""
Configs = tuple[ModelConfig, ...]
"""The model's and, where there is one, the draft's."""


SCORED_ROWS = 64
"""Tokens whose logits are computed at once when scoring; divides every chunk of a prompt."""


def jit_prefill(configs: Configs, profile: Profile, mesh: Mesh) -> Any:
    """(params per config, caches, tables_RM, tokens_RC, starts_R, lengths_R) -> caches, which are
    donated, and the model's logits_RV; see `prefill_step`."""
    return jax.jit(
        partial(_prefill, configs, profile.precision.compute),
        donate_argnums=1,
        out_shardings=(page_sharding(profile, mesh), whole_sharding(mesh)),
    )


def jit_score(configs: Configs, profile: Profile, mesh: Mesh) -> Any:
    """As `jit_prefill`, with targets_RC as the last argument and their log-probabilities, [R, C],
    as the last result; see `score_step`."""
    whole = whole_sharding(mesh)
    return jax.jit(
        partial(_score, configs, profile.precision.compute),
        donate_argnums=1,
        out_shardings=(page_sharding(profile, mesh), whole, whole),
    )


def jit_decode(configs: Configs, profile: Profile, mesh: Mesh, guesses: int) -> Any:
    """(params per config, caches, state, tables_BM, active_B) -> caches and state, which are
    donated, and the step's output; see `decode_step`."""
    whole = whole_sharding(mesh)
    return jax.jit(
        partial(_decode, configs, profile.precision.compute, guesses),
        donate_argnums=(1, 2),
        out_shardings=(page_sharding(profile, mesh), whole, whole),
    )


def page_sharding(profile: Profile, mesh: Mesh) -> Any:
    """Of pages, and of their scales."""
    return NamedSharding(mesh, profile.rules.partition_spec(PAGES_AXES, "cache"))


def whole_sharding(mesh: Mesh) -> Any:
    """Of what every device holds."""
    return NamedSharding(mesh, PartitionSpec())


def cache_dtype(profile: Profile) -> str:
    """Of pages."""
    return profile.precision.cache or profile.precision.compute


def _prefill(configs, dtype, params, caches: Caches, tables, *args):
    done, logits = [], []
    for config, weights, cache in zip(configs, params, caches, strict=True):
        cache, last = prefill_step(config, dtype, weights, replace(cache, tables=tables), *args)
        done.append(replace(cache, tables=None))
        logits.append(last)
    return tuple(done), logits[0]


def _score(configs, dtype, params, caches: Caches, tables, *args):
    *chunk, _ = args
    target, *drafts = caches
    cache = replace(target, tables=tables)
    cache, logits, scores = score_step(configs[0], dtype, params[0], cache, *args)
    done = (replace(cache, tables=None),)
    if drafts:  # later prompts may share these blocks, and draft from them
        rest, _ = _prefill(configs[1:], dtype, params[1:], tuple(drafts), tables, *chunk)
        done += rest
    return done, logits, scores


def _decode(configs, dtype, guesses, params, caches: Caches, state, tables, active):
    target, *drafts_cache = (replace(cache, tables=tables) for cache in caches)
    if drafts_cache:
        cache, drafts = draft_tokens(
            configs[1], dtype, params[1], drafts_cache[0], state, active, guesses
        )
        drafts_cache = [cache]
    else:
        drafts = guess(state.history, state.positions, guesses)
    target, state, output = decode_step(configs[0], dtype, params[0], target, state, active, drafts)
    caches = tuple(replace(cache, tables=None) for cache in (target, *drafts_cache))
    return caches, state, output


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
    a guess is accepted when it is that choice: the output is, token for token, what it would be
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
    output = step_output(logits_BTV, choice, new_B, guessed_B, state.rows, active_B)
    return outputs.cache, advance(state, chosen_BT, new_B), output
