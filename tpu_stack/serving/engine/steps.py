"""The two programs of an engine that run the model, as pure functions, and how they are compiled.

The planner compiles the same ones for chips that are not here (planner/engine_programs.py).

    decode = jit_decode((config,), profile, mesh, guesses=0)
    caches, state, output = decode(params, caches, state, tables_BM, active_B)
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_stack.models.config import ModelConfig
from tpu_stack.models.paged_cache import PAGES_AXES, PagedCache
from tpu_stack.serving.engine.draft import draft_tokens
from tpu_stack.serving.engine.guess import guess
from tpu_stack.serving.engine.state import decode_step, prefill_step, score_step
from tpu_stack.sharding.profiles import Profile

Caches = tuple[PagedCache, ...]
"""The model's and, where there is one, the draft's, without tables: a program brings its own."""
Configs = tuple[ModelConfig, ...]
"""The model's and, where there is one, the draft's."""


def jit_prefill(configs: Configs, profile: Profile, mesh: Mesh) -> Any:
    """(params per config, caches, tables_RM, tokens_RC, starts_R, lengths_R) -> caches, which are
    donated, and the model's logits_RV; see `state.prefill_step`."""
    return jax.jit(
        partial(_prefill, configs, profile.precision.compute),
        donate_argnums=1,
        out_shardings=(page_sharding(profile, mesh), whole_sharding(mesh)),
    )


def jit_score(configs: Configs, profile: Profile, mesh: Mesh) -> Any:
    """As `jit_prefill`, with targets_RC as the last argument and their log-probabilities, [R, C],
    as the last result; see `state.score_step`."""
    whole = whole_sharding(mesh)
    return jax.jit(
        partial(_score, configs, profile.precision.compute),
        donate_argnums=1,
        out_shardings=(page_sharding(profile, mesh), whole, whole),
    )


def jit_decode(configs: Configs, profile: Profile, mesh: Mesh, guesses: int) -> Any:
    """(params per config, caches, state, tables_BM, active_B) -> caches and state, which are
    donated, and the step's output; see `state.decode_step`."""
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
    *chunk, targets = args
    target, *drafts = caches
    cache = replace(target, tables=tables)
    cache, logits, scores = score_step(configs[0], dtype, params[0], cache, *chunk, targets)
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
