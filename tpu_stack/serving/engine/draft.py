"""Guesses for speculation by a small model that shares the target's tokenizer and page tables.

The draft draws each token as the target will: same sampling parameters, same key for a position.
Where the two agree on the likeliest tokens they then draw the same one, sampling or greedy, which
is what `steps.decode_step` keeps. Its keys and values lie in pages of its own with the target's
page numbers, so that a page table serves both.

    cache, drafts_BK = draft_tokens(config, dtype, params, cache, state, active_B, count=4)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tpu_stack.models.config import ModelConfig
from tpu_stack.models.decoder import Params, bind
from tpu_stack.models.paged_cache import PagedCache
from tpu_stack.serving.engine.sampling import choose
from tpu_stack.serving.engine.state import DecodeState
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.constrain import constrain


def draft_tokens(
    config: ModelConfig,
    dtype: Any,
    params: Params,
    cache: PagedCache,
    state: DecodeState,
    active_B: Bool[Array, " B"],
    count: int,
) -> tuple[PagedCache, Int[Array, "B K"]]:
    """`count` tokens after each active row's last one.

    One more step runs than there are tokens: should all be kept, the next call finds the last
    one's keys in place. Those of tokens that are not kept are overwritten.
    """
    model, rows = bind(config, params), jnp.arange(active_B.shape[0])

    def one(carry, t):
        cache, token_B, counts_BV = carry
        places_B = state.positions + t
        positions_B = jnp.where(active_B, places_B, -1)
        outputs = model.hidden(token_B[:, None], positions_B[:, None], cache=cache, dtype=dtype)
        assert outputs.cache is not None
        logits_BV = constrain(model.logits(outputs.hidden[:, 0]), BATCH, None)
        now = (state.rows, counts_BV, state.seen, places_B + 1, active_B)
        chosen_B = choose(logits_BV, *now).tokens
        return (outputs.cache, chosen_B, counts_BV.at[rows, chosen_B].add(1)), chosen_B

    start = (cache, state.tokens, state.counts)
    (cache, _, _), chosen_KB = jax.lax.scan(one, start, jnp.arange(count + 1))
    return cache, chosen_KB[:count].T
