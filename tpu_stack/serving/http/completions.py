"""`/v1/completions`: plain prompts, as text or as token ids, one or many.

`best_of` beyond `n`, `suffix` and the log-probabilities of an echoed prompt are not supported, and
are refused rather than ignored.

    reply = read_completion(host, parse_body(raw))
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
from tpu_stack.serving.http.parameters import Common, read_common
from tpu_stack.serving.http.token_text import completion_logprobs
from tpu_stack.serving.requests import GenerationRequest

DEFAULT_TOKENS = 16
MAX_TOP = 5


@dataclass(frozen=True)
class CompletionFormat:
    """Writes OpenAI's `text_completion` objects. `echoed` is the prompt of each choice."""

    model: Model
    top: int | None
    echoed: tuple[str, ...] = ()
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[Update], usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        echoed = [replace(one, text=self._echo(one.index) + one.text) for one in choices]
        return self._object([self._choice(one) for one in echoed]) | {"usage": usage_json(usage)}

    def openings(self, choices: int) -> list[dict[str, Any]]:
        """A chunk with each choice's prompt, where it is echoed."""
        if not self.echoed:
            return []
        return [self.chunk(Update(index, self._echo(index))) for index in range(choices)]

    def chunk(self, update: Update) -> dict[str, Any]:
        """New text of a choice."""
        return self._object([self._choice(update)]) | self._no_usage()

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Counts, and no choice."""
        return self._object([]) | {"usage": usage_json(usage)}

    def _no_usage(self) -> dict[str, Any]:
        return {"usage": None} if self.include_usage else {}

    def _echo(self, index: int) -> str:
        return self.echoed[index] if self.echoed else ""

    def _choice(self, update: Update) -> dict[str, Any]:
        logprobs = None
        if self.top is not None:
            before = len(self._echo(update.index))
            logprobs = completion_logprobs(self.model.tokenizer, update.tokens, self.top, before)
        return {
            "index": update.index,
            "text": update.text,
            "logprobs": logprobs,
            "finish_reason": update.finish,
        }

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.id,
            "choices": choices,
        }


def read_completion(host: Host, body: dict[str, Any]) -> Reply:
    """What a body asks for. Raises ApiError naming the field that is wrong."""
    fields, model = Fields(body), host.model
    model.check_id(fields.require("model"))
    common = read_common(fields, model.service.vocab_size)
    top = fields.integer("logprobs", None, low=0, high=MAX_TOP)
    wanted = fields.integer("max_tokens", None, low=1, high=2**31 - 1)
    prompts = _prompts(fields.take("prompt"), model)
    echo = fields.typed("echo", bool, False)
    if echo and top is not None:
        message = "'logprobs' of an echoed prompt are not supported by this server."
        raise invalid("logprobs", message, "unsupported_value")
    fields.refuse("best_of", common.n)
    fields.refuse("suffix", "")
    fields.finish()
    if len(prompts) * common.n > host.limits.choices:
        message = f"{len(prompts)} prompts times n = {common.n} exceed {host.limits.choices}."
        raise invalid("prompt", f"Invalid 'prompt': {message}", "array_above_max_length")
    requests, echoed = _requests(host, common, prompts, wanted, top)
    form = CompletionFormat(model, top, echoed if echo else (), common.include_usage)
    return Reply(requests, common.stops, form, common.stream, common.include_usage)


def _requests(
    host: Host,
    common: Common,
    prompts: list[tuple[str | None, tuple[int, ...]]],
    wanted: int | None,
    top: int | None,
) -> tuple[list[GenerationRequest], tuple[str, ...]]:
    """A request for each choice, and the prompt's text beside it."""
    model = host.model
    requests, echoed = [], []
    for text, ids in prompts:
        room = model.room(len(ids), wanted, DEFAULT_TOKENS, host.limits.output_tokens)
        for _ in range(common.n):
            sampling = replace(common.seeded(len(requests)), logprobs=top)
            requests.append(
                GenerationRequest(
                    ids,
                    max_tokens=room,
                    sampling=sampling,
                    stop_tokens=model.stop_tokens,
                    priority=common.priority,
                    client=common.user,
                    deadline_s=common.deadline_s,
                )
            )
            echoed.append(model.tokenizer.decode(ids) if text is None else text)
    return requests, tuple(echoed)


def _prompts(raw: Any, model: Model) -> list[tuple[str | None, tuple[int, ...]]]:
    """(text, ids) of each prompt; text is None where ids were given.

    As in OpenAI's API an absent prompt is the start of a document.
    """
    if raw is None:
        return [("", (model.tokenizer.eod_id,))]
    if isinstance(raw, str):
        return [_encoded(raw, model)]
    if not isinstance(raw, list):
        raise wrong_type("prompt", "a string or an array", raw)
    if not raw:
        raise invalid("prompt", "Invalid 'prompt': the array is empty.", "empty_array")
    if all(isinstance(item, str) for item in raw):
        return [_encoded(item, model) for item in raw]
    if type(raw[0]) is int:
        return [(None, _token_ids(raw, model))]
    if all(isinstance(item, list) for item in raw):
        return [(None, _token_ids(item, model)) for item in raw]
    message = "Invalid type for 'prompt': expected strings, token ids or arrays of token ids,"
    raise invalid("prompt", f"{message} and not a mixture.", "invalid_type")


def _encoded(text: str, model: Model) -> tuple[str, tuple[int, ...]]:
    ids = model.encode_prompt(text)
    return text, ids or (model.tokenizer.eod_id,)


def _token_ids(raw: list[Any], model: Model) -> tuple[int, ...]:
    if not raw:
        raise invalid("prompt", "Invalid 'prompt': an array of token ids is empty.", "empty_array")
    size = model.service.vocab_size
    for token in raw:
        if type(token) is not int:
            raise wrong_type("prompt", "an array of token ids", token)
        if not 0 <= token < size:
            raise invalid("prompt", f"Invalid 'prompt': token ids lie in 0 to {size - 1}.")
    return tuple(raw)
