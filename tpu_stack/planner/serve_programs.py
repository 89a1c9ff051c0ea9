"""The serving engine's programs, traced for a mesh without allocating.

They are the ones that `tpu-stack serve` compiles: pages of keys and values under a page table,
weights in layers, the decoding rows' state and their sampling. A mesh with a data axis runs an
engine on each of its slices; what is traced is one of them.

On the emulated mesh the layers' weights stay stacked, which the same functions scan: a program of
80 layers compiles as quickly as one of two, and its collectives are those of layers run in turn.

    prefill, decode = trace_serve(config, profile, "int4", batch=16, context=4096, prompt=1024)
    compile_all([decode])[0].collectives
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
from jax.sharding import Mesh

from tpu_stack.models.config import ModelConfig
from tpu_stack.models.paged_attention import BLOCK
from tpu_stack.models.paged_cache import PagedCache, init_paged_cache
from tpu_stack.models.per_layer import per_layer
from tpu_stack.planner.programs import MAX_EMULATED_DEVICES, Traced, shrink, traced_on
from tpu_stack.planner.workload import PrefillStep
from tpu_stack.serving.engine.build import CHUNKS, PAGE, PROMPTS
from tpu_stack.serving.engine.shapes import Shapes
from tpu_stack.serving.engine.state import empty_state
from tpu_stack.serving.engine.steps import (
    cache_dtype,
    jit_decode,
    jit_prefill,
    page_sharding,
    whole_sharding,
)
from tpu_stack.serving.layout import PackedLayout
from tpu_stack.serving.replicas import AXIS, one_replica, split_mesh
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import Profile

SERVE_PROGRAMS = ("prefill", "decode")


def trace_serve(
    config: ModelConfig,
    profile: Profile,
    format: str,
    *,
    batch: int,
    context: int,
    prompt: int,
    limit: int = MAX_EMULATED_DEVICES,
    programs: Sequence[str] = SERVE_PROGRAMS,
    mesh: Mesh | None = None,
) -> list[Traced]:
    """The engine's programs, of `programs` those asked for: prefill of a chunk of each of a few
    prompts (`PrefillStep`), and one decode step, without speculation.

    FLOPs are those of all slices' engines. Attention's are of `context` positions in a decode step,
    and in prefill of the mean over the chunks of a prompt.

    Args:
      batch: slots over the whole mesh. context: tokens of each, rounded up to whole pages.
      prompt: tokens of a prompt.
      mesh: of the profile's axes, on the devices to compile for; None: the emulated mesh, of at
        most `limit` devices.
    """
    replicas, one = profile.mesh.get(AXIS, 1), one_replica(profile)
    small = one if mesh else shrink(one, limit)
    whole = mesh or make_mesh(small.mesh, jax.devices("cpu"))
    step, found = PrefillStep.of(prompt, batch // replicas), []
    for name in (name for name in SERVE_PROGRAMS if name in programs):
        jitted, arguments = engine_arguments(
            config, small, format, name, batch=batch // replicas, context=context, prompt=prompt,
            mesh=whole,
        )  # fmt: skip
        ends, tokens = ((context,), 1) if name == "decode" else (step.ends, step.chunk)
        turns = block_turns(config, ends, tokens)
        found.append(
            traced_on(
                name, profile, small, one_slice(whole), jitted, arguments,
                scale=replicas, turns=turns, shrunk=small is not one,
            )
        )  # fmt: skip
    return found


def engine_arguments(
    config: ModelConfig,
    profile: Profile,
    format: str,
    program: str,
    *,
    batch: int,
    context: int,
    prompt: int,
    mesh: Mesh,
) -> tuple[Any, tuple[Any, ...]]:
    """One of SERVE_PROGRAMS, jitted, and its abstract arguments, of the first slice of `mesh`.

    Sizes are as in `trace_serve`, over all the slices that `profile` has.
    """
    replicas = profile.mesh.get(AXIS, 1)
    slots, one, slice = batch // replicas, one_replica(profile), one_slice(mesh)
    shapes, whole = _shapes(slots, context), whole_sharding(slice)

    def row(*shape: int, dtype: Any = "int32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    params: Any = PackedLayout.of(config, format, one, slice).abstract
    on_tpu = slice.devices.flat[0].platform == "tpu"
    given = ((per_layer(params) if on_tpu else params,), (_cache(config, one, slice, shapes),))
    if program == "prefill":
        step = PrefillStep.of(prompt, slots)
        rows, entries = step.rows, shapes.entries
        arguments = (row(rows, entries), row(rows, step.chunk), row(rows), row(rows))
        return jit_prefill((config,), one, slice), (*given, *arguments)
    made = jax.eval_shape(lambda: empty_state(slots, shapes.length, config.vocab_size))
    state = jax.tree.map(lambda leaf: row(*leaf.shape, dtype=leaf.dtype), made)
    arguments = (state, row(slots, shapes.entries), row(slots, dtype="bool"))
    return jit_decode((config,), one, slice, shapes.guesses), (*given, *arguments)


def one_slice(mesh: Mesh) -> Mesh:
    """The part of a mesh that the first of its engines runs on."""
    return split_mesh(mesh)[0] if mesh.shape.get(AXIS, 1) > 1 else mesh


def block_turns(config: ModelConfig, ends: Sequence[int], tokens: int) -> Fraction:
    """Blocks of pages that attention of the last `tokens` before each of `ends` walks, the mean
    over them and over the layers; of a local layer, those in its window."""
    total = 0
    for kind in config.layer_kinds:
        for end in ends:
            seen = max(0, (end - 1) // tokens * tokens - config.window + 1)
            first = seen // BLOCK if kind == "local" else 0
            total += -(-end // BLOCK) - first
    return Fraction(total, config.n_layers * len(ends))


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
