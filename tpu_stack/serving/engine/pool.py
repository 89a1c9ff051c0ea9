"""Which pages are whose: reference counts, and an index of prefixes that were computed before.

A page filled by a prompt is named by a hash of all tokens up to its end, so that a later prompt
with the same beginning takes it as it is. Pages nobody uses stay until they are needed, the least
recently used first to go. Host data only.

>>> pool = PagePool(pages=64, page=16)
>>> pages = pool.share(prompt) + pool.allocate(3)
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import blake3
import numpy as np


@dataclass(eq=False)
class Page:
    """One page. Invariant: a page without references is free, or ready and kept for its name.

    Attributes:
      id: its place in the cache. references: sequences that hold it.
      name: hash of the tokens up to its end, once they are meant to be shared.
      ready: its keys and values have been computed. owner: the sequence that will compute them.
    """

    id: int
    references: int = 0
    name: bytes | None = None
    ready: bool = False
    owner: object | None = None


class PagePool:
    """All pages of one cache."""

    def __init__(self, pages: int, page: int):
        self.page = page
        self._all = [Page(number) for number in range(pages)]
        self._free = list(reversed(self._all))
        self._kept: OrderedDict[bytes, Page] = OrderedDict()
        self._named: dict[bytes, Page] = {}

    @property
    def total(self) -> int:
        """Pages there are."""
        return len(self._all)

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def kept(self) -> int:
        """Pages that nobody uses, kept for their prefixes; they are given up when needed."""
        return len(self._kept)

    @property
    def available(self) -> int:
        """Pages that `allocate` can give."""
        return self.free + self.kept

    def names(self, prompt: Sequence[int]) -> list[bytes]:
        """The names of a prompt's whole pages, but for one that holds its last token.

        The last token is always computed: its logits are needed.
        """
        tokens = np.asarray(prompt, np.int32)
        names, name = [], b""
        for end in range(self.page, len(prompt), self.page):
            name = blake3.blake3(name + tokens[end - self.page : end].tobytes()).digest()
            names.append(name)
        return names

    def shared(self, names: Sequence[bytes]) -> list[Page]:
        """The pages that hold the longest known prefix, ready or being computed; not yet taken."""
        pages = []
        for name in names:
            page = self._named.get(name)
            if page is None:
                break
            pages.append(page)
        return pages

    def take(self, pages: Sequence[Page]) -> None:
        """Adds a reference to each."""
        for page in pages:
            page.references += 1
            if page.name is not None:
                self._kept.pop(page.name, None)

    def allocate(self, count: int) -> list[Page] | None:
        """`count` fresh pages with a reference each, or None, and nothing taken, when there are
        too few."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                _, page = self._kept.popitem(last=False)
                self._forget(page)
            page.references, page.ready, page.owner = 1, False, None
            pages.append(page)
        return pages

    def name(self, pages: Sequence[Page], names: Sequence[bytes]) -> None:
        """Announces that `pages` will hold these prefixes; ones known already stay unnamed."""
        for page, name in zip(pages, names, strict=True):
            if name not in self._named and page.name is None:
                page.name = name
                self._named[name] = page

    def release(self, pages: Sequence[Page]) -> None:
        """Drops a reference from each; the last pages of a sequence are given up first."""
        for page in reversed(pages):
            page.references -= 1
            if page.references:
                continue
            if page.ready and page.name is not None:
                self._kept[page.name] = page
            else:
                self._forget(page)
                self._free.append(page)

    def flush(self) -> None:
        """Forgets all prefixes: the weights that computed them are gone.

        Pages in use keep what they hold for those who hold them.
        """
        while self._kept:
            _, page = self._kept.popitem()
            self._forget(page)
            self._free.append(page)
        for page in list(self._named.values()):
            self._forget(page)

    def _forget(self, page: Page) -> None:
        if page.name is not None:
            del self._named[page.name]
        page.name = None
