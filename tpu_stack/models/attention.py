"""Grouped-query attention with causal, document, sliding-window and bidirectional-span masks.

Scores and softmax are float32 whatever the inputs. Long sequences are processed in chunks of
queries, so that the score matrix never holds more than `CHUNK` rows per head at once.

>>> q_BTNH, k_BSKH = jnp.ones((1, 4, 8, 16)), jnp.ones((1, 4, 2, 16))
>>> positions_BT = jnp.arange(4)[None]
>>> attend(q_BTNH, k_BSKH, k_BSKH, Mask(positions_BT, positions_BT), scale=16**-0.5).shape
(1, 4, 8, 16)
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK = 1024
_MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Which keys a query attends to: causal within the window, or in the same bidirectional span.

    A query attends to a key of its document that stands at or before it and inside the window, and
    to every key of its own span, before or after it, whatever the window: Gemma 3 reads images so
    (Gemma Team 2025, arXiv:2503.19786), and one span over a whole row is an encoder's mask.

    Attributes:
      q_positions: [B, T]. k_positions: [B, S] or [1, S].
      q_segments, k_segments: document numbers, or None where a row is one document.
      window: tokens seen back, the query's own included; None for all. May be a traced scalar.
      q_spans, k_spans: number of the bidirectional span a token is in, 0 for none; numbers may
        recur in other documents of the row. None where all attention is causal.
    """

    q_positions: Int[Array, "B T"]
    k_positions: Int[Array, "B S"]
    q_segments: Int[Array, "B T"] | None = None
    k_segments: Int[Array, "B S"] | None = None
    window: Int[Array, ""] | int | None = None
    q_spans: Int[Array, "B T"] | None = None
    k_spans: Int[Array, "B S"] | None = None

    def queries(self, start: Int[Array, ""] | int, size: int) -> "Mask":
        """The mask of `size` queries from `start` on."""

        def cut(x: Array | None) -> Any:
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

        return replace(
            self,
            q_positions=cut(self.q_positions),
            q_segments=cut(self.q_segments),
            q_spans=cut(self.q_spans),
        )

    def dense(self) -> Bool[Array, "B T S"]:
        """True where the query may look at the key."""
        distance = self.q_positions[:, :, None] - self.k_positions[:, None, :]
        allowed = distance >= 0
        if self.window is not None:
            allowed &= distance < self.window
        if self.q_spans is not None and self.k_spans is not None:
            same = self.q_spans[:, :, None] == self.k_spans[:, None, :]
            allowed |= same & (self.q_spans[:, :, None] > 0)
        if self.q_segments is not None and self.k_segments is not None:
            allowed &= self.q_segments[:, :, None] == self.k_segments[:, None, :]
        return allowed


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of T queries over S keys; head n reads key head n // (N / K).

    Returns [B, T, N, H] in the dtype of q. A query that may see nothing gets the mean of all
    values, never NaN.
    """
    length = q_BTNH.shape[1]
    if length <= CHUNK or length % CHUNK:
        return _attend(q_BTNH, k_BSKH, v_BSKH, mask, scale, softcap)

    def one_chunk(start: Int[Array, ""]) -> Float[Array, "B C N H"]:
        q = jax.lax.dynamic_slice_in_dim(q_BTNH, start, CHUNK, axis=1)
        return _attend(q, k_BSKH, v_BSKH, mask.queries(start, CHUNK), scale, softcap)

    chunks = jax.lax.map(jax.checkpoint(one_chunk), jnp.arange(0, length, CHUNK))
    return jnp.moveaxis(chunks, 0, 1).reshape(q_BTNH.shape)


def _attend(q_BTNH, k_BSKH, v_BSKH, mask: Mask, scale: float, softcap: float | None):
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    if K == N:  # one batch axis instead of two
        scores = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSKH, preferred_element_type=jnp.float32)
        allowed = mask.dense()[:, None]
    else:
        q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
        scores = jnp.einsum(
            "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
        )
        allowed = mask.dense()[:, None, None]
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(allowed, scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q_BTNH.dtype)
    if K == N:
        return jnp.einsum("BNTS,BSNH->BTNH", weights, v_BSKH)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)
