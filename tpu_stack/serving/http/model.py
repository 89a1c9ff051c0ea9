"""The one model that a server offers: its name, its tokenizer, its way to chat, and its engine.

Example:
    model = Model("a-int4", service, tokenizer, ChatFormat())
"""

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tpu_stack.data.chat_format import ChatFormat
from tpu_stack.data.tokenizer import Tokenizer
from tpu_stack.serving.http.chat_template import ChatTemplate
from tpu_stack.serving.http.errors import ApiError
from tpu_stack.serving.http.fields import invalid
from tpu_stack.serving.service import Service


@dataclass(frozen=True)
class Model:
    """What answers; `created` is in seconds since 1970."""

    id: str
    service: Service
    tokenizer: Tokenizer
    chat: ChatFormat = field(default_factory=ChatFormat)
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def template(self) -> ChatTemplate:
        """The compiled chat template."""
        return ChatTemplate(self.tokenizer, self.chat)

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """What ends an answer."""
        return self.chat.ends(self.tokenizer)

    def check_id(self, wanted: Any) -> None:
        """Raises ApiError 404 when a client asks for another model."""
        if not isinstance(wanted, str):
            raise invalid("model", "Invalid type for 'model': expected a string.", "invalid_type")
        if wanted != self.id:
            message = f"The model `{wanted[:100]}` does not exist; this server has `{self.id}`."
            raise ApiError(404, message, param="model", code="model_not_found")

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        """A plain prompt's ids, begun as the model expects."""
        return (*self.chat.begin(self.tokenizer), *self.tokenizer.encode(text))

    def room(
        self, prompt: int, wanted: int | None, default: int, limit: int, param: str = "prompt"
    ) -> int:
        """How many tokens may follow a prompt.

        Args: prompt: its tokens; wanted: asked for, None for `default` or what fits; limit: the
          server's own bound; param: the field that holds the prompt.
        Raises ApiError 400 when the prompt or the sum does not fit the window.
        """
        window = self.service.max_length
        least = 1 if wanted is None else wanted
        if prompt + least > window:
            message = f"This model's maximum context length is {window} tokens, and you asked for"
            message += f" {prompt + least} tokens ({prompt} in the prompt, {least} to come)."
            raise invalid(param, message, "context_length_exceeded")
        if least > limit:
            message = (
                f"Invalid 'max_tokens': this server gives {limit} tokens at most, not {least}."
            )
            raise invalid("max_tokens", message, "integer_above_max_value")
        return wanted if wanted is not None else min(default, window - prompt, limit)

    def to_json(self) -> dict[str, Any]:
        """OpenAI's model object."""
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "tpu-stack",
            "max_model_len": self.service.max_length,
        }
