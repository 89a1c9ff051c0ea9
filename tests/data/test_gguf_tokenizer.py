"""Tokenizers of GGUF metadata: the ids of the tokenizer that the metadata were taken from."""

import json

import pytest

from tpu_stack.data.gguf_tokenizer import tokenizer_json
from tpu_stack.data.sources import Document
from tpu_stack.data.tokenizer import EOD, Tokenizer, build_tokenizer
from tpu_stack.errors import UserError

TEXT = "def f(x):\n    return x * 12345  # caf\u00e9 \u65e5\u672c\n\n" * 3


def metadata_of(tokenizer: Tokenizer, pre: str = "gpt-2") -> dict:
    """As llama.cpp's converter writes it of a byte-level BPE."""
    model = json.loads(tokenizer.to_json())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token == EOD else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
    }


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return build_tokenizer("bpe:300", [Document(TEXT, "text")])


def test_a_byte_level_bpe_gives_the_same_ids(trained):
    found = Tokenizer.from_json(tokenizer_json(metadata_of(trained), "it"))
    for text in (TEXT, " hello  world\t", f"a {EOD} b", "\U0001f600"):
        assert found.encode(text) == trained.encode(text)
        assert found.decode(found.encode(text)) == text
    assert found.special_ids == trained.special_ids


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["ab", " ", "1", "2", "3", "4", " c"]),
        ("llama-bpe", ["ab", " ", "123", "4", " c"]),
        ("qwen2", ["ab", " ", "1", "2", "3", "4", " c"]),
    ],
)
def test_text_is_cut_as_the_model_learnt_it(pre, pieces):
    """Merges of everything within each piece would be the pieces."""
    whole = build_tokenizer("bpe:400", [Document("ab 1234 c " * 99, "text")])
    metadata = metadata_of(whole, pre)
    backend = Tokenizer.from_json(tokenizer_json(metadata, "it"))._backend
    cut = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("ab 1234 c")]  # type: ignore[union-attr]
    assert [piece.replace("\u0120", " ") for piece in cut] == pieces


def test_a_sentencepiece_bpe_falls_back_on_bytes():
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["\u2581", "h", "i", "\u2581h", "hi", "\u2581hi"]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -2.0, -1.0, -3.0]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 6],
        "tokenizer.ggml.unknown_token_id": 0,
    }
    found = Tokenizer.from_json(tokenizer_json(metadata, "it"))
    space, whole = tokens.index("\u2581"), tokens.index("\u2581hi")
    # "hi" scores above "\u2581h" and is merged first; then with the space before it.
    assert found.encode("hi hi") == [whole, whole]
    assert found.encode("\u00e9") == [space, 3 + 0xC3, 3 + 0xA9]
    assert found.decode(found.encode("hi \u00e9hi")) == "hi \u00e9hi"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'; gpt2 and llama"),
        ({"tokenizer.ggml.pre": "poro"}, "tokenizer.ggml.pre is 'poro'; gpt-2, smollm"),
        ({"tokenizer.ggml.tokens": None}, "has no tokenizer"),
        ({"tokenizer.ggml.token_type": [1]}, "tokens and 1 tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.merges": ["never seen"]}, "its tokens and merges are no tokenizer"),
        ({"tokenizer.ggml.model": "llama"}, "scores are not one per token"),
    ],
)
def test_what_is_not_read_is_named(trained, changed, said):
    with pytest.raises(UserError, match=said):
        tokenizer_json({**metadata_of(trained), **changed}, "model.gguf")
