"""Which sequence has which slot and which blocks: bookkeeping without any policy.

Example:
    blocks = BlockManager(shapes)
    if blocks.has_slot and blocks.allocate(sequence): blocks.assign_slot(sequence)
    blocks.free(sequence)
"""

import numpy as np

from tpu_stack.serving.engine.block_pool import BlockPool
from tpu_stack.serving.engine.sequence import Sequence
from tpu_stack.serving.engine.shapes import Shapes


class BlockManager:
    """Slots, blocks and block tables.

    Attributes:
      pool: the blocks.
      tables: [B, M]; entry i of row b is the page of slot b's tokens from i * page on.
    """

    def __init__(self, shapes: Shapes):
        self.shapes = shapes
        self.pool = BlockPool(shapes.pages, shapes.page)
        self.tables = np.zeros((shapes.slots, shapes.entries), np.int32)
        self._slots: list[Sequence | None] = [None] * shapes.slots

    @property
    def running(self) -> list[Sequence]:
        """Sequences in slots, prefilling or decoding."""
        return [sequence for sequence in self._slots if sequence is not None]

    @property
    def has_slot(self) -> bool:
        """Whether a slot is free."""
        return None in self._slots

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self.shapes.page)

    def filled_blocks(self, sequence: Sequence) -> list[int]:
        """Ids of the blocks that hold a decoding sequence's keys; its last token has none yet."""
        count = self.blocks_for(len(sequence.tokens) - 1)
        return [block.id for block in sequence.blocks[:count]]

    def allocate(self, sequence: Sequence) -> bool:
        """Allocates blocks for all tokens so far and one more, shared ones where the prefix cache
        has them; False, and nothing is allocated, where there are too few."""
        swapped_out = sequence.swapped is not None
        shared = [] if swapped_out else self.pool.cached_prefix(sequence.block_hashes)
        self.pool.touch(shared)
        wanted = self.blocks_for(min(len(sequence.tokens) + 1, self.shapes.length)) - len(shared)
        fresh = self.pool.allocate(wanted)
        if fresh is None:
            self.pool.release(shared)
            return False
        for block in fresh:
            block.owner = sequence
        sequence.blocks = [*shared, *fresh]
        if not swapped_out:
            hashes, cached = sequence.block_hashes, len(shared)
            self.pool.set_hashes(sequence.blocks[cached : len(hashes)], hashes[cached:])
        return True

    def assign_slot(self, sequence: Sequence) -> None:
        """Gives a sequence that has blocks a free slot."""
        sequence.slot = self._slots.index(None)
        self._slots[sequence.slot] = sequence
        self.tables[sequence.slot] = 0
        self._write_table(sequence)

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Allocates blocks for so many tokens of a running sequence, within its window; False
        where there are too few."""
        missing = self.blocks_for(min(tokens, self.shapes.length)) - len(sequence.blocks)
        if missing <= 0:
            return True
        fresh = self.pool.allocate(missing)
        if fresh is None:
            return False
        for block in fresh:
            block.owner = sequence
        sequence.blocks += fresh
        self._write_table(sequence)
        return True

    def _write_table(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        ids = [block.id for block in sequence.blocks]
        self.tables[sequence.slot, : len(ids)] = ids

    def free(self, sequence: Sequence) -> None:
        """Frees the slot and the blocks."""
        for block in sequence.blocks:
            if block.owner is sequence:
                block.owner = None
        self.pool.release(sequence.blocks)
        assert sequence.slot is not None
        self._slots[sequence.slot] = None
        sequence.slot, sequence.blocks = None, []
        sequence.decoding, sequence.pending = False, 0

    def can_prefill(self, sequence: Sequence) -> bool:
        """Skips blocks of the prompt that are ready; False while another sequence computes the
        next one.

        Blocks that no sequence computes any more, because their owner was freed, are taken over.
        """
        size, hashes = self.shapes.page, sequence.block_hashes
        while sequence.computed % size == 0 and sequence.computed // size < len(hashes):
            block = sequence.blocks[sequence.computed // size]
            if block.owner is sequence or not (block.ready or block.owner is not None):
                break
            if not block.ready:
                return False
            sequence.computed += size
            sequence.cached += size
        for block in sequence.blocks[sequence.computed // size :]:
            if block.owner is None:
                block.owner = sequence
        return True

    def mark_computed(self, sequence: Sequence, tokens: int) -> None:
        """So many more tokens of the prompt have keys; whole blocks may be shared from now on."""
        first = sequence.computed // self.shapes.page
        sequence.computed += tokens
        for block in sequence.blocks[first : sequence.computed // self.shapes.page]:
            block.ready = True
