"""Guesses for speculation out of the text itself: what followed these two tokens the last time.

No second model: code, quotations and lists repeat themselves (prompt lookup; Saxena 2023). A wrong
guess costs a row of one product; `steps.decode_step` accepts only what the model would have chosen.

    drafts_BK = guess(state.history, state.positions, count=3)
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

NGRAM = 2
"""Tokens that have to agree."""


def guess(
    history_BS: Int[Array, "B S"], positions_B: Int[Array, " B"], count: int
) -> Int[Array, "B count"]:
    """The tokens after the latest earlier place with the same last NGRAM tokens; -1 for none.

    Args:
      history_BS: tokens by position. positions_B: where the last known one stands.
    """
    B, S = history_BS.shape
    if count == 0:
        return jnp.zeros((B, 0), jnp.int32)
    ends = jnp.arange(S)[None]
    agree_BS = (ends < positions_B[:, None]) & (ends >= NGRAM - 1)
    for back in range(NGRAM):
        here = jnp.maximum(positions_B - back, 0)[:, None]
        shifted = jnp.roll(history_BS, back, axis=1)
        agree_BS &= shifted == jnp.take_along_axis(history_BS, here, axis=1)
    latest_B = jnp.max(jnp.where(agree_BS, ends, -1), axis=1)
    places = latest_B[:, None] + 1 + jnp.arange(count)[None]
    tokens = jnp.take_along_axis(history_BS, jnp.clip(places, 0, S - 1), axis=1)
    known = (latest_B[:, None] >= 0) & (places <= positions_B[:, None])
    return jnp.where(known, tokens, -1)
