"""Pages out of a cache and into one: to the host and back at preemption, between two meshes.

Example:
    contents = read_pages(cache, ids)
    cache = write_pages(cache, other_ids, contents)
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from tpu_stack.models.paged_cache import PagedCache

Contents = dict[str, Any]
"""The arrays of a cache by name, each [K, L, n, ...] of n pages in every layer."""


def read_pages(cache: PagedCache, ids: Int[Array, " n"]) -> Contents:
    """What pages `ids` hold; anything for ids of P or more."""
    rows = jnp.minimum(_rows(cache, ids), cache.k.shape[1] - 1)
    return {name: array[:, rows] for name, array in _arrays(cache).items()}


def write_pages(cache: PagedCache, ids: Int[Array, " n"], contents: Contents) -> PagedCache:
    """The cache with `contents` in pages `ids`; ids of P or more are dropped."""
    rows, arrays = _rows(cache, ids), _arrays(cache)
    new = {name: arrays[name].at[:, rows].set(contents[name], mode="drop") for name in arrays}
    return replace(cache, **new)


def _arrays(cache: PagedCache) -> Contents:
    names = ("k", "v", "k_scales", "v_scales")
    return {name: getattr(cache, name) for name in names if getattr(cache, name) is not None}


def _rows(cache: PagedCache, ids: Int[Array, " n"]) -> Int[Array, "L n"]:
    """The places of pages `ids` in every layer; out of bounds for ids of P or more."""
    total = cache.k.shape[1]
    layers = jnp.arange(total // cache.pages)[:, None] * cache.pages
    return jnp.where(ids[None] < cache.pages, layers + ids[None], total)
