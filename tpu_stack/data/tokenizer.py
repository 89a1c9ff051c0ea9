"""Text to token ids and back, as one immutable value that checkpoints and bundles store.

>>> tokenizer = build_tokenizer("bpe:4096", documents)
>>> tokenizer.decode(tokenizer.encode("def f(x):"))
'def f(x):'
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import blake3
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tpu_stack.data.sources import Document
from tpu_stack.data.token_bytes import bytes_of_tokens
from tpu_stack.errors import UserError

EOD = "<|eod|>"
UNKNOWN = "\ufffd"

# Names that published tokenizers give to the end of a document, in order of preference.
_EOD_NAMES = (
    *(EOD, "<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>"),
    *("<\uff5cend\u2581of\u2581sentence\uff5c>", "<|eos|>", "[EOS]", "<EOS>", "<eod>"),
)
_BYTE_SYMBOLS = 256


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, defined wholly by the text of its `tokenizer.json`.

    Invariants: every id lies in [0, vocab_size). Text never encodes to a special token: a document
    that spells `<|eod|>` gets ordinary tokens, so no text can end a document early. Encoding adds
    no special tokens and neither truncates nor pads. Equal definitions are equal tokenizers.

    Build one with `build_tokenizer` or `Tokenizer.from_json`, which bring the definition into its
    canonical form.
    """

    definition: str

    @classmethod
    def from_json(cls, text: str, where: str = "the tokenizer") -> "Tokenizer":
        """Reads the text of any `tokenizer.json`; `where` names it in errors.

        Raises UserError when it is no tokenizer or has no token that ends a document.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{where} is not a tokenizer.json: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        tokenizer = cls(backend.to_str())
        if tokenizer._eod_name is None:
            raise UserError(
                f"{where} has no token that ends a document; it needs one of {' '.join(_EOD_NAMES)}"
            )
        return tokenizer

    def to_json(self) -> str:
        """Returns the `tokenizer.json` text; `from_json` of it equals this tokenizer."""
        return self.definition

    def digest(self) -> str:
        """Returns the BLAKE3 hash (64 hexadecimal digits) of `to_json()` as UTF-8."""
        return blake3.blake3(self.definition.encode("utf-8")).hexdigest()

    @cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self.definition)
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def _eod_name(self) -> str | None:
        known = self._backend.get_vocab(with_added_tokens=True)
        return next((name for name in _EOD_NAMES if name in known), None)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added and special tokens included."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def eod_id(self) -> int:
        """The id that separates documents and ends a generation."""
        return self._backend.get_vocab(with_added_tokens=True)[self._eod_name or EOD]

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Text -> id of the special tokens, to which no text encodes."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...] | None:
        """The bytes each id stands for, where decoding is plain concatenation of those bytes.

        So it is for byte-level and character tokenizers; None for any other, where the bytes may
        depend on neighbouring tokens. Special tokens stand for no bytes.
        """
        return bytes_of_tokens(self._backend, self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; a character outside a `chars` vocabulary gets U+FFFD's id."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode` of each text, computed on all CPU cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`. Special and unknown ids add nothing; broken UTF-8 U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def byte_length(self, token: int) -> int:
        """Returns how many UTF-8 bytes one id stands for: exact where `token_bytes` is known.

        Elsewhere it is the length of the id decoded alone, one byte for a `<0xNN>` token.
        """
        if self.token_bytes is not None:
            return len(self.token_bytes[token])
        piece = self._backend.id_to_token(token) or ""
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return 1
        return len(self.decode([token]).encode("utf-8"))


def build_tokenizer(spec: str, documents: Sequence[Document]) -> Tokenizer:
    """Builds or loads the tokenizer that `spec` names.

    Args:
      spec: `chars` for every character of `documents` in code-point order, then U+FFFD for unknown
        ones, then the end of a document; `bpe:N` for a byte-level BPE (Sennrich et al. 2016, over
        bytes as in GPT-2) of at most N entries, N >= 257, trained on `documents`, with fewer where
        the text is too small; or the path of a `tokenizer.json`, or of a folder that holds one. The
        same documents in the same order give the same tokenizer.
      documents: the training text; not used where `spec` is a path.
    Raises UserError for a malformed `spec`, a missing or damaged file, or no text to build from.
    """
    kind, colon, argument = spec.partition(":")
    if spec == "chars":
        return _build_chars(_texts(spec, documents))
    if kind == "bpe":
        if not (colon and argument.isascii() and argument.isdigit()):
            raise UserError(f"tokenizer {spec!r}: write bpe:N with N a number, as in bpe:4096")
        return _train_bpe(int(argument), _texts(spec, documents))
    path = Path(spec) / "tokenizer.json" if Path(spec).is_dir() else Path(spec)
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(
            f"tokenizer {spec!r} is not chars, bpe:N or a tokenizer.json that can be read "
            f"({error.strerror})"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer {path} is not UTF-8 text") from error
    return Tokenizer.from_json(text, str(path))


def _texts(spec: str, documents: Sequence[Document]) -> list[str]:
    if not documents:
        raise UserError(f"tokenizer {spec!r} is built from training text, and there is none")
    return [document.text for document in documents]


def _build_chars(texts: list[str]) -> Tokenizer:
    characters = sorted(set().union(*texts) - {UNKNOWN})
    vocabulary = {character: index for index, character in enumerate([*characters, UNKNOWN])}
    # A BPE without merges splits into characters natively, faster than any pre-tokenizer would.
    model = models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, fuse_unk=False)
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([EOD])
    return Tokenizer.from_json(backend.to_str())


def _train_bpe(entries: int, texts: list[str]) -> Tokenizer:
    least = _BYTE_SYMBOLS + 1
    if entries < least:
        raise UserError(
            f"tokenizer bpe:{entries} is too small: {least} entries hold the 256 bytes and {EOD}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[EOD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer.from_json(backend.to_str())
