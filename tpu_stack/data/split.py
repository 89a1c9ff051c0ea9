"""Which text is trained on, which is held out, and which is left out of a smaller run.

Both choices depend on the documents, the settings and the seed alone, so every process and every
resumed run makes the same ones.

>>> parts = split_documents(documents, val_fraction=0.1, mode="auto")
>>> len(parts.train), len(parts.val), parts.mode
(19, 2, 'contiguous')
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tpu_stack.data.sources import Document
from tpu_stack.errors import UserError

SplitMode = Literal["auto", "documents", "contiguous"]

# Below this many documents a split by hash is too coarse to come near the fraction asked for.
_AUTO_LEAST_DOCUMENTS = 20


@dataclass(frozen=True)
class DocumentSplit:
    """Training and validation documents, in corpus order; together they are the whole corpus.

    `mode` is how they were told apart: "documents" or "contiguous", never "auto".
    """

    train: tuple[Document, ...]
    val: tuple[Document, ...]
    mode: SplitMode


def _fraction_of(key: str) -> float:
    """Maps a name to a fixed number in [0, 1): the same on every machine, in every run."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53


def split_documents(
    documents: Sequence[Document], val_fraction: float, mode: SplitMode = "auto"
) -> DocumentSplit:
    """Holds out about `val_fraction` of the corpus for validation.

    "documents" holds out each document whose name hashes below the fraction, so a document keeps
    its side when others are added. "contiguous" holds out the end of the concatenated text, counted
    in characters (nanoGPT's 90/10); the document that the cut falls in is divided. "auto" takes
    "documents" for a corpus of at least 20 documents of which some fall on each side, and
    "contiguous" otherwise: a single document is always cut.

    Raises UserError for a fraction outside [0, 1], an unknown mode, or a fraction strictly between
    0 and 1 that leaves one side without a document.
    """
    if not 0.0 <= val_fraction <= 1.0:
        raise UserError(f"the validation fraction is {val_fraction}; it must lie in 0 to 1")
    if mode not in ("auto", "documents", "contiguous"):
        raise UserError(f"unknown split {mode!r}: use auto, documents or contiguous")
    if mode != "contiguous":
        parts = _by_document(documents, val_fraction)
        fits = len(documents) >= _AUTO_LEAST_DOCUMENTS and parts.train and parts.val
        if mode == "documents" or fits:
            return _checked(parts, val_fraction)
    return _checked(_by_position(documents, val_fraction), val_fraction)


def _checked(parts: DocumentSplit, val_fraction: float) -> DocumentSplit:
    if 0.0 < val_fraction < 1.0 and not (parts.train and parts.val):
        empty = "training" if parts.val else "validation"
        raise UserError(
            f"the {empty} split is empty: a {parts.mode} split with validation fraction "
            f"{val_fraction} puts {len(parts.train)} documents in training and {len(parts.val)} "
            f"in validation; use a contiguous split, another fraction or more text"
        )
    return parts


def _by_document(documents: Sequence[Document], val_fraction: float) -> DocumentSplit:
    held_out = [_fraction_of(document.name) < val_fraction for document in documents]
    return DocumentSplit(
        tuple(d for d, out in zip(documents, held_out, strict=True) if not out),
        tuple(d for d, out in zip(documents, held_out, strict=True) if out),
        "documents",
    )


def _by_position(documents: Sequence[Document], val_fraction: float) -> DocumentSplit:
    left = int(sum(len(document.text) for document in documents) * (1.0 - val_fraction))
    train: list[Document] = []
    val: list[Document] = []
    for document in documents:
        head, tail = document.text[:left], document.text[left:]
        if head:
            train.append(Document(head, document.name))
        if tail:
            val.append(Document(tail, document.name))
        left -= len(head)
    return DocumentSplit(tuple(train), tuple(val), "contiguous")


def limit_bytes(documents: Sequence[Document], max_bytes: int, seed: int) -> list[Document]:
    """Chooses documents by `seed` up to `max_bytes` of UTF-8 text; returns them in corpus order.

    The choice fills the budget exactly (to a character): the document that would overrun it is cut
    there. A corpus that fits is returned whole. Raises UserError unless `max_bytes` is positive.
    """
    if max_bytes <= 0:
        raise UserError(f"max_bytes is {max_bytes}; it must be positive")
    ranked = sorted(
        range(len(documents)), key=lambda i: (_fraction_of(f"{seed}:{documents[i].name}"), i)
    )
    chosen: dict[int, Document] = {}
    for index in ranked:
        document = documents[index]
        encoded = document.text.encode("utf-8")
        if len(encoded) > max_bytes:
            cut = encoded[:max_bytes].decode("utf-8", "ignore")
            if cut:
                chosen[index] = Document(cut, document.name)
            break
        chosen[index] = document
        max_bytes -= len(encoded)
    return [chosen[index] for index in sorted(chosen)]
