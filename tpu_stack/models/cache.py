"""The key/value cache of one decoding batch: contiguous, one row per sequence.

Row b holds the keys of positions 0 .. S-1; positions not written yet are masked by position, so
they need no clearing. It is carried through the layer scan and updated in place.

>>> cache = init_cache(config, batch=8, length=256, dtype="bfloat16")
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_stack.models.attention import Mask, attend
from tpu_stack.models.config import ModelConfig
from tpu_stack.sharding.axes import BATCH, KV_HEADS

CACHE_AXES = (None, BATCH, None, KV_HEADS, None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values, each [L, B, S, K, H] in the cache dtype."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]

    @property
    def length(self) -> int:
        """S: positions a row can hold."""
        return self.k.shape[2]

    def attend(
        self,
        layer: Int[Array, ""],
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        mask: Mask,
        *,
        scale: float,
        softcap: float | None,
    ) -> tuple[Float[Array, "B T N H"], "Cache"]:
        """Writes the new keys and values at the queries' positions, then attends to all so far."""
        cache = self.write(layer, mask.q_positions, k_BTKH, v_BTKH)
        k, v = cache.read(layer, q_BTNH.dtype)
        return attend(q_BTNH, k, v, mask, scale=scale, softcap=softcap), cache

    def write(
        self,
        layer: Int[Array, ""],
        positions_BT: Int[Array, "B T"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
    ) -> "Cache":
        """The cache with these keys and values at their positions; positions >= S are dropped.

        Written as one scatter batched over rows, which the partitioner keeps local to the devices
        that hold the rows; indexing rows by number would gather the batch on every device.
        """

        def one_row(cache_LSKH: Array, positions_T: Array, new_TKH: Array) -> Array:
            new = new_TKH.astype(cache_LSKH.dtype)
            return cache_LSKH.at[layer, positions_T].set(new, mode="drop")

        every_row = jax.vmap(one_row, in_axes=(1, 0, 0), out_axes=1)
        return Cache(
            every_row(self.k, positions_BT, k_BTKH), every_row(self.v, positions_BT, v_BTKH)
        )

    def read(self, layer: Int[Array, ""], dtype) -> tuple[Array, Array]:
        """Keys and values of one layer, [B, S, K, H], as `dtype`."""
        take = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)  # noqa: E731
        return take(self.k).astype(dtype), take(self.v).astype(dtype)


def cache_shape(config: ModelConfig, batch: int, length: int) -> tuple[int, ...]:
    """(L, B, S, K, H)."""
    return (config.n_layers, batch, length, config.n_kv_heads, config.head_dim)


def init_cache(config: ModelConfig, batch: int, length: int, dtype: str = "bfloat16") -> Cache:
    """An empty cache of `batch` rows and `length` positions."""
    shape = cache_shape(config, batch, length)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
