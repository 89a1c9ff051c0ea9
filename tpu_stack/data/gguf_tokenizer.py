"""The tokenizer of a GGUF file's metadata, as the text of a `tokenizer.json`.

Two kinds are known. "gpt2" is a byte-level BPE with its merges; `tokenizer.ggml.pre` names how text
is cut before them, and the expressions below are those of the models' own tokenizer.json. "llama"
is a SentencePiece BPE, whose merges follow from the pieces' scores, with bytes to fall back on.

    Tokenizer.from_json(tokenizer_json(file.metadata, str(path)), str(path))
"""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from tpu_stack.errors import UserError

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


_CUTS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": _digits,
    "starcoder": _digits,
    "llama-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
}
"""tokenizer.ggml.pre -> the pre-tokenizer."""
_WHOLE_WORDS = ("llama-bpe",)
"""Those that take a word which is a token as it is, before any merge."""


def tokenizer_json(metadata: Mapping[str, Any], where: str) -> str:
    """The text of the equal tokenizer.json.

    Raises UserError for a kind, or a way of cutting text, that is not known, and for tokens, types
    and merges that do not fit one another.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UserError(f"{where} has no tokenizer (tokenizer.ggml.tokens)")
    if kind not in _KINDS:
        raise UserError(f"{where}: tokenizer.ggml.model is {kind!r}; gpt2 and llama are read")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise UserError(
            f"{where} has {len(tokens)} tokens and {len(types)} tokenizer.ggml.token_type"
        )
    try:
        backend = _KINDS[kind](metadata, tokens, where)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where}: its tokens and merges are no tokenizer: {error}") from error
    for special, wanted in ((True, _CONTROL), (False, _USER_DEFINED)):
        backend.add_tokens(
            [
                AddedToken(token, special=special, normalized=False)
                for token, type in zip(tokens, types, strict=True)
                if type == wanted
            ]
        )
    return backend.to_str()


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], where: str) -> tokenizers.Tokenizer:
    cut = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if cut not in _CUTS:
        raise UserError(f"{where}: tokenizer.ggml.pre is {cut!r}; {', '.join(_CUTS)} are read")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut in _WHOLE_WORDS)
    )
    if cut == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _CUTS[cut]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], where: str
) -> tokenizers.Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise UserError(f"{where}: tokenizer.ggml.scores are not one per token")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(vocabulary, scores),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
    unspaced: list[Any] = [
        *(decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse())
    ]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(_SPACE))
        unspaced.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(unspaced)
    return backend


def _merges(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every split of a piece into two others, the best-scored piece first; of one piece's splits,
    that of the earlier parts."""
    found = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], left, right, piece[:cut], piece[cut:]))
    found.sort(key=lambda each: each[:3])
    return [(left, right) for *_, left, right in found]


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}
