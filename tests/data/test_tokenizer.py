"""Tokenizers: lossless, deterministic, safe against special tokens in text."""

import json
from functools import cache

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from tpu_stack.data.sources import Document, default_corpus
from tpu_stack.data.split import limit_bytes
from tpu_stack.data.stream_decoder import StreamDecoder
from tpu_stack.data.tokenizer import EOD, Tokenizer, build_tokenizer
from tpu_stack.errors import UserError


@cache
def bpe() -> Tokenizer:
    return build_tokenizer("bpe:400", limit_bytes(default_corpus(), 100_000, 0))


@cache
def chars() -> Tokenizer:
    return build_tokenizer("chars", [Document("hello wörld\n", "a"), Document("🙂", "b")])


@cache
def sentencepiece_like() -> Tokenizer:
    """A tokenizer in Gemma's form: `▁` for spaces, bytes for what the vocabulary lacks."""
    letters = ["▁", "h", "e", "l", "o", "he", "▁he"]
    pieces = ["<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[("h", "e"), ("▁", "he")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<eos>", "<unk>"])
    return Tokenizer.from_json(backend.to_str())


SPECIAL_TEXT = st.sampled_from(
    [EOD, "<|", "é", "🙂", "\r\n", "  ", "def f(x):\n\t", "\x00", "\ufffd"]
)
TEXT = st.lists(st.one_of(SPECIAL_TEXT, st.text()), max_size=6).map("".join)


@given(TEXT)
def test_bpe_round_trips_any_text(text):
    ids = bpe().encode(text)
    assert bpe().decode(ids) == text
    assert bpe().eod_id not in ids
    assert all(0 <= token < bpe().vocab_size for token in ids)
    assert sum(bpe().byte_length(token) for token in ids) == len(text.encode())


@given(st.text(alphabet="helo wörd\n🙂"))
def test_chars_round_trip_their_alphabet(text):
    ids = chars().encode(text)
    assert len(ids) == len(text)
    assert chars().decode(ids) == text
    assert sum(chars().byte_length(token) for token in ids) == len(text.encode())


def test_chars_vocabulary_is_sorted_with_unknown_and_end_last():
    assert chars().encode("\n dehlorwö🙂") == list(range(11))
    assert chars().vocab_size == 13
    assert chars().eod_id == 12
    assert chars().decode(chars().encode("hexe")) == "he\ufffde"
    assert chars().encode("xx") == chars().encode("\ufffd\ufffd") == [11, 11]


@pytest.mark.parametrize("make", [bpe, chars, sentencepiece_like])
def test_json_round_trip_and_digest(make):
    tokenizer = make()
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again == tokenizer
    assert hash(again) == hash(tokenizer)
    assert again.digest() == tokenizer.digest()
    assert again.encode("hello") == tokenizer.encode("hello")
    assert len({bpe().digest(), chars().digest(), sentencepiece_like().digest()}) == 3


@pytest.mark.parametrize("make", [bpe, chars, sentencepiece_like])
def test_batch_equals_one_by_one(make):
    texts = ["hello", "", "hello wörld 🙂"]
    assert make().encode_batch(texts) == [make().encode(text) for text in texts]


def test_special_tokens_in_text_are_text_and_vanish_from_decoding():
    ids = bpe().encode("a" + EOD)
    assert bpe().eod_id not in ids
    assert bpe().decode(ids) == "a" + EOD
    assert bpe().decode([*bpe().encode("a"), bpe().eod_id, *bpe().encode("b")]) == "ab"


def test_training_is_deterministic_and_reaches_the_size():
    documents = limit_bytes(default_corpus(), 100_000, 0)
    assert build_tokenizer("bpe:400", documents) == bpe()
    assert bpe().vocab_size == 400
    assert build_tokenizer("bpe:5000", [Document("aaaa", "a")]).vocab_size < 300


def test_any_tokenizer_json_loads_without_its_truncation_and_padding(tmp_path):
    definition = json.loads(bpe().to_json())
    definition["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    definition["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": EOD,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition, indent=1))
    for spec in (tmp_path / "tokenizer.json", tmp_path):
        loaded = build_tokenizer(str(spec), [])
        assert loaded == bpe()
        assert len(loaded.encode("a long sentence, longer than three tokens")) > 9


def test_end_of_document_is_found_by_its_usual_names():
    assert sentencepiece_like().eod_id == 0
    nameless = bpe().to_json().replace(EOD, "<|mystery|>")
    with pytest.raises(UserError, match=r"x\.json has no token that ends a document; it needs one"):
        Tokenizer.from_json(nameless, "x.json")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpe", "write bpe:N with N a number"),
        ("bpe:many", "write bpe:N with N a number"),
        ("bpe:-5", "write bpe:N with N a number"),
        ("bpe:256", "bpe:256 is too small: 257 entries hold the 256 bytes"),
        ("charz", "'charz' is not chars, bpe:N or a tokenizer.json that can be read"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(UserError, match=message):
        build_tokenizer(spec, [Document("text", "a")])


def test_bad_files_and_missing_text(tmp_path):
    path = tmp_path / "t.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"t\.json is not a tokenizer\.json"):
        build_tokenizer(str(path), [])
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"t\.json is not UTF-8"):
        build_tokenizer(str(path), [])
    for spec in ("chars", "bpe:400"):
        with pytest.raises(UserError, match="is built from training text, and there is none"):
            build_tokenizer(spec, [])


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.feed(token) for token in ids), decoder.flush()]


@given(TEXT)
def test_streaming_text_never_shows_half_a_character(text):
    pieces = stream(bpe(), bpe().encode(text))
    assert "".join(pieces) == text
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


@given(st.lists(st.integers(0, 420), max_size=30))
def test_streaming_any_ids_equals_decoding_them(ids):
    assert "".join(stream(bpe(), ids)) == bpe().decode(ids)
    assert "".join(stream(chars(), ids)) == chars().decode(ids)


def test_streaming_holds_back_exactly_the_open_character():
    ids = bpe().encode("🙂")
    assert len(ids) == 4
    assert stream(bpe(), ids) == ["", "", "", "🙂", ""]
    assert stream(bpe(), ids[:3]) == ["", "", "", "\ufffd"]
    assert stream(chars(), chars().encode("xh")) == ["\ufffd", "h", ""]


@given(st.text(alphabet="helo 🙂éx"))
def test_streaming_through_a_window_for_other_decoders(text):
    tokenizer = sentencepiece_like()
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert tokenizer.token_bytes is None
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(tokenizer.byte_length(token) for token in ids) == len(text.encode())


def test_a_window_does_not_wait_for_ever():
    broken = [2 + 0xFF] * 50
    decoder = StreamDecoder(sentencepiece_like())
    assert any(decoder.feed(token) for token in broken)
