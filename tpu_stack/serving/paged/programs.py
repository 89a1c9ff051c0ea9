"""The compiled programs of an engine: every shape it will ever run, compiled before the first
request.

>>> programs = Programs(config, profile, mesh, Shapes(...))
>>> logits_RV = programs.prefill(params, tokens, starts, lengths, tables)
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_stack.models.config import ModelConfig
from tpu_stack.models.paged_cache import PAGES_AXES, PagedCache, init_paged_cache
from tpu_stack.serving.paged.guess import guess
from tpu_stack.serving.paged.state import (
    Arrivals,
    StepOutput,
    arrivals_of,
    decode_step,
    empty_state,
    insert,
    prefill_step,
)
from tpu_stack.sharding.constrain import sharding_scope
from tpu_stack.sharding.profiles import Profile


@dataclass(frozen=True)
class Shapes:
    """What programs are compiled for.

    Attributes:
      slots: B. length: S, a multiple of page. page: tokens of a page. pages: P.
      chunks: prompt tokens per row of a prefill program; tails are padded up to one of them.
      rows: prompts per prefill program, 1 among them. guesses: tokens guessed per step, 0 for none.
    """

    slots: int
    length: int
    page: int
    pages: int
    chunks: tuple[int, ...]
    rows: tuple[int, ...]
    guesses: int = 0

    @property
    def entries(self) -> int:
        """Pages of the longest sequence."""
        return self.length // self.page


def _prefill(config, dtype, params, cache, tables, *args):
    cache, logits = prefill_step(config, dtype, params, replace(cache, tables=tables), *args)
    return replace(cache, tables=None), logits


def _decode(config, dtype, guesses, params, cache, state, tables, active):
    cache = replace(cache, tables=tables)
    drafts = guess(state.history, state.positions, guesses)
    cache, state, output = decode_step(config, dtype, params, cache, state, active, drafts)
    return replace(cache, tables=None), state, output


def _arrays(cache: PagedCache) -> dict[str, Any]:
    names = ("k", "v", "k_scales", "v_scales")
    return {name: getattr(cache, name) for name in names if getattr(cache, name) is not None}


def _rows(cache: PagedCache, ids: Any) -> Any:
    """The places of pages `ids` in every layer; out of bounds for ids of P or more."""
    total = cache.k.shape[1]
    layers = jnp.arange(total // cache.pages)[:, None] * cache.pages
    return jnp.where(ids < cache.pages, layers + ids, total)


def _save(cache: PagedCache, ids: Any) -> dict[str, Any]:
    rows = jnp.minimum(_rows(cache, ids), cache.k.shape[1] - 1)
    return {name: array[:, rows] for name, array in _arrays(cache).items()}


def _restore(cache: PagedCache, ids: Any, saved: dict[str, Any]) -> PagedCache:
    rows = _rows(cache, ids)
    arrays = _arrays(cache)
    new = {name: arrays[name].at[:, rows].set(saved[name], mode="drop") for name in arrays}
    return replace(cache, **new)


class Programs:
    """The cache, the decoding state, and the programs that change them."""

    def __init__(self, config: ModelConfig, profile: Profile, mesh: Mesh, shapes: Shapes):
        self.config, self.profile, self.mesh, self.shapes = config, profile, mesh, shapes
        dtype = profile.precision.compute
        spec = profile.rules.partition_spec(PAGES_AXES, "cache")
        pages: Any = NamedSharding(mesh, spec)
        whole: Any = NamedSharding(mesh, PartitionSpec())
        no_tables: Any = None  # each program brings its rows' own
        self._cache = init_paged_cache(
            config, shapes.pages, shapes.page, no_tables, profile.precision.cache or dtype, pages
        )
        vocab = config.vocab_size
        self._state = jax.device_put(empty_state(shapes.slots, shapes.length, vocab), whole)
        cache_out = jax.tree.map(lambda _: pages, self._cache)
        self._prefill = jax.jit(
            partial(_prefill, config, dtype), donate_argnums=1, out_shardings=(cache_out, whole)
        )
        self._decode = jax.jit(
            partial(_decode, config, dtype, shapes.guesses),
            donate_argnums=(1, 2),
            out_shardings=(cache_out, whole, whole),
        )
        # partial: each engine counts its own compilations
        self._insert = jax.jit(partial(insert), donate_argnums=0, out_shardings=whole)
        self._save = jax.jit(partial(_save))
        self._restore = jax.jit(partial(_restore), donate_argnums=0, out_shardings=cache_out)
        self._warm: int | None = None
        self._blank: jax.Array | None = None

    @property
    def compiled(self) -> int:
        """Programs compiled so far."""
        programs = (self._prefill, self._decode, self._insert, self._save, self._restore)
        return sum(program._cache_size() for program in programs)  # type: ignore[attr-defined]

    @property
    def recompilations(self) -> int:
        """Programs compiled since `warm_up`; anything but 0 is a defect."""
        return 0 if self._warm is None else self.compiled - self._warm

    def prefill(self, params: Any, tokens_RC, starts_R, lengths_R, tables_RM) -> jax.Array:
        """Runs a chunk of each row; the logits after it, [R, V]."""
        with sharding_scope(self.mesh, self.profile.rules):
            self._cache, logits = self._prefill(
                params, self._cache, tables_RM, tokens_RC, starts_R, lengths_R
            )
        return logits

    def insert(self, logits_RV: jax.Array | None, arrivals: Arrivals) -> StepOutput:
        """Puts sequences into their slots, with the first tokens of fresh ones.

        Without logits, there is one sequence, which has output already.
        """
        logits_RV = self._blank if logits_RV is None else logits_RV
        with sharding_scope(self.mesh, self.profile.rules):
            self._state, output = self._insert(self._state, logits_RV, arrivals)
        return output

    def decode(self, params: Any, tables_BM, active_B) -> StepOutput:
        """One step of every active row."""
        with sharding_scope(self.mesh, self.profile.rules):
            self._cache, self._state, output = self._decode(
                params, self._cache, self._state, tables_BM, active_B
            )
        return output

    def save(self, ids: list[int]) -> dict[str, np.ndarray]:
        """The pages' contents, on the host."""
        saved = self._save(self._cache, self._padded(ids))
        return {name: np.asarray(array)[:, :, : len(ids)].copy() for name, array in saved.items()}

    def restore(self, ids: list[int], saved: dict[str, np.ndarray]) -> None:
        """Puts saved contents into other pages."""
        missing = self.shapes.entries - len(ids)
        saved = {
            name: np.pad(array, [(0, 0), (0, 0), (0, missing), (0, 0), (0, 0)])
            for name, array in saved.items()
        }
        self._cache = self._restore(self._cache, self._padded(ids), saved)

    def _padded(self, ids: list[int]) -> np.ndarray:
        padded = np.full(self.shapes.entries, self.shapes.pages, np.int32)
        padded[: len(ids)] = ids
        return padded

    def warm_up(self, params: Any) -> None:
        """Runs every program once, changing nothing that a sequence will see."""
        shapes = self.shapes
        for rows in sorted(shapes.rows, reverse=True):  # one row last: its logits are kept
            tables = np.zeros((rows, shapes.entries), np.int32)
            none = np.zeros(rows, np.int32)
            for chunk in shapes.chunks:
                tokens = np.zeros((rows, chunk), np.int32)
                self._blank = self.prefill(params, tokens, none, none, tables)
            arrivals = arrivals_of(shapes.slots, shapes.length, self.config.vocab_size, rows, [])
            self.insert(None, arrivals)
        tables = np.zeros((shapes.slots, shapes.entries), np.int32)
        self.decode(params, tables, np.zeros(shapes.slots, bool))
        self.restore([], self.save([]))
        jax.block_until_ready(self._state)
        self._warm = self.compiled
