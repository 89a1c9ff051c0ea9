"""The static plan of one call of `kv_attention`: validated shapes and dtypes, and chosen blocks.

Example:
    plan = make_plan(q, k_pages, v_pages, page_table, lengths, k_scales, v_scales)
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from tpu_stack.kernels.quantized_matmul.operands import cores_of, device_kind
from tpu_stack.kernels.quantized_matmul.tiles import tiles_kind

Q_DTYPES = ("bfloat16", "float32")
PAGE_DTYPES = ("bfloat16", "float8_e4m3fn", "int8")
PAGE_STEP = 16
"""Rows of a bfloat16 tile: pages of a multiple of this concatenate without moving data."""


@dataclass(frozen=True)
class Plan:
    """One call of the kernel.

    Attributes:
      batch, q_heads, kv_heads, head_dim: B, N, K, H.
      page: tokens per page.
      table: most pages of a sequence, the second axis of the page table.
      pages: pages per grid step, each copied by a DMA of its own.
      heads: key heads per grid step; divides kv_heads.
      window: the last tokens that a query attends to, its own included; None for all.
      softcap: scores become softcap * tanh(score / softcap); None for none.
      scale: multiplies the scores.
      scaled: whether the pages have scales per token.
      cores: TensorCores that share the grid: the device's where they divide batch, else 1.
    """

    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    page: int
    table: int
    pages: int
    heads: int
    window: int | None
    softcap: float | None
    scale: float
    scaled: bool
    cores: int

    @property
    def group(self) -> int:
        """Query heads that read one key head."""
        return self.q_heads // self.kv_heads

    @property
    def tokens(self) -> int:
        """Tokens per grid step."""
        return self.pages * self.page

    @property
    def steps(self) -> int:
        """Grid steps per sequence; a window bounds them."""
        blocks = -(-self.table // self.pages)
        if self.window is None:
            return blocks
        return min(blocks, (self.window + self.tokens - 2) // self.tokens + 1)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """(cores, sequences per core, blocks of key heads, blocks of pages)."""
        return self.cores, self.batch // self.cores, self.kv_heads // self.heads, self.steps


def make_plan(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    lengths: Any,
    k_scales: Any = None,
    v_scales: Any = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    tiles: tuple[int, int] | None = None,
    kind: str | None = None,
) -> Plan:
    """Validates one call and chooses its blocks.

    Arguments as in `kv_attention`, of which only shape and dtype are read, and:
      kind: device kind to plan for; None for the one that is traced for.

    Raises: ValueError as `kv_attention` does.
    """
    kind = kind or device_kind()
    if q.ndim != 3 or k_pages.ndim != 4 or page_table.ndim != 2:
        raise ValueError(
            f"q {q.shape}, k_pages {k_pages.shape} and page_table {page_table.shape} need 3, 4 "
            "and 2 axes: [B, N, H], [K, P, page, H], [B, pages of a sequence]"
        )
    batch, q_heads, head_dim = q.shape
    kv_heads, count, page, _ = k_pages.shape
    _check_dtypes(q, k_pages, v_pages, page_table, lengths)
    for what, array, shape in (
        ("k_pages", k_pages, (kv_heads, count, page, head_dim)),
        ("v_pages", v_pages, k_pages.shape),
        ("page_table", page_table, (batch, page_table.shape[1])),
        ("lengths", lengths, (batch,)),
    ):
        if array.shape != shape or min(shape) < 1:
            raise ValueError(f"{what} is {array.shape}, which does not fit q {q.shape}: {shape}")
    if q_heads % kv_heads:
        raise ValueError(f"{q_heads} query heads are not a multiple of {kv_heads} key heads")
    if page % PAGE_STEP:
        raise ValueError(f"pages of {page} tokens; supported: multiples of {PAGE_STEP}")
    if window is not None and window < 1:
        raise ValueError(
            f"window is {window}; it includes the query's own token, so it is at least 1"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be positive")
    scaled = _check_scales(k_pages, k_scales, v_scales)
    visible = min(page_table.shape[1] * page, window or page_table.shape[1] * page)
    pages, heads = tiles or _tiles(k_pages, visible, kind)
    pages = min(pages, page_table.shape[1])
    if pages < 1 or heads < 1 or kv_heads % heads:
        raise ValueError(f"tiles ({pages}, {heads}): {heads} does not divide {kv_heads} key heads")
    return Plan(
        batch=batch,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page=page,
        table=page_table.shape[1],
        pages=pages,
        heads=heads,
        window=window,
        softcap=softcap,
        scale=head_dim**-0.5 if scale is None else scale,
        scaled=scaled,
        cores=cores_of(kind) if batch % cores_of(kind) == 0 else 1,
    )


def _check_dtypes(q: Any, k_pages: Any, v_pages: Any, page_table: Any, lengths: Any) -> None:
    for what, array, allowed in (
        ("q", q, Q_DTYPES),
        ("k_pages", k_pages, PAGE_DTYPES),
        ("v_pages", v_pages, (jnp.dtype(k_pages.dtype).name,)),
        ("page_table", page_table, ("int32",)),
        ("lengths", lengths, ("int32",)),
    ):
        if jnp.dtype(array.dtype).name not in allowed:
            raise ValueError(f"{what} is {array.dtype}; supported: {', '.join(allowed)}")


def _check_scales(k_pages: Any, k_scales: Any, v_scales: Any) -> bool:
    if (k_scales is None) != (v_scales is None):
        raise ValueError("give both k_scales and v_scales, or neither")
    if k_scales is None:
        if k_pages.dtype == jnp.int8:
            raise ValueError("int8 pages need k_scales and v_scales")
        return False
    kv_heads, count, page, _ = k_pages.shape
    for what, array in (("k_scales", k_scales), ("v_scales", v_scales)):
        if array.shape != (kv_heads, count, 1, page) or array.dtype != jnp.float32:
            raise ValueError(
                f"{what} is {array.dtype}{array.shape}; supported: float32 "
                f"[K, P, 1, page] = {(kv_heads, count, 1, page)}"
            )
    return True


@functools.cache
def read_tiles() -> dict[str, Any]:
    """tiles.json: `libtpu`, the version it was tuned with, a `default` rule and, under `tuned`,
    its overrides by device kind and page dtype.

    A rule: the grid steps that a sequence should take (`target_steps`), bounded by `min_tokens`,
    `max_tokens` and `max_pages` per step and by `block_bytes` of keys.
    """
    return json.loads((Path(__file__).parent / "tiles.json").read_text(encoding="utf-8"))


def rule_for(kind: str, dtype: Any) -> dict[str, int]:
    """The rule for a device kind and a page dtype."""
    table = read_tiles()
    tuned = table["tuned"].get(tiles_kind(kind), {})
    return table["default"] | tuned.get(jnp.dtype(dtype).name, {})


def _tiles(k_pages: Any, visible: int, kind: str) -> tuple[int, int]:
    """Pages for the wanted tokens per step, then as many key heads as `block_bytes` allow.

    A step costs some hundred bundles whatever its size, and the last step of a sequence computes
    a whole block: long sequences favour large steps, short ones small steps.
    """
    kv_heads, _, page, head_dim = k_pages.shape
    rule, itemsize = rule_for(kind, k_pages.dtype), jnp.dtype(k_pages.dtype).itemsize
    tokens = min(rule["max_tokens"], max(rule["min_tokens"], visible // rule["target_steps"]))
    pages = min(rule["max_pages"], max(1, tokens // page))
    most = max(1, rule["block_bytes"] // (pages * page * head_dim * itemsize))
    return pages, max(d for d in range(1, kv_heads + 1) if kv_heads % d == 0 and d <= most)
