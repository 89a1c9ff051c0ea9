"""`/v1/chat/completions`: a conversation of text, written as the model's chat template has it.

Tools, images, audio and forced response formats are not supported, and are refused.

    reply = read_chat(host, parse_body(raw))
"""

import time
from dataclasses import dataclass, field, replace
from secrets import token_hex
from typing import Any

from tpu_stack.serving.http.answer import Reply, usage_json
from tpu_stack.serving.http.call import Update, Usage
from tpu_stack.serving.http.fields import Fields, invalid, wrong_type
from tpu_stack.serving.http.host import Host
from tpu_stack.serving.http.model import Model
from tpu_stack.serving.http.parameters import read_common
from tpu_stack.serving.http.token_text import chat_logprobs
from tpu_stack.serving.requests import MAX_LOGPROBS, GenerationRequest

ROLES = ("system", "developer", "user", "assistant")
MAX_MESSAGES = 2048
_UNSUPPORTED = (
    *("tools", "functions", "audio", "prediction", "web_search_options", "reasoning_effort"),
    *("tool_choice", "function_call", "parallel_tool_calls", "modalities", "moderation"),
)


@dataclass(frozen=True)
class ChatFormat:
    """Writes OpenAI's `chat.completion` and `chat.completion.chunk` objects."""

    model: Model
    top: int | None
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[Update], usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        written = [
            {
                "index": one.index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": self._logprobs(one),
                "finish_reason": one.finish,
            }
            for one in choices
        ]
        return self._object("chat.completion", written) | {"usage": usage_json(usage)}

    def openings(self, choices: int) -> list[dict[str, Any]]:
        """A chunk that names each choice's role."""
        delta = {"role": "assistant", "content": ""}
        return [self._delta(index, delta) for index in range(choices)]

    def chunk(self, update: Update) -> dict[str, Any]:
        """New text of a choice."""
        delta = {"content": update.text} if update.text or update.tokens else {}
        return self._delta(update.index, delta, self._logprobs(update), update.finish)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Counts, and no choice."""
        return self._object("chat.completion.chunk", []) | {"usage": usage_json(usage)}

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self.include_usage else {}
        return self._object("chat.completion.chunk", [choice]) | usage

    def _logprobs(self, update: Update) -> dict[str, Any] | None:
        if self.top is None:
            return None
        return chat_logprobs(self.model.tokenizer, update.tokens, self.top)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.id,
            "choices": choices,
        }


def read_chat(host: Host, body: dict[str, Any]) -> Reply:
    """What a body asks for. Raises ApiError naming the field that is wrong."""
    fields, model = Fields(body), host.model
    model.check_id(fields.require("model"))
    common = read_common(fields, model.service.vocab_size)
    messages = _messages(fields.require("messages"))
    top = _top_logprobs(fields)
    old = fields.integer("max_tokens", None, low=1, high=2**31 - 1)
    wanted = fields.integer("max_completion_tokens", old, low=1, high=2**31 - 1)
    fields.refuse("response_format", {"type": "text"})
    _refuse_unsupported(fields)
    fields.finish()
    if common.n > host.limits.choices:
        raise invalid("n", f"Invalid 'n': at most {host.limits.choices} choices are given.")
    ids = model.template.encode(messages)
    if not ids:
        raise invalid("messages", "Invalid 'messages': the chat template makes no prompt of them.")
    limit = host.limits.output_tokens
    room = model.room(len(ids), wanted, limit, limit, "messages")
    requests = [
        GenerationRequest(
            ids,
            max_tokens=room,
            sampling=replace(common.seeded(number), logprobs=top),
            stop_tokens=model.stop_tokens,
            priority=common.priority,
            client=common.user,
            deadline_s=common.deadline_s,
        )
        for number in range(common.n)
    ]
    stops = (*common.stops, *model.template.stops)
    form = ChatFormat(model, top, common.include_usage)
    return Reply(requests, stops, form, common.stream, common.include_usage)


def _refuse_unsupported(fields: Fields) -> None:
    harmless = {"tools": [[]], "functions": [[]], "tool_choice": ["none", "auto"]}
    harmless |= {"function_call": ["none", "auto"], "parallel_tool_calls": [True, False]}
    harmless |= {"modalities": [["text"]]}
    for name in _UNSUPPORTED:
        fields.refuse(name, *harmless.get(name, ()))


def _top_logprobs(fields: Fields) -> int | None:
    wanted = fields.typed("logprobs", bool, False)
    top = fields.integer("top_logprobs", None, low=0, high=MAX_LOGPROBS)
    if top is not None and not wanted:
        message = "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled."
        raise invalid("top_logprobs", message)
    return (top or 0) if wanted else None


def _messages(raw: Any) -> list[dict[str, Any]]:
    if not isinstance(raw, list):
        raise wrong_type("messages", "an array of objects", raw)
    if not raw:
        raise invalid("messages", "Invalid 'messages': the array is empty.", "empty_array")
    if len(raw) > MAX_MESSAGES:
        message = f"Invalid 'messages': {len(raw)} messages; at most {MAX_MESSAGES}."
        raise invalid("messages", message, "array_above_max_length")
    return [_message(number, item) for number, item in enumerate(raw)]


def _message(number: int, raw: Any) -> dict[str, Any]:
    path = f"messages[{number}]"
    if not isinstance(raw, dict):
        raise wrong_type(path, "an object", raw)
    fields = Fields(raw, prefix=f"{path}.")
    role = fields.require("role")
    if role not in ROLES:
        known = ", ".join(f"'{name}'" for name in ROLES)
        message = f"Invalid value: {str(role)[:40]!r}. Supported values are: {known}."
        raise invalid(f"{path}.role", message)
    role = "system" if role == "developer" else role
    message = {"role": role, "content": _content(fields.require("content"), f"{path}.content")}
    name = fields.typed("name", str, "")
    if name:
        message["name"] = name
    for unsupported in ("tool_calls", "tool_call_id", "function_call", "audio"):
        fields.refuse(unsupported, [])
    fields.refuse("refusal")
    fields.ignore("annotations")
    fields.finish()
    return message


def _content(raw: Any, path: str) -> str:
    """A message's text; parts of kind "text" are joined."""
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, list):
        raise wrong_type(path, "a string or an array of parts", raw)
    texts = []
    for number, part in enumerate(raw):
        where = f"{path}[{number}]"
        if not isinstance(part, dict):
            raise wrong_type(where, "an object", part)
        if part.get("type") != "text":
            message = f"Invalid value: {str(part.get('type'))[:40]!r}. This model reads text only."
            raise invalid(f"{where}.type", message)
        if not isinstance(part.get("text"), str):
            raise wrong_type(f"{where}.text", "a string", part.get("text"))
        texts.append(part["text"])
    return "".join(texts)
