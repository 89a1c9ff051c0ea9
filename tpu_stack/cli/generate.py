"""`tpu-stack generate`: text from a bundle, under a serving profile."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional

from tpu_stack.cli.console import print_table, save_json
from tpu_stack.cli.placement import Unprefixed
from tpu_stack.errors import UserError
from tpu_stack.sharding.placement import PlacementOptions

if TYPE_CHECKING:
    from tpu_stack.serving.bundle import Bundle
    from tpu_stack.serving.launch import Served
    from tpu_stack.serving.requests import SamplingParams

SLOTS = 64
"""At most so many prompts decode at once; the others wait."""


@dataclass(frozen=True)
class Options:
    """Continue prompts with a bundle. One prompt streams as it is decoded; several share a batch.

    Example: tpu-stack generate runs/a-int4 --prompt "def " --max-tokens 64 --temperature 0.8
    """

    bundle: Positional[Path]
    """A bundle that `tpu-stack pack` wrote."""
    prompt: tuple[str, ...]
    """One or more prompts."""
    max_tokens: int = 64
    """New tokens per prompt, at most."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Sample among the fewest likeliest tokens whose probabilities reach this sum; 1 keeps all."""
    seed: int = 0
    """Prompt number b is seeded with seed + b."""
    profile: str = "8i"
    """Serving profile, NAME[:TOPOLOGY]; counts chips. On a CPU without a topology, --mesh or
    --devices, one device is emulated."""
    json: Path | None = None
    """Also write the result to this file."""
    place: Annotated[PlacementOptions, Unprefixed] = field(default_factory=PlacementOptions)


def run(options: Options) -> None:
    """Generates, streaming to standard output."""
    result = generate(options, stream=len(options.prompt) == 1)
    if len(options.prompt) > 1:
        rows = [[repr(row["prompt"]), repr(row["text"]), row["finish"]] for row in result["rows"]]
        print_table("generated", ["prompt", "text", "finish"], rows)
    rate = result["tokens_per_s"]
    speed = f", {rate:.1f} tokens/s after the first decode step (measured)" if rate else ""
    mesh = ", ".join(f"{axis}={size}" for axis, size in result["mesh"].items())
    where = f"{result['profile']} emulated on CPU" if result["emulated"] else result["profile"]
    print(f"[{result['new_tokens']} tokens, {where}, mesh {mesh}{speed}]", file=sys.stderr)
    save_json(options.json, result)


def generate(options: Options, stream: bool) -> dict[str, Any]:
    """Loads the bundle, decodes the batch, and returns texts and speed, JSON-ready."""
    from tpu_stack.serving.generate import GenerationStats, stream_text

    sampling = _sampling(options)
    if options.max_tokens < 1:
        raise UserError(f"--max-tokens is {options.max_tokens}; it must be at least 1")
    if not options.prompt:
        raise UserError("--prompt is empty; give at least one prompt")
    bundle, served = _started(options)
    stats, texts = GenerationStats(), [""] * len(options.prompt)
    if stream:
        print(options.prompt[0], end="", flush=True)
    try:
        for row, piece in stream_text(
            served.service,
            bundle.tokenizer,
            options.prompt,
            sampling,
            max_tokens=options.max_tokens,
            chat=bundle.chat,
            stats=stats,
        ):
            texts[row] += piece
            if stream:
                print(piece, end="", flush=True)
    finally:
        served.service.close()
    if stream:
        print()
    facts = served.service.describe()
    return {
        "bundle": str(options.bundle),
        **{name: facts[name] for name in ("format", "profile", "mesh", "emulated")},
        "rows": [
            {"prompt": prompt, "text": text, "finish": finish}
            for prompt, text, finish in zip(options.prompt, texts, stats.finished, strict=True)
        ],
        "prompt_tokens": stats.prompt_tokens,
        "new_tokens": stats.new_tokens,
        "prefill_s": stats.prefill_s,
        "decode_s": stats.decode_s,
        "tokens_per_s": stats.tokens_per_s,
    }


def _sampling(options: Options) -> "SamplingParams":
    from tpu_stack.serving.requests import SamplingParams

    names = ("temperature", "top_k", "top_p", "seed")
    try:
        return SamplingParams(**{name: getattr(options, name) for name in names})
    except UserError as error:  # its first word is the field's name, and so the flag's
        name, said = str(error).split(" ", 1)
        raise UserError(f"--{name.replace('_', '-')} {said}") from None


def _started(options: Options) -> "tuple[Bundle, Served]":
    """The bundle, and an engine with slots and length for these prompts alone."""
    from tpu_stack.serving.engine_options import EngineOptions
    from tpu_stack.serving.launch import Weights, Where, start_engine

    weights = Weights.of(options.bundle)
    bundle = weights.bundle
    assert bundle is not None
    tokenizer, window = bundle.tokenizer, bundle.config.max_seq_len
    begin = len(bundle.chat.begin(tokenizer))
    longest = begin + max(len(tokenizer.encode(prompt)) for prompt in options.prompt)
    length = longest + options.max_tokens
    if length > window:
        raise UserError(
            f"{longest} prompt tokens and --max-tokens {options.max_tokens} exceed the model's"
            f" window of {window} tokens"
        )
    count = len(options.prompt)
    engine = EngineOptions(slots=min(count, SLOTS), queue=count, max_length=length)
    where = Where(profile=options.profile, place=options.place)
    return bundle, start_engine(weights, where, engine, warm_up=False)
