"""A tokenizer, a way to chat, and a server that a module's tests share."""

from collections.abc import Iterator

import pytest
import tokenizers
from running_server import Running, serving

from tpu_stack.data.chat_format import ChatFormat
from tpu_stack.data.sources import Document
from tpu_stack.data.tokenizer import Tokenizer, build_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level, with the special tokens of ChatML."""
    text = "the quick brown fox jumps over the lazy dog. " * 20
    plain = build_tokenizer("bpe:300", [Document(text, "text")])
    backend = tokenizers.Tokenizer.from_str(plain.definition)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer.from_json(backend.to_str())


@pytest.fixture(scope="session")
def chatml(tokenizer) -> ChatFormat:
    """ChatML, which ends an answer with `<|im_end|>`."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.definition)
    end = backend.token_to_id("<|im_end|>")
    assert end is not None
    return ChatFormat(CHATML, eos_token="<|im_end|>", stop_tokens=(end,))


@pytest.fixture(scope="module")
def shared(tokenizer, chatml) -> Iterator[Running]:
    """A server that a module's tests share; they leave it as they found it."""
    with serving(tokenizer, chat=chatml) as running:
        yield running
