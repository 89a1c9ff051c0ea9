"""Rollouts in process beside `serve bench` on the same engine, by turns; and how exact they are.

    python experiments/rollout.py                       # the demo's model, random weights in int4
    python experiments/rollout.py runs/demo/bundle-int4

Hardware: any; the demo's model on two CPU cores takes two minutes. Cost: none. Expected result:
a rollout of 512 short requests, with log-probabilities, brings at least the tokens per second of
the closed loop of `serve bench`. The second table has the largest difference of any token's
log-probability from `models.forward` on the same weights: with float32 activations the order of
additions alone, with bfloat16 ones the rounding of activations, which a pass in chunks does
elsewhere than a whole one.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from tpu_stack.cli.console import print_table, save_json
from tpu_stack.models.decoder import forward
from tpu_stack.models.presets import get_preset
from tpu_stack.serving.bench.measure import closed_loop
from tpu_stack.serving.bench.workload import LengthMix, make_requests
from tpu_stack.serving.client import Completions, rollout
from tpu_stack.serving.engine_options import EngineOptions
from tpu_stack.serving.launch import Weights, Where, start_engine
from tpu_stack.serving.requests import GenerationRequest, SamplingParams

DTYPES = ("float32", "bfloat16")
SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, seed=1)


@dataclass(frozen=True)
class Options:
    """What to run."""

    bundle: tyro.conf.Positional[Path | None] = None
    """A bundle; the default is the demo's model with random weights in int4."""
    requests: int = 512
    """Requests of a turn."""
    lengths: str = "16-64:16-32"
    """Mix of lengths in tokens, as `serve bench` takes it."""
    slots: int = 8
    """Requests that decode at once; the closed loop has as many streams."""
    turns: int = 3
    """How often each is run; the median counts."""
    formats: tuple[str, ...] = ("float32", "bf16", "int8", "int4")
    """Formats, with random weights of the bundle's shape, whose log-probabilities are compared."""
    json: Path | None = None
    """Also write the result to this file."""


def main(options: Options) -> None:
    """Measures and prints two tables."""
    speed = by_turns(options)
    rows = [
        [name, f"{median(speed[name]):,.0f}", ", ".join(f"{rate:,.0f}" for rate in speed[name])]
        for name in ("serve bench", "rollout")
    ]
    ratio = median(speed["rollout"]) / median(speed["serve bench"])
    title = f"{options.requests} requests of {options.lengths}: {ratio:.2f}x (measured, this CPU)"
    print_table(title, ["how", "new tokens/s", "turns"], rows)
    model = model_of(options).config
    found = {name: {dtype: difference(model, name, dtype) for dtype in DTYPES}
             for name in options.formats}  # fmt: skip
    rows = [[name, *(f"{each[dtype]:.1e}" for dtype in DTYPES)] for name, each in found.items()]
    title = "largest difference of a log-probability from models.forward, by activations"
    print_table(title, ["weights", *DTYPES], rows)
    save_json(options.json, {"new_tokens_per_s": speed, "ratio": ratio, "differences": found})


def model_of(options: Options) -> Weights:
    """What is served."""
    if options.bundle is not None:
        return Weights.of(options.bundle)
    return Weights(get_preset("nano"), "int4")


def by_turns(options: Options) -> dict[str, list[float]]:
    """New tokens per second of every turn; prompts are new in each, so no prefix is cached."""
    weights, mix = model_of(options), LengthMix.parse(options.lengths)
    served = start_engine(weights, Where(), EngineOptions(slots=options.slots))
    service = served.service
    speed: dict[str, list[float]] = {"serve bench": [], "rollout": []}
    try:
        for turn in range(2 * options.turns):
            requests = make_requests(
                mix,
                count=options.requests,
                vocab_size=service.vocab_size,
                max_length=service.max_length,
                seed=0,
                run=turn,
            )
            if turn % 2 == 0:
                outcome = closed_loop(service, requests, options.slots)
                speed["serve bench"].append(outcome.report()["new_tokens_per_s"])
            else:
                started = time.perf_counter()
                found = rollout(service, requests)
                seconds = time.perf_counter() - started
                speed["rollout"].append(float(found.lengths.sum()) / seconds)
    finally:
        service.close()
    return speed


def difference(config: Any, format: str, dtype: Any) -> float:
    """Of 16 sampled completions and 16 greedy ones of random prompts, on random weights."""
    weights = Weights(config, format)
    options = EngineOptions(max_length=128, dtype=dtype)
    served = start_engine(weights, Where(), options, warm_up=False)
    mix = LengthMix.parse("8-64:32")
    vocab = served.service.vocab_size
    requests = make_requests(mix, count=32, vocab_size=vocab, max_length=128, seed=0)
    requests = [
        GenerationRequest(each.prompt, each.max_tokens, SAMPLED if row % 2 else SamplingParams())
        for row, each in enumerate(requests)
    ]
    try:
        found = rollout(served.service, requests)
    finally:
        served.service.close()
    profile, mesh = served.places[-1]
    params = weights.load(profile, mesh)
    run = jax.jit(lambda params, tokens: forward(config, params, tokens, dtype=jnp.dtype(dtype)))
    return max(_difference(run, params, each.prompt, found, row)
               for row, each in enumerate(requests))  # fmt: skip


def _difference(run: Any, params: Any, prompt: Any, found: Completions, row: int) -> float:
    tokens = found.tokens[row, : found.lengths[row]]
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(prompt) + len(tokens)] = [*prompt, *tokens]
    logprobs = np.asarray(jax.nn.log_softmax(run(params, padded)[0].astype(jnp.float32)))
    want = logprobs[len(prompt) - 1 + np.arange(len(tokens)), tokens]
    return float(np.abs(found.model_logprobs[row, : len(tokens)] - want).max())


if __name__ == "__main__":
    main(tyro.cli(Options))
