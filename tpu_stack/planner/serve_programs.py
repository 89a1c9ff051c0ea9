"""The serving engine's programs, traced for a mesh without allocating.

They are the ones that `tpu-stack serve` compiles: pages of keys and values under a page table,
weights in layers, the decoding rows' state and their sampling. A mesh with a data axis runs an
engine on each of its slices; what is traced is one of them.

On the emulated mesh the layers' weights stay stacked, which the same functions scan: a program of
80 layers compiles as quickly as one of two, and its collectives are those of layers run in turn.

>>> prefill, decode = trace_serve(config, profile, "int4", batch=16, context=4096, prompt=1024)
>>> compile_all([decode])[0].collectives
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
    replicas = profile.mesh.get(AXIS, 1)
    one = one_replica(profile)
    small, slice = one, mesh
    if mesh is None:
        small = shrink(one, limit)
        slice = make_mesh(small.mesh, jax.devices("cpu"))
    elif replicas > 1:
        slice = split_mesh(mesh)[0]
    assert slice is not None
    shapes, step = _shapes(batch // replicas, context), PrefillStep.of(prompt, batch // replicas)
    params: Any = PackedLayout.of(config, format, small, slice).abstract
    traced = _Engine(config, small, slice, shapes, (params if mesh is None else per_layer(params),))
    found = []
    for name in (name for name in SERVE_PROGRAMS if name in programs):
        jitted, arguments = traced.prefill(step) if name == "prefill" else traced.decode()
        turns = block_turns(config, (context,) if name == "decode" else step.ends,
                            1 if name == "decode" else step.chunk)  # fmt: skip
        found.append(
            traced_on(name, profile, small, slice, jitted, arguments,
                      scale=replicas, turns=turns, shrunk=small is not one)
        )  # fmt: skip
    return found


class _Engine:
    """The jitted programs of one engine and their abstract arguments."""

    def __init__(
        self, config: ModelConfig, profile: Profile, mesh: Mesh, shapes: Shapes, params: Any
    ):
        self.config, self.profile, self.mesh, self.shapes = config, profile, mesh, shapes
        self.params, self.whole = params, whole_sharding(mesh)
        self.caches = (_cache(config, profile, mesh, shapes),)

    def prefill(self, step: PrefillStep) -> tuple[Any, tuple[Any, ...]]:
        rows = step.rows
        tables, tokens = self._row(rows, self.shapes.entries), self._row(rows, step.chunk)
        arguments = (self.params, self.caches, tables, tokens, self._row(rows), self._row(rows))
        return jit_prefill((self.config,), self.profile, self.mesh), arguments

    def decode(self) -> tuple[Any, tuple[Any, ...]]:
        shapes, vocab = self.shapes, self.config.vocab_size
        made = jax.eval_shape(lambda: empty_state(shapes.slots, shapes.length, vocab))
        state = jax.tree.map(lambda leaf: self._row(*leaf.shape, dtype=leaf.dtype), made)
        tables = self._row(shapes.slots, shapes.entries)
        active = self._row(shapes.slots, dtype="bool")
        jitted = jit_decode((self.config,), self.profile, self.mesh, shapes.guesses)
        return jitted, (self.params, self.caches, state, tables, active)

    def _row(self, *shape: int, dtype: Any = "int32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.whole)


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
