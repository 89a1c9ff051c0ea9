"""How a model expects a conversation to be written: its chat template and its special tokens.

A tokenizer turns text into ids; a chat format turns messages into that text. A run folder and a
bundle hold it as `chat.json`. A model that was not trained to chat has none: the empty format.

>>> ChatFormat.from_json(ChatFormat(eos_token="<|im_end|>").to_json()).eos_token
'<|im_end|>'
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import blake3

from tpu_stack.data.tokenizer import Tokenizer
from tpu_stack.errors import UserError

CHAT = "chat.json"

_TYPES: dict[str, tuple[type, ...]] = {
    "chat_template": (str, type(None)),
    "bos_token": (str, type(None)),
    "eos_token": (str, type(None)),
    "stop_tokens": (list, tuple),
    "add_bos": (bool,),
}


@dataclass(frozen=True)
class ChatFormat:
    """What turns messages into a prompt, and what ends the answer. All empty by default.

    Attributes:
      chat_template: Jinja text over `messages`, `bos_token`, `eos_token`, `add_generation_prompt`,
        as `transformers` defines it; None where the model has none.
      bos_token, eos_token: the text of the tokens that begin and end a sequence.
      stop_tokens: ids that end a generation, besides the tokenizer's own end of a document.
      add_bos: whether a plain prompt begins with `bos_token`. A chat template writes its own.
    """

    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    stop_tokens: tuple[int, ...] = ()
    add_bos: bool = False

    def begin(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids before a plain prompt: the token that begins a sequence, or none."""
        begins = self.add_bos and self.bos_token in tokenizer.special_ids
        return (tokenizer.special_ids[str(self.bos_token)],) if begins else ()

    def ends(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The ids that end an answer: the format's stop tokens and the end of a document."""
        return frozenset({tokenizer.eod_id, *self.stop_tokens})

    def to_json(self) -> str:
        """Indented JSON; `from_json` of it equals this format."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def digest(self) -> str:
        """The BLAKE3 hash (64 hexadecimal digits) of `to_json()` as UTF-8."""
        return blake3.blake3(self.to_json().encode("utf-8")).hexdigest()

    @classmethod
    def from_json(cls, text: str, where: str = CHAT) -> "ChatFormat":
        """The inverse of `to_json`; missing fields are empty. Raises UserError for other JSON."""
        try:
            body = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise UserError(f"{where} is not a JSON object")
        unknown = sorted(set(body) - {field.name for field in fields(cls)})
        if unknown:
            raise UserError(f"{where} has unknown fields {unknown}; known: {', '.join(_TYPES)}")
        for name, value in body.items():
            if not isinstance(value, _TYPES[name]):
                raise UserError(f"{where}: {name} cannot be {value!r}")
        body["stop_tokens"] = _ids(body.get("stop_tokens", ()), where)
        return cls(**body)

    @classmethod
    def read(cls, folder: Path) -> "ChatFormat":
        """The format in `folder`'s chat.json, the empty one where there is no such file.

        Raises UserError when the file is no chat format.
        """
        path = folder / CHAT
        if not path.is_file():
            return cls()
        return cls.from_json(path.read_text(encoding="utf-8", errors="replace"), str(path))


def _ids(values: Any, where: str) -> tuple[int, ...]:
    for value in values:
        if type(value) is not int or value < 0:
            raise UserError(f"{where}: stop_tokens holds {value!r}, which is no token id")
    return tuple(values)
