"""The serving engine's programs, traced for a mesh without allocating.

They are the ones that `tpu-stack serve` compiles: pages of keys and values under a page table,
weights in layers, the decoding rows' state and their sampling. A mesh with a data axis runs an
engine on each of its slices; what is traced is one of them.

>>> traced = trace_engine(config, profile, "int4", "engine-decode", batch=16, context=4096, mesh=m)
"""

from typing import Any

import jax
from jax.sharding import Mesh

from tpu_stack.models.config import ModelConfig
from tpu_stack.models.paged_cache import PagedCache, init_paged_cache
from tpu_stack.models.per_layer import per_layer
from tpu_stack.planner.programs import Traced, traced_on
from tpu_stack.serving.layout import PackedLayout
from tpu_stack.serving.paged.build import CHUNKS, PAGE, PROMPTS
from tpu_stack.serving.paged.shapes import Shapes
from tpu_stack.serving.paged.state import empty_state
from tpu_stack.serving.paged.steps import (
    cache_dtype,
    jit_decode,
    jit_prefill,
    page_sharding,
    whole_sharding,
)
from tpu_stack.serving.replicas import AXIS, one_replica, split_mesh
from tpu_stack.sharding.profiles import Profile


def trace_engine(
    config: ModelConfig,
    profile: Profile,
    format: str,
    program: str,
    *,
    batch: int,
    context: int,
    mesh: Mesh,
) -> Traced:
    """One program of the engine with `batch` slots over the whole mesh, each of `context` tokens,
    which is rounded up to whole pages.

    Args:
      program: "engine-prefill", the largest that an engine has: the most rows of the longest chunk;
        or "engine-decode", without speculation.
      mesh: of the profile's axes, on the devices to compile for.
    """
    replicas = mesh.shape.get(AXIS, 1)
    one, slice = one_replica(profile), split_mesh(mesh)[0] if replicas > 1 else mesh
    whole = whole_sharding(slice)

    def row(*shape: int, dtype: str = "int32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    shapes = _shapes(batch // replicas, context)
    params = (per_layer(PackedLayout.of(config, format, one, slice).abstract),)
    caches = (_cache(config, one, slice, shapes),)
    if program == "engine-prefill":
        rows, chunk = shapes.rows[-1], shapes.chunks[-1]
        jitted = jit_prefill((config,), one, slice)
        arguments: Any = (
            *(params, caches, row(rows, shapes.entries), row(rows, chunk)),
            *(row(rows), row(rows)),
        )
    else:
        jitted = jit_decode((config,), one, slice, shapes.guesses)
        made = jax.eval_shape(lambda: empty_state(shapes.slots, shapes.length, config.vocab_size))
        state = jax.tree.map(lambda leaf: row(*leaf.shape, dtype=leaf.dtype), made)
        active = row(shapes.slots, dtype="bool")
        arguments = (params, caches, state, row(shapes.slots, shapes.entries), active)
    return traced_on(program, profile, one, slice, jitted, arguments)


def _shapes(slots: int, context: int) -> Shapes:
    """Of an engine on TPU whose every slot has pages for a whole context."""
    page = PAGE["tpu"]
    entries = -(-context // page)
    return Shapes(slots, entries * page, page, slots * entries, CHUNKS, PROMPTS)


def _cache(config: ModelConfig, profile: Profile, mesh: Mesh, shapes: Shapes) -> PagedCache:
    no_tables: Any = None  # each program brings its rows' own
    sizes = (shapes.pages, shapes.page, no_tables, cache_dtype(profile))
    made = jax.eval_shape(lambda: init_paged_cache(config, *sizes))
    place = page_sharding(profile, mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), made
    )
