"""Log-probabilities in OpenAI's two forms: parallel lists of old, a list of objects in chat.

>>> tokens = [Placed(Token(id, logprob=-0.1), 0) for id in tokenizer.encode("is")]
>>> [entry["token"] for entry in chat_logprobs(tokenizer, tokens, top=0)["content"]]
['i', 's']
"""

import math
from collections.abc import Sequence
from typing import Any

from tpu_stack.data.tokenizer import UNKNOWN, Tokenizer
from tpu_stack.serving.text_stream import Placed

LEAST = -9999.0
"""What OpenAI's API gives for a token that is out of reach; JSON has no infinity."""


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes one token adds to the text; those of its text alone where it has no fixed ones."""
    table = tokenizer.token_bytes
    if table is not None:
        return table[token] if token < len(table) else b""
    return tokenizer.decode([token]).encode("utf-8")


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """One token as text; a part of a character as `bytes:\\xNN`, as OpenAI writes it."""
    raw = token_bytes(tokenizer, token)
    text = raw.decode("utf-8", errors="replace")
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if UNKNOWN in text else text


def _finite(logprob: float | None) -> float:
    return LEAST if logprob is None or not math.isfinite(logprob) else logprob


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[Placed], top: int, before: int = 0
) -> dict[str, Any]:
    """The lists of the completions API. `before` is the length of an echoed prompt, characters."""
    ranked = []
    for placed in tokens:
        chosen = (placed.token.token, placed.token.logprob)
        pairs = [*placed.token.top[:top], chosen]
        ranked.append({token_text(tokenizer, token): _finite(value) for token, value in pairs})
    return {
        "tokens": [token_text(tokenizer, placed.token.token) for placed in tokens],
        "token_logprobs": [_finite(placed.token.logprob) for placed in tokens],
        "top_logprobs": ranked if top else None,
        "text_offset": [before + placed.offset for placed in tokens],
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Placed], top: int) -> dict[str, Any]:
    """The list of the chat API."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        raw = token_bytes(tokenizer, token)
        return {
            "token": token_text(tokenizer, token),
            "logprob": _finite(logprob),
            "bytes": list(raw),
        }

    content = [
        entry(placed.token.token, placed.token.logprob)
        | {"top_logprobs": [entry(*pair) for pair in placed.token.top[:top]]}
        for placed in tokens
    ]
    return {"content": content, "refusal": None}
