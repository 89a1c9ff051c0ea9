"""A model's ChatFormat from the small files of a Hugging Face folder.

The chat template lies in chat_template.jinja (transformers 5) or in tokenizer_config.json; what
ends an answer in generation_config.json, else in config.json.

    read_chat(Path("Qwen3-0.6B"), tokenizer).eos_token  # '<|im_end|>'
"""

from pathlib import Path
from typing import Any

import tokenizers

from tpu_stack.data.chat_format import ChatFormat
from tpu_stack.data.tokenizer import Tokenizer
from tpu_stack.errors import UserError
from tpu_stack.models.hf.folder import CONFIG, read_json


def read_chat(folder: Path, tokenizer: Tokenizer) -> ChatFormat:
    """What the folder says of conversations; empty fields where it says nothing.

    Raises UserError for a file that is not what its name says.
    """
    told = _optional(folder, "tokenizer_config.json")
    special = _optional(folder, "special_tokens_map.json")
    bos = _token(told.get("bos_token", special.get("bos_token")))
    eos = _token(told.get("eos_token", special.get("eos_token")))
    add_bos = told.get("add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = _begins_with(tokenizer, bos)
    stops = _optional(folder, "generation_config.json").get("eos_token_id")
    if stops is None:
        config = _optional(folder, CONFIG)
        stops = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    listed = stops if isinstance(stops, list) else [] if stops is None else [stops]
    ids = [token for token in listed if type(token) is int and token >= 0]
    return ChatFormat(_template(folder, told), bos, eos, tuple(ids), add_bos and bos is not None)


def _optional(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        return {}
    found = read_json(folder / name)
    if not isinstance(found, dict):
        raise UserError(f"{folder / name} is not a JSON object")
    return found


def _template(folder: Path, told: dict[str, Any]) -> str | None:
    """The template as text; of several named ones (tool use, RAG) the one called default."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    template = told.get(
        "chat_template", _optional(folder, "chat_template.json").get("chat_template")
    )
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token(told: Any) -> str | None:
    """A special token's text: older files wrap it in an object."""
    text = told.get("content") if isinstance(told, dict) else told
    return text if isinstance(text, str) else None


def _begins_with(tokenizer: Tokenizer, bos: str | None) -> bool:
    """Whether the tokenizer's own post-processing puts `bos` before a text."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    first = backend.encode("a", add_special_tokens=True).tokens[:1]
    return bos is not None and first == [bos]
