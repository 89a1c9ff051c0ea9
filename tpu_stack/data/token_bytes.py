"""The bytes behind each token id, for streaming text and for counting bits per byte.

A byte-level vocabulary spells bytes as printable characters (GPT-2's table); this undoes it.

>>> b"".join(tokenizer.token_bytes[i] for i in tokenizer.encode("is short"))
b'is short'
"""

import json
from functools import cache

import tokenizers


@cache
def _byte_of_symbol() -> dict[str, int]:
    """GPT-2's spelling of the 256 bytes: printable Latin-1 stands for itself, the rest from U+0100.

    Source: `bytes_to_unicode` in openai/gpt-2, encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + index): byte for index, byte in enumerate(rest)}


def _bytes_of_piece(piece: str, byte_level: bool) -> bytes:
    symbols = _byte_of_symbol()
    if byte_level and all(symbol in symbols for symbol in piece):
        return bytes(symbols[symbol] for symbol in piece)
    return piece.encode("utf-8")


def bytes_of_tokens(backend: tokenizers.Tokenizer, vocab_size: int) -> tuple[bytes, ...] | None:
    """Returns the bytes each id in [0, vocab_size) adds to the decoded text, or None.

    Known when the decoder is `ByteLevel` (the pieces spell bytes) or `Fuse` (the pieces are the
    text). Special tokens and unused ids add nothing. Under any other decoder the bytes may depend
    on a token's neighbours: None.
    """
    decoder = (json.loads(backend.to_str())["decoder"] or {}).get("type")
    if decoder not in ("ByteLevel", "Fuse"):
        return None
    table = [b""] * vocab_size
    for piece, index in backend.get_vocab(with_added_tokens=True).items():
        table[index] = _bytes_of_piece(piece, decoder == "ByteLevel")
    for index, token in backend.get_added_tokens_decoder().items():
        if token.special:
            table[index] = b""
    return tuple(table)
