"""The sampling fields that completions and chat share, from JSON to what the engine understands.

OpenAI's fields keep OpenAI's meaning, bounds and defaults (temperature 1). Five extensions go
beyond it: `top_k`, `min_p`, `repetition_penalty`, `priority` (lower goes first) and `deadline_s`
(seconds after which the request is given up). Fields that OpenAI knows and that cannot change an
answer here (`metadata`, `service_tier`, ...) are ignored; those that would (`tools`, `suffix`, ...)
are refused, and so is an unknown field.

    common = read_common(Fields(body), vocab_size=256)
"""

import secrets
from dataclasses import dataclass, replace

from tpu_stack.serving.http.fields import Fields, invalid, wrong_type
from tpu_stack.serving.requests import MAX_BIASES, SamplingParams

MAX_STOPS = 4
MAX_N = 128
MAX_PRIORITY = 100
_SEEDS = 2**32
_INT64 = 2**63
_IGNORED = (
    *("metadata", "service_tier", "safety_identifier", "prompt_cache_key", "store"),
    *("prompt_cache_retention", "verbosity"),
)


@dataclass(frozen=True)
class Common:
    """What an answer of either kind is asked to be.

    Attributes:
      n: choices per prompt. stops: strings that end one.
      user: whose request it is, for fairness between clients.
      include_usage: whether a stream ends in a chunk of token counts.
    """

    sampling: SamplingParams
    n: int = 1
    stops: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    user: str = ""
    priority: int = 0
    deadline_s: float | None = None

    def seeded(self, number: int) -> SamplingParams:
        """The sampling of choice `number`: the same request with the next seed."""
        return replace(self.sampling, seed=(self.sampling.seed + number) % _SEEDS)


def read_common(fields: Fields, vocab_size: int) -> Common:
    """Takes the shared fields, logprobs excepted. Raises ApiError naming a wrong one."""
    seed = fields.integer("seed", None, low=-_INT64, high=_INT64 - 1)
    sampling = SamplingParams(
        temperature=fields.number("temperature", 1.0, low=0, high=2),
        top_p=_top_p(fields),
        top_k=fields.integer("top_k", 0, low=0, high=2**31 - 1),
        min_p=fields.number("min_p", 0.0, low=0, high=1),
        repetition_penalty=fields.number("repetition_penalty", 1.0, low=0.01, high=100),
        presence_penalty=fields.number("presence_penalty", 0.0, low=-2, high=2),
        frequency_penalty=fields.number("frequency_penalty", 0.0, low=-2, high=2),
        logit_bias=_logit_bias(fields, vocab_size),
        seed=secrets.randbelow(_SEEDS) if seed is None else seed % _SEEDS,
    )
    stream = fields.typed("stream", bool, False)
    common = Common(
        sampling,
        n=fields.integer("n", 1, low=1, high=MAX_N),
        stops=_stops(fields),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        user=fields.typed("user", str, "")[:256],
        priority=fields.integer("priority", 0, low=-MAX_PRIORITY, high=MAX_PRIORITY),
        deadline_s=fields.number("deadline_s", None, low=1e-3, high=86400),
    )
    fields.ignore(*_IGNORED)
    return common


def _top_p(fields: Fields) -> float:
    """0 is legal in OpenAI's API and keeps the likeliest token, as the least positive one does."""
    return max(fields.number("top_p", 1.0, low=0, high=1), 1e-6)


def _logit_bias(fields: Fields, vocab_size: int) -> dict[int, float]:
    raw = fields.typed("logit_bias", dict, {})
    if len(raw) > MAX_BIASES:
        raise invalid("logit_bias", f"'logit_bias' has {len(raw)} tokens; at most {MAX_BIASES}.")
    entries = Fields(raw, prefix="logit_bias.")
    biases = {}
    for key in raw:
        known = key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size
        if not known:
            message = f"Invalid 'logit_bias': {key[:40]!r} is no token id under {vocab_size}."
            raise invalid("logit_bias", message)
        biases[int(key)] = entries.number(key, 0.0, low=-100, high=100)
    return biases


def _stops(fields: Fields) -> tuple[str, ...]:
    raw = fields.take("stop")
    values = [raw] if isinstance(raw, str) else ([] if raw is None else raw)
    if not isinstance(values, list):
        raise wrong_type("stop", "a string or an array of strings", raw)
    for value in values:
        if not isinstance(value, str):
            raise wrong_type("stop", "an array of strings", value)
    if len(values) > MAX_STOPS:
        message = f"Invalid 'stop': {len(values)} strings; at most {MAX_STOPS} are allowed."
        raise invalid("stop", message, "array_above_max_length")
    if any(len(value) > 1024 for value in values):
        raise invalid("stop", "Invalid 'stop': a string is longer than 1024 characters.")
    return tuple(value for value in values if value)


def _include_usage(fields: Fields, stream: bool) -> bool:
    raw = fields.typed("stream_options", dict, {})
    if raw and not stream:
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise invalid("stream_options", message)
    inner = Fields(raw, prefix="stream_options.")
    wanted = inner.typed("include_usage", bool, False)
    inner.ignore("include_obfuscation")
    inner.finish()
    return wanted
