"""The key/value cache of the serving engine: pages of tokens that sequences own or share.

Layer l's page p is page l * P + p of one array, so that a kernel takes the whole cache and a page
table, and nothing copies a layer out of it. Which sequence owns which page is decided on the host
(serving/engine/pool.py). Pages: vLLM (arXiv:2309.06180).

>>> cache = init_paged_cache(config, pages=64, page=16, tables_BM=jnp.zeros((1, 4), jnp.int32))
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_stack.models.attention import Mask
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.paged_attention import on_heads, paged_attend
from tpu_stack.sharding.axes import KV_HEADS

PAGES_AXES = (KV_HEADS, None, None, None)
"""Logical axes of pages and of their scales."""
INT8_MAX = 127.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """Pages of every layer, and the page tables of the rows that a program runs.

    Attributes:
      k, v: [K, L*P, page, H] in the cache dtype.
      k_scales, v_scales: [K, L*P, 1, page] float32 per token and head; None unless int8.
      tables: [B, M] int32; entry i of row b is the page, in [0, P), of its tokens from i * page on.
      pages: P. window: what a local layer sees, where layers differ.
    """

    k: Float[Array, "K LP page H"]
    v: Float[Array, "K LP page H"]
    tables: Int[Array, "B M"]
    k_scales: Float[Array, "K LP 1 page"] | None
    v_scales: Float[Array, "K LP 1 page"] | None
    pages: int = field(metadata={"static": True})
    window: int | None = field(default=None, metadata={"static": True})

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.k.shape[2]

    @property
    def length(self) -> int:
        """Positions a row can hold."""
        return self.tables.shape[1] * self.page

    def attend(
        self,
        layer: Int[Array, ""] | int,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        mask: Mask,
        *,
        scale: float,
        softcap: float | None,
    ) -> tuple[Float[Array, "B T N H"], "PagedCache"]:
        """Writes the new keys and values, then attends to all so far, as `Cache.attend` does.

        Positions below 0 or beyond the row's table write nothing; below 0 their output is zeros.
        """
        positions_BT = mask.q_positions
        cache = self.write(layer, positions_BT, k_BTKH, v_BTKH)
        scales = None
        if cache.k_scales is not None and cache.v_scales is not None:
            scales = (cache.k_scales, cache.v_scales)
        out = paged_attend(
            q_BTNH,
            (cache.k, cache.v),
            scales,
            cache.tables + layer * self.pages,
            positions_BT,
            mask.window,
            local_window=self.window,
            scale=scale,
            softcap=softcap,
        )
        return out, cache

    def write(
        self,
        layer: Int[Array, ""] | int,
        positions_BT: Int[Array, "B T"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
    ) -> "PagedCache":
        """The cache with these keys and values at their positions."""
        rows_BT = self._rows(layer, positions_BT)
        k_KBTH, v_KBTH = (jnp.moveaxis(x, 2, 0) for x in (k_BTKH, v_BTKH))
        if self.k_scales is None or self.v_scales is None:
            arrays, new = {"k": self.k, "v": self.v}, {"k": k_KBTH, "v": v_KBTH}
        else:
            arrays = {
                "k": self.k,
                "v": self.v,
                "k_scales": self.k_scales,
                "v_scales": self.v_scales,
            }
            (k_KBTH, k_scales), (v_KBTH, v_scales) = _to_int8(k_KBTH), _to_int8(v_KBTH)
            new = {"k": k_KBTH, "v": v_KBTH, "k_scales": k_scales, "v_scales": v_scales}
        specs = dict.fromkeys(arrays, KV_HEADS)
        written = on_heads(_put, (specs, specs, None), specs)(arrays, new, rows_BT)
        return dataclasses.replace(self, **written)

    def _rows(
        self, layer: Int[Array, ""] | int, positions_BT: Int[Array, "B T"]
    ) -> Int[Array, "B T"]:
        """Where one head's tokens are written, counted in tokens; out of bounds to be dropped."""
        inside = (positions_BT >= 0) & (positions_BT < self.length)
        entries = jnp.clip(positions_BT // self.page, 0, self.tables.shape[1] - 1)
        pages_BT = jnp.take_along_axis(self.tables, entries, axis=1) + layer * self.pages
        rows_BT = pages_BT * self.page + positions_BT % self.page
        return jnp.where(inside, rows_BT, self.k.shape[1] * self.page)


def _put(
    arrays: dict[str, Array], new: dict[str, Array], rows_BT: Int[Array, "B T"]
) -> dict[str, Array]:
    """`arrays`, [K, LP, page, H] or [K, LP, 1, page], with new [K, B, T, H] or [K, B, T] written.

    One scatter of single tokens over all heads: with heads in the scatter's window, XLA:TPU lays
    them inside the pages, and copies the whole cache to the kernel's layout and back in each layer.
    """
    kv, total, page, _ = arrays["k"].shape
    first = jnp.arange(kv)[:, None, None] * (total * page)
    inside = rows_BT < total * page
    rows_KBT = jnp.where(inside[None], first + rows_BT[None], kv * total * page)

    def put(array: Array, new: Array) -> Array:
        flat = array.reshape(kv * total * page, *new.shape[3:])
        return flat.at[rows_KBT].set(new.astype(array.dtype), mode="drop").reshape(array.shape)

    return {name: put(array, new[name]) for name, array in arrays.items()}


def _to_int8(x: Float[Array, "*B H"]) -> tuple[Float[Array, "*B H"], Float[Array, "*B"]]:
    """Whole numbers in -127 .. 127, and the scale of each row, float32."""
    x = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-30) / INT8_MAX
    return jnp.round(x / scales[..., None]), scales


def paged_shapes(
    config: ModelConfig, pages: int, page: int, dtype: str
) -> dict[str, jax.ShapeDtypeStruct | None]:
    """Shapes and dtypes of k, v and their scales."""
    kv, total = config.n_kv_heads, config.n_layers * pages
    values = jax.ShapeDtypeStruct((kv, total, page, config.head_dim), dtype)
    scales = jax.ShapeDtypeStruct((kv, total, 1, page), "float32") if dtype == "int8" else None
    return {"k": values, "v": values, "k_scales": scales, "v_scales": scales}


def init_paged_cache(
    config: ModelConfig,
    pages: int,
    page: int,
    tables_BM: Int[Array, "B M"] | None,
    dtype: str = "bfloat16",
    device: Any = None,
) -> PagedCache:
    """An empty cache of `pages` pages of `page` tokens in each layer; `device` or a sharding.

    Without tables it is pages alone, as the engine keeps them: each step brings its rows' tables.
    """
    arrays = {
        name: None if shape is None else jnp.zeros(shape.shape, shape.dtype, device=device)
        for name, shape in paged_shapes(config, pages, page, dtype).items()
    }
    return PagedCache(**arrays, tables=tables_BM, pages=pages, window=config.window)  # type: ignore
