"""A block's pages, copied from device memory while the block before it is computed on.

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
"""A tile of 8 bits, the largest of the types' tiles."""


class Place(NamedTuple):
    """One step of a core's grid: sequence, block of key heads, block of pages, as int32 scalars."""

    sequence: Any
    heads: Any
    block: Any


def first_block(length: Array, plan: Plan) -> Array | int:
    """The block that holds the first token in sight."""
    if plan.window is None:
        return 0
    return jnp.maximum(length - plan.window, 0) // plan.tokens


def pages_to_fetch(page_table: Array, lengths: Array, count: int, plan: Plan) -> Array:
    """int32 [B, steps * pages]: the page of each copy at each step. Worked out before the kernel,
    whose scalar arithmetic would cost as much as the attention.

    No entry of the table past the length is used: there the last page within it stays.
    """
    length = jnp.clip(lengths, 0, plan.table * plan.page)[:, None]
    last = jnp.maximum(pl.cdiv(length, plan.page) - 1, 0)
    entry = first_block(length, plan) * plan.pages + jnp.arange(plan.steps * plan.pages)
    fetch = jnp.take_along_axis(page_table, jnp.minimum(entry, last), axis=1)
    # A sequence without tokens may have any number in its first entry.
    return jnp.clip(fetch, 0, count - 1)


@dataclass(frozen=True)
class Copies:
    """The copies of the pages of one step.

    Attributes:
      fetch_ref: `pages_to_fetch`.
      lengths_ref: int32 [B].
      stored: refs in device memory of keys and values, then of their scales if there are any.
      buffers: for each of them VMEM [2, pages, heads, ...]: slot 0 and 1.
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
        """The sequence's length, and its first token of the step."""
        plan = self.plan
        length = jnp.clip(self.lengths_ref[place.sequence], 0, plan.table * plan.page)
        return length, (first_block(length, plan) + place.block) * plan.tokens

    def start(self, place: Place, slot: Any, once: bool = False) -> None:
        """Starts to fill the slot's buffers with the pages that the sequence has in this step.

        once: that this is called at one step of all, so that its instructions should be few.
        """
        whole, pages = self._pages(place)

        def start_page(page: Any, _: None = None) -> None:
            entry = self._entry(place, page)
            for number in range(len(self.buffers)):
                self._copy(entry, place, slot, page, number).start()

        @pl.when(jnp.logical_not(whole) | once)
        def _():
            jax.lax.fori_loop(0, pages, start_page, None)

        if not once:  # written out: a loop costs as much again

            @pl.when(whole)
            def _():
                for page in range(self.plan.pages):
                    start_page(page)

    def wait(self, place: Place, slot: Any) -> None:
        """Until what `start` started is there."""
        whole, pages = self._pages(place)

        def wait_page(page: Any, _: None) -> None:
            entry = self._entry(place, page)
            for number in range(len(self.buffers)):
                self._copy(entry, place, slot, page, number).wait()

        @pl.when(whole)
        def _():
            # A semaphore counts bytes: one wait for as many as all copies bring, where no tile is
            # padded, so that the bytes are the same however a chip counts them.
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
        """Whether the block is whole, and the pages that the sequence has in it."""
        length, first = self.tokens(place)
        left = jnp.clip(length - first, 0, self.plan.tokens)
        return left == self.plan.tokens, pl.cdiv(left, self.plan.page)

    def _entry(self, place: Place, page: Any) -> Any:
        """Where the page lies in `stored`."""
        return self.fetch_ref[place.sequence, place.block * self.plan.pages + page]

    def _copy(self, entry: Any, place: Place, slot: Any, page: Any, number: int) -> Any:
        """Of one page of one array. Made only where it is used: JAX logs an error for others."""
        array, buffer = self.stored[number], self.buffers[number]
        heads = pl.ds(place.heads * self.plan.heads, self.plan.heads)
        return pltpu.make_async_copy(
            array.at[heads, entry], buffer.at[slot, page], self.semaphores.at[slot]
        )


def _whole_tiles(shape: tuple[int, ...]) -> bool:
    """Whether a buffer's last two axes are whole tiles of any type, or one row of whole lanes."""
    rows, columns = shape[-2:]
    return columns % LANES == 0 and (rows == 1 or rows % TILE_ROWS == 0)
