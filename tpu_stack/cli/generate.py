"""`tpu-stack generate`: text from a bundle, under a serving profile."""

import sys
from dataclasses import dataclass, field
from math import lcm
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from tpu_stack.cli.console import print_table, save_json
from tpu_stack.cli.placement import PlacementOptions, Unprefixed, place
from tpu_stack.errors import UserError

CPU_ROWS = 8
"""XLA:CPU multiplies batches under eight ten times slower, so batches are padded to it."""


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
    """Tokens to write per prompt, at most."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this total probability."""
    seed: int = 0
    """Prompt number b is seeded with seed + b."""
    profile: str = "8i"
    """Serving profile, NAME[:TOPOLOGY]; counts chips."""
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
    """Loads the bundle, decodes the batch, and returns texts and speed in JSON-ready fields."""
    from tpu_stack.planner.tensors import with_groups
    from tpu_stack.serving.bundle import Bundle
    from tpu_stack.serving.engine import Engine
    from tpu_stack.serving.generate import GenerationStats, Request, stream_text

    request = Request(
        options.max_tokens, options.temperature, options.top_k, options.top_p, options.seed
    )
    if not options.prompt:
        raise UserError("--prompt is empty; give at least one prompt")
    bundle = Bundle.open(options.bundle)
    tokenizer, config, chat = bundle.tokenizer, bundle.config, bundle.chat
    begin = len(chat.begin(tokenizer))
    longest = begin + max(len(tokenizer.encode(prompt)) for prompt in options.prompt)
    length = longest + options.max_tokens
    if length > config.max_seq_len:
        raise UserError(
            f"{longest} prompt tokens and --max-tokens {options.max_tokens} exceed the model's"
            f" {config.max_seq_len}"
        )
    profile, mesh = place(
        options.profile, "serve", options.place, with_groups(config, bundle.manifest.format)
    )
    multiple = lcm(profile.mesh["data"], CPU_ROWS if profile.emulated else 1)
    batch = -(-len(options.prompt) // multiple) * multiple
    engine = Engine(
        config, bundle.load(profile, mesh), profile, mesh, batch=batch, length=-(-length // 64) * 64
    )
    stats = GenerationStats()
    texts = [""] * len(options.prompt)
    if stream:
        print(options.prompt[0], end="", flush=True)
    for row, piece in stream_text(engine, tokenizer, options.prompt, request, stats, chat):
        texts[row] += piece
        if stream:
            print(piece, end="", flush=True)
    if stream:
        print()
    return {
        "bundle": str(options.bundle),
        "format": bundle.manifest.format,
        "profile": profile.name,
        "mesh": dict(profile.mesh),
        "emulated": profile.emulated,
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
