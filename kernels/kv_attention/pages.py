"""Double-buffered DMAs of a block's pages from HBM, which overlap with the block before it.

Example:
    copies = Copies(fetch_ref, lengths_ref, stored, buffers, semaphores, plan)
    copies.start(place, slot)  # and a step later
    copies.wait(place, slot)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from tpu_stack.kernels.kv_attention.plan import Plan

LANES, TILE_ROWS = 128, 32
"""An 8-bit tile, the largest of the page dtypes."""


class Place(NamedTuple):
    """One grid step of a core, int32 scalars: sequence, block of key heads, block of pages."""

    sequence: Any
    heads: Any
    block: Any


def first_block(length: Array, plan: Plan) -> Array | int:
    """Index of the block that holds the first visible token."""
    if plan.window is None:
        return 0
    return jnp.maximum(length - plan.window, 0) // plan.tokens


def pages_to_fetch(page_table: Array, lengths: Array, count: int, plan: Plan) -> Array:
    """int32 [B, steps * pages]: the page that each copy of each step reads.

    Computed before the kernel, whose scalar unit would take as long as the attention. Entries of
    the table past the length are not used: the last page within the length takes their place.
    """
    length = jnp.clip(lengths, 0, plan.table * plan.page)[:, None]
    last = jnp.maximum(pl.cdiv(length, plan.page) - 1, 0)
    entry = first_block(length, plan) * plan.pages + jnp.arange(plan.steps * plan.pages)[None]
    fetch = jnp.take_along_axis(page_table, jnp.minimum(entry, last), axis=1)
    # The first entry of a sequence of length 0 may be any number.
    return jnp.clip(fetch, 0, count - 1)


@dataclass(frozen=True)
class Copies:
    """The DMAs of the pages of one grid step.

    Attributes:
      fetch_ref: `pages_to_fetch`.
      lengths_ref: int32 [B].
      stored: HBM refs of keys and values, then of their scales when `plan.scaled`.
      buffers: VMEM refs [2, pages, heads, ...] for each of them, two slots.
      semaphores: one per slot.
      plan: of the call.
    """

    fetch_ref: Any
    lengths_ref: Any
    stored: tuple[Any, ...]
    buffers: tuple[Any, ...]
    semaphores: Any
    plan: Plan

    def tokens(self, place: Place) -> tuple[Array, Array]:
        """The sequence's length and the position of the step's first token."""
        plan = self.plan
        length = jnp.clip(self.lengths_ref[place.sequence], 0, plan.table * plan.page)
        return length, (first_block(length, plan) + place.block) * plan.tokens

    def start(self, place: Place, slot: Any, once: bool = False) -> None:
        """Starts the copies of the step's pages into the slot.

        once: called at a single step, so generate few instructions rather than fast ones.
        """
        whole, pages = self._pages(place)

        def start_page(page: Any, _: None = None) -> None:
            entry = self._entry(place, page)
            for number in range(len(self.buffers)):
                self._copy(entry, place, slot, page, number).start()

        @pl.when(jnp.logical_not(whole) | once)
        def _():
            jax.lax.fori_loop(0, pages, start_page, None)

        if not once:  # unrolled: a loop would cost twice as much

            @pl.when(whole)
            def _():
                for page in range(self.plan.pages):
                    start_page(page)

    def wait(self, place: Place, slot: Any) -> None:
        """Waits for the copies of `start`."""
        whole, pages = self._pages(place)

        def wait_page(page: Any, _: None) -> None:
            entry = self._entry(place, page)
            for number in range(len(self.buffers)):
                self._copy(entry, place, slot, page, number).wait()

        @pl.when(whole)
        def _():
            # A semaphore counts bytes, so one wait covers all copies. Only where no tile is padded:
            # a chip may count the padding or not.
            for number, buffer in enumerate(self.buffers):
                if _whole_tiles(buffer.shape):
                    of_slot, semaphore = buffer.at[slot], self.semaphores.at[slot]
                    pltpu.make_async_copy(of_slot, of_slot, semaphore).wait()
                    continue
                for page in range(self.plan.pages):
                    self._copy(self._entry(place, page), place, slot, page, number).wait()

        @pl.when(jnp.logical_not(whole))
        def _():
            jax.lax.fori_loop(0, pages, wait_page, None)

    def _pages(self, place: Place) -> tuple[Array, Array]:
        """Whether all pages of the block hold visible tokens, and how many do."""
        length, first = self.tokens(place)
        left = jnp.clip(length - first, 0, self.plan.tokens)
        return left == self.plan.tokens, pl.cdiv(left, self.plan.page)

    def _entry(self, place: Place, page: Any) -> Any:
        """Index of the page in `stored`."""
        return self.fetch_ref[place.sequence, place.block * self.plan.pages + page]

    def _copy(self, entry: Any, place: Place, slot: Any, page: Any, number: int) -> Any:
        """The copy of one page of one array. JAX logs an error for copies that are never used."""
        array, buffer = self.stored[number], self.buffers[number]
        heads = pl.ds(place.heads * self.plan.heads, self.plan.heads)
        return pltpu.make_async_copy(
            array.at[heads, entry], buffer.at[slot, page], self.semaphores.at[slot]
        )


def _whole_tiles(shape: tuple[int, ...]) -> bool:
    """Whether a buffer's last two axes are whole tiles of any type, or one row of whole lanes."""
    rows, columns = shape[-2:]
    return columns % LANES == 0 and (rows == 1 or rows % TILE_ROWS == 0)
