"""A published model as it lies on a disk: a Hugging Face folder or a GGUF file.

published = Published.open(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
published.model.config.n_layers  # 30
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu_stack.data.chat_format import ChatFormat
from tpu_stack.data.gguf_tokenizer import tokenizer_json
from tpu_stack.data.tokenizer import Tokenizer
from tpu_stack.errors import UserError
from tpu_stack.models.gguf.model import GgufModel
from tpu_stack.models.hf.folder import CONFIG, HuggingFaceFolder
from tpu_stack.serving.chat_files import read_chat

TOKENIZER = "tokenizer.json"
_SMALL_FILES = (
    *(CONFIG, TOKENIZER, "tokenizer_config.json", "generation_config.json"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True)
class Published:
    """An opened model with its texts.

    Attributes:
      dtypes: how many tensors are stored in each dtype or type.
      tensor_dtypes: by Hugging Face name, for an export in the same dtypes; {} of a GGUF file.
      small_files: the folder's files besides weights, which an export copies.
    """

    model: HuggingFaceFolder | GgufModel
    tokenizer: Tokenizer
    chat: ChatFormat
    dtypes: Mapping[str, int]
    tensor_dtypes: Mapping[str, str]
    small_files: tuple[Path, ...]

    @classmethod
    def open(cls, path: Path) -> "Published":
        """Opens a folder, or a file as GGUF.

        Raises UserError where the model, its tokenizer or its chat format cannot be read.
        """
        opened = _open_gguf(path) if path.is_file() else _open_folder(path)
        vocabulary = opened.model.config.vocab_size
        if opened.tokenizer.vocab_size > vocabulary:
            raise UserError(
                f"{path}: its tokenizer has {opened.tokenizer.vocab_size} ids, more than the"
                f" model's {vocabulary}"
            )
        return opened


def _open_folder(path: Path) -> Published:
    model = HuggingFaceFolder.open(path)
    tokenizer = _tokenizer(path)
    tensor_dtypes = {name: tensor.dtype for name, tensor in model.tensors.items()}
    small = tuple(path / name for name in _SMALL_FILES if (path / name).is_file())
    return Published(
        model,
        tokenizer,
        read_chat(path, tokenizer),
        dict(Counter(tensor_dtypes.values())),
        tensor_dtypes,
        small,
    )


def _tokenizer(path: Path) -> Tokenizer:
    try:
        text = (path / TOKENIZER).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} has no {TOKENIZER}; other tokenizer files are not read") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path / TOKENIZER} is not UTF-8 text") from error
    return Tokenizer.from_json(text, str(path / TOKENIZER))


def _open_gguf(path: Path) -> Published:
    model = GgufModel.open(path)
    metadata = model.file.metadata
    where = f"the tokenizer of {path}"
    tokenizer = Tokenizer.from_json(tokenizer_json(metadata, str(path)), where)
    chat = chat_of_metadata(metadata, str(path))
    return Published(model, tokenizer, chat, model.dtypes, {}, ())


_ENDS = ("eos", "eot", "eom")


def chat_of_metadata(metadata: Mapping[str, Any], where: str) -> ChatFormat:
    """What GGUF metadata say of conversations: the template, and what begins and ends a text.

    Raises UserError for an id beyond the tokens.
    """
    tokens = metadata["tokenizer.ggml.tokens"]

    def token(kind: str) -> int | None:
        index = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if index is not None and not 0 <= index < len(tokens):
            raise UserError(
                f"{where}: tokenizer.ggml.{kind}_token_id is {index}; it has {len(tokens)} tokens"
            )
        return index

    bos, eos = token("bos"), token("eos")
    sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"  # begins with bos if not told
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", sentencepiece)
    return ChatFormat(
        metadata.get("tokenizer.chat_template"),
        None if bos is None else tokens[bos],
        None if eos is None else tokens[eos],
        tuple(end for end in map(token, _ENDS) if end is not None),
        bool(add_bos) and bos is not None,
    )
