"""Decoding token by token through the key/value cache equals one pass over the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_stack.models.config import ModelConfig
from tpu_stack.models.decoder import bind, forward
from tpu_stack.models.paged_cache import PagedCache, init_paged_cache

LENGTH, PAGE = 14, 4
PROMPTS = np.array([6, 1, 4])

GLOBAL = ModelConfig(
    vocab_size=53,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=48,
    qk_norm=True,
)
# A window shorter than the prompts: decoding must forget what the window has passed.
LOCAL = GLOBAL.replace(
    n_layers=3,
    block_pattern=("local", "global"),
    window=3,
    rope_base_local=500.0,
    attention_softcap=4.0,
    scale_embeddings=True,
    norm_offset=True,
    post_norms=True,
    tie_embeddings=True,
)


def empty_cache(config: ModelConfig, rows: int, dtype: str = "bfloat16") -> PagedCache:
    """Room for LENGTH tokens in each row, in pages that alternate between rows."""
    entries = -(-LENGTH // PAGE)
    tables = jnp.arange(rows * entries, dtype=jnp.int32).reshape(entries, rows).T
    return init_paged_cache(config, rows * entries, PAGE, tables, dtype)


def step_logits(config, params, tokens, positions, cache):
    model = bind(config, params)
    outputs = model.hidden(tokens, positions, cache=cache)
    return model.logits(outputs.hidden), outputs.cache


@pytest.mark.parametrize("config", [GLOBAL, LOCAL], ids=["global", "local"])
def test_prefill_and_steps_equal_the_full_pass(random_params, config):
    """Rows of 6, 1 and 4 prompt tokens, right-padded, then decoded together to 14 tokens each.

    The padding writes rubbish to the cache beyond each row's prompt, which must never be seen.
    """
    params = random_params(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, LENGTH), dtype=np.int32)
    full = jax.jit(forward, static_argnums=0)(config, params, tokens)
    step = jax.jit(step_logits, static_argnums=0)
    prompts = np.where(np.arange(6) < PROMPTS[:, None], tokens[:, :6], 7)
    positions = np.broadcast_to(np.arange(6), (3, 6))
    cache = empty_cache(config, 3, "float32")
    logits, cache = step(config, params, prompts, positions, cache)
    found = [np.asarray(logits[row, :size]) for row, size in enumerate(PROMPTS)]
    at = PROMPTS.copy()
    while (at < LENGTH).any():
        here = np.minimum(at, LENGTH - 1)  # a finished row repeats its last token in place
        logits, cache = step(
            config, params, tokens[np.arange(3), here][:, None], here[:, None], cache
        )
        for row in np.flatnonzero(at < LENGTH):
            found[row] = np.concatenate([found[row], np.asarray(logits[row])])
        at += 1
    # float32 sums over 14 masked slots rather than over the T that exist: a few last places.
    np.testing.assert_allclose(np.stack(found), full, atol=1e-5 * float(np.abs(full).max()))


def test_bfloat16_cache_costs_no_more_than_its_rounding(random_params):
    """Keys and values rounded once, 2**-9 each: logits move by a per cent or two, not more."""
    params = random_params(GLOBAL)
    tokens = np.random.default_rng(2).integers(0, 53, (2, 10), dtype=np.int32)
    positions = np.broadcast_to(np.arange(10), (2, 10))
    full = forward(GLOBAL, params, jnp.asarray(tokens))
    rounded, _ = step_logits(GLOBAL, params, tokens, positions, empty_cache(GLOBAL, 2))
    error = np.linalg.norm(rounded - full) / np.linalg.norm(full)
    assert 0 < error < 0.02
