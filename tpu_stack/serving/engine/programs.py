"""The compiled programs of an engine, and the state that they change: caches and decoding rows.

A server compiles everything before the first request (`warm_up`); without that, each program is
compiled when it is first run. With a draft model, each program runs both: they have a cache each,
and one page table serves the two.

    programs = Programs(config, profile, mesh, Shapes(...))
    prefilled = programs.prefill(params, tokens, starts, lengths, tables)
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.paged_cache import PagedCache, init_paged_cache
from tpu_stack.serving.engine.page_io import Contents, read_pages, write_pages
from tpu_stack.serving.engine.shapes import Shapes
from tpu_stack.serving.engine.state import (
    InsertRows,
    StepOutput,
    empty_state,
    insert,
    insert_rows_of,
)
from tpu_stack.serving.engine.steps import (
    Caches,
    cache_dtype,
    jit_decode,
    jit_prefill,
    jit_score,
    page_sharding,
    whole_sharding,
)
from tpu_stack.serving.weights import prepare
from tpu_stack.sharding.constrain import sharding_scope
from tpu_stack.sharding.profiles import Profile


@dataclass(frozen=True)
class Prefilled:
    """What a prefill program left.

    Attributes:
      logits: [R, V], after the last token of each row. scores: [R, C], log-probabilities of the
        targets, of a program that scores.
      pages: on two meshes, those being transferred from one to the other.
    """

    logits: jax.Array
    scores: jax.Array | None = None
    pages: Any = None


def _read(caches: Caches, ids) -> tuple[Contents, ...]:
    return tuple(read_pages(cache, ids) for cache in caches)


def _write(caches: Caches, ids, contents) -> Caches:
    pairs = zip(caches, contents, strict=True)
    return tuple(write_pages(cache, ids, each) for cache, each in pairs)


class Programs:
    """The caches, the decoding state, and the programs that change them, on one mesh.

    `params` of its methods are those of `config`, or with a draft the pair of both models'.
    """

    def __init__(
        self,
        config: ModelConfig,
        profile: Profile,
        mesh: Mesh,
        shapes: Shapes,
        draft: ModelConfig | None = None,
    ):
        self.config, self.profile, self.mesh, self.shapes = config, profile, mesh, shapes
        self._configs = configs = (config,) if draft is None else (config, draft)
        if draft is not None:
            check_draft(config, draft, shapes)
        self._has_draft = draft is not None
        self.page_sharding, self.whole = page_sharding(profile, mesh), whole_sharding(mesh)
        self._caches = tuple(self._empty_cache(each) for each in configs)
        vocab = config.vocab_size
        self._state = jax.device_put(empty_state(shapes.slots, shapes.length, vocab), self.whole)
        self._prefill = jit_prefill(configs, profile, mesh)
        self._score = jit_score(configs, profile, mesh)
        self._decode = jit_decode(configs, profile, mesh, shapes.guesses)
        # partial: each engine counts its own compilations
        self._insert = jax.jit(partial(insert), donate_argnums=0, out_shardings=self.whole)
        self._read = jax.jit(partial(_read))
        self._write = jax.jit(partial(_write), donate_argnums=0, out_shardings=self.page_sharding)
        self._warm: int | None = None
        self._blank = jax.device_put(jnp.zeros((1, vocab)), self.whole)

    def _empty_cache(self, config: ModelConfig) -> PagedCache:
        shapes = self.shapes
        no_tables: Any = None  # each program brings its rows' own
        return init_paged_cache(
            config,
            shapes.pages,
            shapes.page,
            no_tables,
            cache_dtype(self.profile),
            self.page_sharding,
        )

    def prepared(self, params: Any) -> Any:
        """`params` as the programs take them: the blocks' weights in layers, transposed for one
        CPU device."""
        pairs = zip(self._configs, self._models(params), strict=True)
        each = tuple(prepare(config, one, self.mesh) for config, one in pairs)
        return each if self._has_draft else each[0]

    def _models(self, params: Any) -> tuple[Any, ...]:
        return tuple(params) if self._has_draft else (params,)

    @property
    def compiled(self) -> int:
        """Programs compiled so far."""
        programs = (self._prefill, self._decode, self._insert, self._read, self._write)
        return sum(map(_compiled, programs)) + _compiled(self._score)

    @property
    def recompilations(self) -> int:
        """Programs compiled since `warm_up`; anything but 0 is a defect. Those that score are
        compiled when they are first asked for, one for each shape of a prefill."""
        due = len(self.shapes.rows) * len(self.shapes.chunks)
        scoring = _compiled(self._score)
        late = 0 if self._warm is None else self.compiled - scoring - self._warm
        return late + max(0, scoring - due)

    # What an engine calls ---------------------------------------------------------------------

    def prefill(self, params: Any, tokens_RC, starts_R, lengths_R, tables_RM) -> Prefilled:
        """Runs a chunk of each row; see `steps.prefill_step`."""
        with sharding_scope(self.mesh, self.profile.rules):
            self._caches, logits = self._prefill(
                self._models(params), self._caches, tables_RM, tokens_RC, starts_R, lengths_R
            )
        return Prefilled(logits)

    def score(
        self, params: Any, tokens_RC, starts_R, lengths_R, tables_RM, targets_RC
    ) -> Prefilled:
        """As `prefill`, with the log-probabilities of `targets_RC`; see `steps.score_step`."""
        chunk = (tables_RM, tokens_RC, starts_R, lengths_R, targets_RC)
        with sharding_scope(self.mesh, self.profile.rules):
            self._caches, logits, scores = self._score(self._models(params), self._caches, *chunk)
        return Prefilled(logits, scores)

    def is_ready(self, prefilled: Prefilled) -> bool:
        """Whether decoding could go on from it without waiting."""
        return True

    def finish_prefill(self, prefilled: Prefilled) -> jax.Array:
        """The logits, where decoding needs them; afterwards its pages are there too."""
        return prefilled.logits

    def insert(self, logits_RV: jax.Array | None, new: InsertRows) -> StepOutput:
        """Puts sequences into their slots, with the first tokens of fresh ones.

        Without logits, there is one sequence, which has output already.
        """
        logits_RV = self._blank if logits_RV is None else logits_RV
        with sharding_scope(self.mesh, self.profile.rules):
            self._state, output = self._insert(self._state, logits_RV, new)
        return output

    def decode(self, params: Any, tables_BM, active_B) -> StepOutput:
        """One step of every active row."""
        with sharding_scope(self.mesh, self.profile.rules):
            self._caches, self._state, output = self._decode(
                self._models(params), self._caches, self._state, tables_BM, active_B
            )
        return output

    def seconds_per_step(self, params: Any, tables_BM, active_B, count: int) -> float:
        """Of the decode program by itself: `count` steps dispatched at once, and awaited.

        Afterwards the rows stand where they stood. `tables_BM` must have pages for that many more
        tokens of every active row: keys are left there, which later steps write again.
        """
        kept = jax.tree.map(jnp.copy, self._state)
        jax.block_until_ready((kept, self._caches))
        started = time.perf_counter()
        outputs = [self.decode(params, tables_BM, active_B) for _ in range(count)]
        jax.block_until_ready(outputs)
        took = time.perf_counter() - started
        self._state = kept
        return took / count

    def swap_out(self, ids: list[int]) -> tuple[Contents, ...]:
        """The contents of pages, on the host."""
        swapped = self.read(padded_ids(ids, self.shapes.entries, self.shapes.pages))
        return tuple(
            {name: np.asarray(array)[:, :, : len(ids)].copy() for name, array in each.items()}
            for each in swapped
        )

    def swap_in(self, ids: list[int], swapped: tuple[Contents, ...]) -> None:
        """Writes contents that were swapped out to other pages."""
        missing = self.shapes.entries - len(ids)
        pads = [(0, 0), (0, 0), (0, missing), (0, 0), (0, 0)]
        contents = tuple(
            {name: np.pad(array, pads) for name, array in each.items()} for each in swapped
        )
        self.write(padded_ids(ids, self.shapes.entries, self.shapes.pages), contents)

    def read(self, ids: np.ndarray) -> tuple[Contents, ...]:
        """The pages' contents, on the devices."""
        return self._read(self._caches, ids)

    def write(self, ids: np.ndarray, contents: tuple[Contents, ...]) -> None:
        """Puts contents into pages; ids of P or more are dropped."""
        self._caches = self._write(self._caches, ids, contents)

    # Compilation ------------------------------------------------------------------------------

    def warm_up(self, params: Any) -> None:
        """Runs every program once, changing nothing that a sequence will see."""
        self.warm_prefill(params)
        self.warm_decode(params)
        self.mark_warm()

    def warm_prefill(self, params: Any) -> None:
        """The prefill programs."""
        shapes = self.shapes
        for rows in shapes.rows:
            tables, none = np.zeros((rows, shapes.entries), np.int32), np.zeros(rows, np.int32)
            for chunk in shapes.chunks:
                self.prefill(params, np.zeros((rows, chunk), np.int32), none, none, tables)

    def warm_decode(self, params: Any) -> None:
        """The others."""
        shapes, vocab = self.shapes, self.config.vocab_size
        for rows in shapes.rows:
            logits = jax.device_put(jnp.zeros((rows, vocab)), self.whole)
            self.insert(logits, insert_rows_of(shapes.slots, shapes.length, vocab, rows, []))
        tables = np.zeros((shapes.slots, shapes.entries), np.int32)
        self.decode(params, tables, np.zeros(shapes.slots, bool))
        self.swap_in([], self.swap_out([]))

    def mark_warm(self) -> None:
        """From here on, compilations are defects."""
        jax.block_until_ready((self._caches, self._state))
        self._warm = self.compiled - _compiled(self._score)


def _compiled(program: Any) -> int:
    return program._cache_size()


def padded_ids(ids: list[int], count: int, pages: int) -> np.ndarray:
    """`ids` and, up to `count`, a page that there is not."""
    padded = np.full(count, pages, np.int32)
    padded[: len(ids)] = ids
    return padded


def check_draft(config: ModelConfig, draft: ModelConfig, shapes: Shapes) -> None:
    """Raises UserError for a draft that cannot guess for `config`."""
    if draft.vocab_size != config.vocab_size:
        raise UserError(
            f"the draft model has {draft.vocab_size} tokens and the model {config.vocab_size};"
            " a draft shares the model's tokenizer"
        )
    if draft.max_seq_len < shapes.length:
        raise UserError(
            f"the draft model's window is {draft.max_seq_len} tokens, and requests have up to"
            f" {shapes.length}; set max_length {draft.max_seq_len} or choose another draft"
        )
    if shapes.guesses < 1:
        raise UserError("a draft model guesses nothing with guesses 0; 3 to 5 is usual")
