"""Messages to the ids a chat model was taught, with no message able to forge a special token.

The template is the model's own Jinja text, run in a sandbox with the functions that `transformers`
gives it. A model without one gets `DEFAULT_TEMPLATE`. Where a message spells a special token, an
unguessable mark is put inside the spelling before the template runs; what the rendered text still
spells is the template's own, and only that becomes special tokens.

    ChatTemplate(tokenizer, chat).encode([{"role": "user", "content": "Hello"}])
"""

import datetime
import json
import re
import secrets
from collections.abc import Sequence
from typing import Any, Never

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tpu_stack.data.chat_format import ChatFormat
from tpu_stack.data.tokenizer import Tokenizer
from tpu_stack.errors import UserError
from tpu_stack.serving.http.errors import ApiError

DEFAULT_TEMPLATE = """\
{% for message in messages %}
{{ message.role | capitalize }}: {{ message.content | trim }}

{% endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}"""
"""For a model that was never taught to chat: a transcript. It ends where the user would speak."""
DEFAULT_STOPS = ("\nUser:",)


def _raise_exception(message: str) -> Never:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Without Jinja's escaping for HTML, as in `transformers`."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def compile_template(text: str) -> jinja2.Template:
    """The template with the filters and functions of `transformers`' chat_template_utils.

    Raises UserError when it is not Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    # `{% generation %}` marks training targets; serving drops the tags.
    text = re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", text)
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the bundle's chat template is not Jinja: {error}") from error


class ChatTemplate:
    """A compiled template and what it needs to know of the tokenizer. Immutable after creation."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatFormat):
        self._tokenizer, self._chat = tokenizer, chat
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.definition)
        self._template = compile_template(chat.chat_template or DEFAULT_TEMPLATE)
        self._special = tokenizer.special_ids
        longest_first = sorted(self._special, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self._finder = re.compile(f"({pattern})")
        self._spelled = re.compile(f"(?={pattern})")
        cuts = [
            (token[:size], token[size:]) for token in self._special for size in range(1, len(token))
        ]
        self._heads = tuple({head for head, _ in cuts})
        self._tails = tuple({tail for _, tail in cuts})
        self.stops = () if chat.chat_template else DEFAULT_STOPS

    def encode(self, messages: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        """The ids of a conversation and of the opening of the answer.

        Raises ApiError 400 when the template refuses the messages.
        """
        mark = f"\ue000{secrets.token_hex(16)}\ue001"
        guarded = [
            {key: value if key == "role" else self._guard(value, mark)
             for key, value in message.items()}
            for message in messages
        ]  # fmt: skip
        try:
            text = self._template.render(
                messages=guarded,
                tools=None,
                documents=None,
                bos_token=self._chat.bos_token or "",
                eos_token=self._chat.eos_token or "",
                add_generation_prompt=True,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            message = f"The model's chat template refuses these messages: {error}"
            raise ApiError(400, message, param="messages", code="invalid_value") from error
        prefix = () if self._chat.chat_template else self._chat.begin(self._tokenizer)
        return (*prefix, *self._ids(text, mark))

    def _ids(self, text: str, mark: str) -> list[int]:
        if mark not in text:
            ids = self._backend.encode(text, add_special_tokens=False).ids
            meant = [self._special[found] for found in self._finder.findall(text)]
            special = set(self._special.values())
            if [token for token in ids if token in special] == meant:
                return ids
            # A normalizer turned other characters into a special token: piece by piece, then.
        restore = re.compile(re.escape(mark) + "([0-9a-f]*);")
        ids = []
        for piece in self._finder.split(text):
            if piece in self._special:
                ids.append(self._special[piece])
            elif piece:
                plain = restore.sub(lambda m: chr(int(m[1], 16)) if m[1] else "", piece)
                ids += self._tokenizer.encode(plain)
        return ids

    def _guard(self, text: str, mark: str) -> str:
        """`text` with a mark within every special token it spells, and at an edge that could
        complete one with its neighbour."""
        starts = {match.start() for match in self._spelled.finditer(text)}
        guarded = "".join(
            f"{mark}{ord(char):x};" if at in starts else char for at, char in enumerate(text)
        )
        if text.startswith(self._tails):
            guarded = f"{mark};{guarded}"
        if text.endswith(self._heads):
            guarded = f"{guarded}{mark};"
        return guarded
