"""Settings of `kv_attention` that the tuner tries: pages and key heads per step.

The tuner assumes sequence lengths uniform between 0 and the full cache. Larger steps are fewer, but
the last step of a sequence computes a whole block, so the largest steps win only for full caches.

>>> case = get_case("kv_attention", "int8", "bf16")
>>> next(settings(case, compile_target("7x"), (16, 4096, 32))).tiles
(8, 8)
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tpu_stack.kernels import kv_attention as package
from tpu_stack.kernels.kv_attention import make_plan
from tpu_stack.kernels.kv_attention.plan import Plan, read_tiles, rule_for
from tpu_stack.planner.kernels.attention_cases import PAGES
from tpu_stack.planner.kernels.cases import Case, array_bytes
from tpu_stack.planner.kernels.setting import Setting
from tpu_stack.planner.kernels.targets import CompileTarget

TILES_FILE = Path(package.__file__).parent / "tiles.json"
BLOCK_AXES = "pages, key heads"
"""What the numbers of `tiles` count."""
SECTION = "tuned"
"""The key of tiles.json that holds the device kinds."""
PAGE_COUNTS = (1, 2, 4, 8, 16, 32)


def settings(case: Case, target: CompileTarget, shape: tuple[int, ...]) -> Iterator[Setting]:
    """The current setting, then every other that the kernel accepts; some occur twice."""
    kind = target.device_kind
    current = plan_of(case, shape, kind)
    heads = [d for d in range(1, current.kv_heads + 1) if current.kv_heads % d == 0]
    requested = [(current.pages, current.heads)]
    requested += [(pages, some) for pages in PAGE_COUNTS for some in reversed(heads)]
    for tiles in requested:
        plan = plan_of(case, shape, kind, tiles=tiles)
        yield _setting(case, shape, plan)


def entry_path(case: Case, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The keys of the case's entry under a device kind in tiles.json."""
    return (jnp.dtype(PAGES[case.format]).name,)


def plan_of(case: Case, shape: tuple[int, ...], kind: str, **options: Any) -> Plan:
    """The kernel's plan for the case at a shape on a device kind; options as in `make_plan`."""
    return make_plan(**case.abstract(shape), kind=kind, **options)


def entry_of(
    case: Case, kind: str, shape: tuple[int, ...], tiles: tuple[int, ...], scale_mode: None = None
) -> dict[str, int]:
    """The overrides of the rule in tiles.json that make `tiles` the default at the shape."""
    pages, heads = tiles
    plan = plan_of(case, shape, kind, tiles=(pages, heads))
    rule, dtype = rule_for(kind, PAGES[case.format]), jnp.dtype(PAGES[case.format])
    visible = plan.table * plan.page
    wanted = {
        "target_steps": max(1, visible // plan.tokens),
        "min_tokens": min(rule["min_tokens"], plan.tokens),
        "max_tokens": max(rule["max_tokens"], plan.tokens),
        "max_pages": max(rule["max_pages"], plan.pages),
        "block_bytes": heads * plan.tokens * plan.head_dim * dtype.itemsize,
    }
    default = read_tiles()["default"]
    return {name: value for name, value in wanted.items() if value != default[name]}


def _setting(case: Case, shape: tuple[int, ...], plan: Plan) -> Setting:
    """A call reads each used page once, half of all pages on average. VMEM holds two buffers of a
    step's pages, its float32 scores and softmax weights, and its cast keys and values."""
    arrays = case.abstract(shape)
    of_pages = [name for name in arrays if name.endswith(("pages", "scales"))]
    kept = sum(array_bytes(arrays[name]) for name in of_pages)
    rest = sum(array_bytes(array) for name, array in arrays.items() if name not in of_pages)
    out = sum(map(array_bytes, jax.tree.leaves(case.out_shape(shape))))
    step = kept * plan.pages * plan.heads / (plan.batch * plan.table * plan.kv_heads)
    widened = 2 * plan.heads * plan.tokens * plan.head_dim * 2
    scores = 3 * 4 * plan.heads * plan.group * plan.tokens
    return Setting(
        tiles=(plan.pages, plan.heads),
        scale_mode=None,
        block_bytes=step,
        call_bytes=kept / 2 + rest + out,
        vmem_bytes=2 * step + widened + scores,
        step_share=(plan.steps + 1) / (2 * plan.steps),
    )


def clear_cache() -> None:
    """Makes the next read load tiles.json again."""
    read_tiles.cache_clear()


def format_table(table: dict[str, Any]) -> str:
    """The text of tiles.json for a table."""
    return json.dumps(table, indent=2) + "\n"
