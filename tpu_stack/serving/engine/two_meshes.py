"""Prefill on one group of devices, decode on another: `Programs` over two meshes.

Both hold pages of the same numbers. A chunk's pages go from the prefill mesh to the same pages of
the decode mesh as soon as they are computed, and nothing waits for them but the sequence itself:
decode steps go on meanwhile. Prompts prefilled earlier are read where they were computed.
Splitwise (Patel et al. 2023, arXiv:2311.18677), DistServe (Zhong et al. 2024, arXiv:2401.09670).

    programs = TwoMeshes(Programs(config, p, mesh_p, shapes), Programs(config, d, mesh_d, shapes))
    engine = Engine(programs, (params_on_p, params_on_d))
"""

from typing import Any

import jax
import numpy as np

from tpu_stack.serving.engine.page_io import Contents
from tpu_stack.serving.engine.programs import Prefilled, Programs, padded_ids
from tpu_stack.serving.engine.state import InsertRows, StepOutput


class TwoMeshes:
    """As `Programs`; `params` are a pair, those of the prefill mesh and of the decode mesh."""

    def __init__(self, prefill: Programs, decode: Programs):
        assert prefill.shapes == decode.shapes
        self._from, self._to = prefill, decode
        self.config, self.profile, self.shapes = decode.config, decode.profile, decode.shapes
        self.transferred = 0
        """Pages transferred so far."""

    @property
    def compiled(self) -> int:
        """Programs compiled so far."""
        return self._from.compiled + self._to.compiled

    @property
    def recompilations(self) -> int:
        """Programs compiled since `warm_up`; anything but 0 is a defect."""
        return self._from.recompilations + self._to.recompilations

    def prepared(self, params: Any) -> tuple[Any, Any]:
        """As `Programs.prepared`, on both meshes."""
        return self._from.prepared(params[0]), self._to.prepared(params[1])

    def prefill(self, params: Any, tokens_RC, starts_R, lengths_R, tables_RM) -> Prefilled:
        """Runs a chunk of each row, and starts the transfer of its pages and logits."""
        chunk = (tokens_RC, starts_R, lengths_R, tables_RM)
        return self._transfer(self._from.prefill(params[0], *chunk), *chunk)

    def score(
        self, params: Any, tokens_RC, starts_R, lengths_R, tables_RM, targets_RC
    ) -> Prefilled:
        """As `Programs.score`, on the prefill mesh."""
        chunk = (tokens_RC, starts_R, lengths_R, tables_RM)
        return self._transfer(self._from.score(params[0], *chunk, targets_RC), *chunk)

    def _transfer(self, done: Prefilled, tokens_RC, starts_R, lengths_R, tables_RM) -> Prefilled:
        page = self.shapes.page
        ids = [
            int(id)
            for start, length, table in zip(starts_R, lengths_R, tables_RM, strict=True)
            for id in table[start // page : -(-(start + length) // page)]
        ]
        self.transferred += len(ids)
        padded = padded_ids(ids, self._pages_of(*tokens_RC.shape), self.shapes.pages)
        contents = self._moved(self._from.read(padded))
        logits = jax.device_put(done.logits, self._to.whole)
        return Prefilled(logits, done.scores, (padded, contents))

    def _pages_of(self, rows: int, chunk: int) -> int:
        """Pages that a chunk of each row touches at most: it may begin within one."""
        return rows * min(self.shapes.entries, chunk // self.shapes.page + 1)

    def _moved(self, contents: tuple[Contents, ...]) -> tuple[Contents, ...]:
        return jax.device_put(contents, self._to.page_sharding)

    def is_ready(self, prefilled: Prefilled) -> bool:
        """Whether decoding could go on from it without waiting."""
        return all(
            array.is_ready() for array in jax.tree.leaves((prefilled.logits, prefilled.pages[1]))
        )

    def finish_prefill(self, prefilled: Prefilled) -> jax.Array:
        """The logits on the decode mesh; its pages are put into that mesh's cache."""
        self._to.write(*prefilled.pages)
        return prefilled.logits

    def insert(self, logits_RV: jax.Array | None, new: InsertRows) -> StepOutput:
        """As `Programs.insert`, on the decode mesh."""
        return self._to.insert(logits_RV, new)

    def decode(self, params: Any, tables_BM, active_B) -> StepOutput:
        """As `Programs.decode`, on the decode mesh."""
        return self._to.decode(params[1], tables_BM, active_B)

    def seconds_per_step(self, params: Any, tables_BM, active_B, count: int) -> float:
        """As `Programs.seconds_per_step`, on the decode mesh."""
        return self._to.seconds_per_step(params[1], tables_BM, active_B, count)

    def swap_out(self, ids: list[int]) -> tuple[Contents, ...]:
        """As `Programs.swap_out`: the decode mesh has all of a decoding sequence's pages."""
        return self._to.swap_out(ids)

    def swap_in(self, ids: list[int], swapped: tuple[Contents, ...]) -> None:
        """As `Programs.swap_in`: what resumes only decodes."""
        self._to.swap_in(ids, swapped)

    def warm_up(self, params: Any) -> None:
        """Runs every program once, changing nothing that a sequence will see."""
        shapes = self.shapes
        for rows in shapes.rows:
            tables, none = np.zeros((rows, shapes.entries), np.int32), np.zeros(rows, np.int32)
            for chunk in shapes.chunks:
                tokens = np.zeros((rows, chunk), np.int32)
                self.finish_prefill(self.prefill(params, tokens, none, none, tables))
        self._to.warm_decode(params[1])
        self._from.mark_warm()
        self._to.mark_warm()
