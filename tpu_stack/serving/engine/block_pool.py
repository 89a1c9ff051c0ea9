"""The blocks of a key/value cache: reference counts, and the prefix cache.

A block is the host's record of one page of the cache. A block that a prompt fills is indexed by a
hash of all tokens up to its end, so that a later prompt with the same beginning shares it. A block
without references stays in the prefix cache until it is evicted, least recently used first. Host
data only. Automatic prefix caching: vLLM (Kwon et al. 2023, arXiv:2309.06180).

>>> pool = BlockPool(blocks=64, size=16)
>>> pool.cached_prefix(pool.block_hashes(tuple(range(40))))  # nothing is cached yet
[]
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import blake3
import numpy as np


@dataclass(eq=False)
class Block:
    """One page. Invariant: a block without references is free, or ready and evictable.

    Attributes:
      id: its page in the cache. references: sequences that use it.
      block_hash: of the tokens up to its end, where it may be shared.
      ready: its keys and values have been computed. owner: the sequence that will compute them.
    """

    id: int
    references: int = 0
    block_hash: bytes | None = None
    ready: bool = False
    owner: object | None = None


class BlockPool:
    """All blocks of one cache, of `size` tokens each."""

    def __init__(self, blocks: int, size: int):
        self.size = size
        self._all = [Block(number) for number in range(blocks)]
        self._free = list(reversed(self._all))
        self._evictable: OrderedDict[bytes, Block] = OrderedDict()
        self._by_hash: dict[bytes, Block] = {}

    @property
    def total(self) -> int:
        """Blocks there are."""
        return len(self._all)

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def evictable(self) -> int:
        """Blocks in the prefix cache that no sequence uses; they are evicted when needed."""
        return len(self._evictable)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give."""
        return self.free + self.evictable

    def block_hashes(self, prompt: Sequence[int]) -> list[bytes]:
        """The hashes of a prompt's whole blocks, but for one that holds its last token.

        The last token is always computed: its logits are needed.
        """
        tokens = np.asarray(prompt, np.int32)
        hashes, block_hash = [], b""
        for end in range(self.size, len(prompt), self.size):
            content = tokens[end - self.size : end].tobytes()
            block_hash = blake3.blake3(block_hash + content).digest()
            hashes.append(block_hash)
        return hashes

    def cached_prefix(self, hashes: Sequence[bytes]) -> list[Block]:
        """The blocks of the longest prefix that is cached or being computed; not yet referenced."""
        blocks = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def touch(self, blocks: Sequence[Block]) -> None:
        """Adds a reference to each."""
        for block in blocks:
            block.references += 1
            if block.block_hash is not None:
                self._evictable.pop(block.block_hash, None)

    def allocate(self, count: int) -> list[Block] | None:
        """`count` empty blocks with a reference each, or None, and nothing allocated, when there
        are too few."""
        if count > self.available:
            return None
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                _, block = self._evictable.popitem(last=False)
                self._drop_hash(block)
            block.references, block.ready, block.owner = 1, False, None
            blocks.append(block)
        return blocks

    def set_hashes(self, blocks: Sequence[Block], hashes: Sequence[bytes]) -> None:
        """Indexes blocks that will hold these prefixes; a hash that is known already is left."""
        for block, block_hash in zip(blocks, hashes, strict=True):
            if block_hash not in self._by_hash and block.block_hash is None:
                block.block_hash = block_hash
                self._by_hash[block_hash] = block

    def release(self, blocks: Sequence[Block]) -> None:
        """Drops a reference from each; the last blocks of a sequence are evicted first."""
        for block in reversed(blocks):
            block.references -= 1
            if block.references:
                continue
            if block.ready and block.block_hash is not None:
                self._evictable[block.block_hash] = block
            else:
                self._drop_hash(block)
                self._free.append(block)

    def reset(self) -> None:
        """Empties the prefix cache: the weights that computed it are gone.

        Blocks in use keep their contents for the sequences that use them.
        """
        while self._evictable:
            _, block = self._evictable.popitem()
            self._drop_hash(block)
            self._free.append(block)
        for block in list(self._by_hash.values()):
            self._drop_hash(block)

    def _drop_hash(self, block: Block) -> None:
        if block.block_hash is not None:
            del self._by_hash[block.block_hash]
        block.block_hash = None
