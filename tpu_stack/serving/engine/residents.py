"""Who holds which slot and which pages: the engine's books, without any policy.

>>> residents = Residents(shapes)
>>> if residents.has_slot and residents.hold(sequence): residents.seat(sequence)
>>> residents.leave(sequence)
"""

import numpy as np

from tpu_stack.serving.engine.pool import PagePool
from tpu_stack.serving.engine.sequence import Sequence
from tpu_stack.serving.engine.shapes import Shapes


class Residents:
    """Slots, pages and page tables.

    Attributes:
      pool: the pages.
      tables: [B, M]; entry i of row b is the page of slot b's tokens from i * page on.
    """

    def __init__(self, shapes: Shapes):
        self.shapes = shapes
        self.pool = PagePool(shapes.pages, shapes.page)
        self.tables = np.zeros((shapes.slots, shapes.entries), np.int32)
        self._rows: list[Sequence | None] = [None] * shapes.slots

    @property
    def all(self) -> list[Sequence]:
        """Sequences in slots, prefilling or decoding."""
        return [sequence for sequence in self._rows if sequence is not None]

    @property
    def has_slot(self) -> bool:
        """Whether one more sequence finds a slot."""
        return None in self._rows

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.shapes.page)

    def filled_pages(self, sequence: Sequence) -> list[int]:
        """Ids of the pages that hold a decoding sequence's keys; its last token has none yet."""
        count = self.pages_for(len(sequence.tokens) - 1)
        return [page.id for page in sequence.pages[:count]]

    def hold(self, sequence: Sequence) -> bool:
        """Takes pages for all tokens so far and one more, some of them other sequences'; False,
        and nothing is taken, where there are too few."""
        shared = [] if sequence.saved is not None else self.pool.shared(sequence.names)
        self.pool.take(shared)
        wanted = self.pages_for(min(len(sequence.tokens) + 1, self.shapes.length)) - len(shared)
        fresh = self.pool.allocate(wanted)
        if fresh is None:
            self.pool.release(shared)
            return False
        for page in fresh:
            page.owner = sequence
        sequence.pages = [*shared, *fresh]
        if sequence.saved is None:
            count = len(sequence.names)
            self.pool.name(sequence.pages[len(shared) : count], sequence.names[len(shared) :])
        return True

    def seat(self, sequence: Sequence) -> None:
        """Gives a sequence that holds pages a free slot."""
        sequence.slot = self._rows.index(None)
        self._rows[sequence.slot] = sequence
        self.tables[sequence.slot] = 0
        self._enter(sequence)

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Sees that a seated sequence has pages for so many tokens, within its window; False where
        there are too few."""
        missing = self.pages_for(min(tokens, self.shapes.length)) - len(sequence.pages)
        if missing <= 0:
            return True
        fresh = self.pool.allocate(missing)
        if fresh is None:
            return False
        for page in fresh:
            page.owner = sequence
        sequence.pages += fresh
        self._enter(sequence)
        return True

    def _enter(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        ids = [page.id for page in sequence.pages]
        self.tables[sequence.slot, : len(ids)] = ids

    def leave(self, sequence: Sequence) -> None:
        """Takes back the slot and the pages."""
        for page in sequence.pages:
            if page.owner is sequence:
                page.owner = None
        self.pool.release(sequence.pages)
        assert sequence.slot is not None
        self._rows[sequence.slot] = None
        sequence.slot, sequence.pages = None, []
        sequence.decoding, sequence.pending = False, 0

    def can_compute(self, sequence: Sequence) -> bool:
        """Skips pages of the prompt that are ready; False while somebody else computes the next.

        Pages that nobody computes any more, because their owner left, are taken over.
        """
        page = self.shapes.page
        while sequence.computed % page == 0 and sequence.computed // page < len(sequence.names):
            held = sequence.pages[sequence.computed // page]
            if held.owner is sequence or not (held.ready or held.owner is not None):
                break
            if not held.ready:
                return False
            sequence.computed += page
            sequence.cached += page
        for held in sequence.pages[sequence.computed // page :]:
            if held.owner is None:
                held.owner = sequence
        return True

    def computed(self, sequence: Sequence, tokens: int) -> None:
        """So many more tokens of the prompt have keys; whole pages may be shared from now on."""
        first = sequence.computed // self.shapes.page
        sequence.computed += tokens
        for page in sequence.pages[first : sequence.computed // self.shapes.page]:
            page.ready = True
