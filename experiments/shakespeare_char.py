"""Characters of tinyshakespeare, nanoGPT's CPU configuration, trained by this project's own loop.

4 layers, 4 heads, width 128, context 64, batch 12, 2,000 steps, on one CPU device, in float32.
Hardware: any CPU. Cost: about 75 seconds on two cores. Expected: validation loss (the last tenth
of the file, all of it) of at most 1.80 after 2,000 steps; nanoGPT's README gives 1.88.

    python experiments/shakespeare_char.py --data tinyshakespeare.txt --json result.json
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import tyro

from tpu_stack.data.pipeline import DataConfig, load_corpus
from tpu_stack.errors import UserError
from tpu_stack.files import write_json
from tpu_stack.models.config import ModelConfig
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile
from tpu_stack.training.config import TrainConfig
from tpu_stack.training.run import Job, train
from tpu_stack.training.trainer import Hook

TARGET_LOSS = 1.886
"""Validation loss that nanoGPT reaches after its 2,000 steps; how long until it is recorded."""


@dataclass(frozen=True)
class Options:
    """Train nanoGPT's CPU configuration on a text and report loss, speed and time to the target."""

    data: Path
    """tinyshakespeare.txt, or any text."""
    steps: int = 2000
    """Optimizer steps."""
    optimizer: str = "adamw"
    """adamw; muon needs about a third fewer steps at over twice the time each."""
    learning_rate: float = 4e-3
    """Peak learning rate."""
    devices: int = 1
    """Virtual CPU devices, the batch split over them; XLA:CPU keeps one busy with one core."""
    eval_every: int = 50
    """Steps between evaluations on the whole validation split; their time is not counted."""
    json: Path | None = None
    """Also write the result to this file."""


def run(options: Options) -> dict[str, Any]:
    """Trains and returns the result in JSON-ready fields."""
    started = time.perf_counter()
    jax.config.update("jax_num_cpu_devices", options.devices)
    data = DataConfig(paths=(str(options.data),), tokenizer="chars", seq_len=64, batch_size=12)
    corpus = load_corpus(data)
    config = ModelConfig(
        vocab_size=corpus.tokenizer.vocab_size,
        d_model=128,
        n_layers=4,
        n_heads=4,
        n_kv_heads=4,
        head_dim=32,
        d_ff=344,  # three matrices of 344 hold what nanoGPT's two of 512 do
        tie_embeddings=True,
    )
    settings = TrainConfig(
        steps=options.steps,
        batch_size=12,
        seq_len=64,
        optimizer=options.optimizer,  # type: ignore[arg-type]
        learning_rate=options.learning_rate,
        warmup_steps=50,
        b2=0.99,
        schedule="linear",
        decay_steps=options.steps,
        final_lr_ratio=0.02,
        compute_dtype="float32",
        remat="none",
        unroll=4,
        eval_every=options.eval_every,
        eval_batches=0,
    )
    profile = get_profile("8t").emulate(options.devices).with_mesh(f"data={options.devices}")
    job = Job(config, settings, profile, make_mesh(profile.mesh), corpus, data)
    clock = Clock(started)
    result = train(job, hooks=[clock])
    curve = clock.curve
    reached = next((point for point in curve if point["val_loss"] <= TARGET_LOSS), None)
    rate = result.tokens_per_s
    return {
        "steps": options.steps,
        "validation_loss": result.evaluations[-1][1].loss,
        "ms_per_step": None if rate is None else 1e3 * 12 * 64 / rate,
        "tokens_per_s": rate,
        "compile_s": result.compile_s,
        "seconds_to_target": reached and reached["seconds"],
        "step_of_target": reached and reached["step"],
        "target": TARGET_LOSS,
        "curve": curve,
        "devices": options.devices,
        "device": jax.devices()[0].device_kind,
        "rung": "5 measured, on this CPU",
    }


class Clock(Hook):
    """Validation losses with the time they were reached, set-up and compiling included.

    Evaluations are taken out: while one runs, the trainer's clock stands still.
    """

    def __init__(self, started: float):
        self.curve: list[dict[str, float]] = []
        self._started = started
        self._set_up_s = 0.0

    def on_start(self, trainer) -> None:
        self._set_up_s = time.perf_counter() - self._started

    def on_evaluation(self, trainer, found) -> None:
        seconds = self._set_up_s + trainer.clock.running_s
        self.curve.append({"step": trainer.step, "seconds": seconds, "val_loss": found.loss})
        print(f"step {trainer.step:5d}  {seconds:6.1f} s  validation {found.loss:.4f}", flush=True)


def main() -> int:
    """The command line."""
    options = tyro.cli(Options)
    try:
        result = run(options)
    except UserError as error:
        print(f"shakespeare_char: error: {error}", file=sys.stderr)
        return 2
    summary = {name: value for name, value in result.items() if name != "curve"}
    print(json.dumps(summary, indent=1))
    if options.json:
        write_json(options.json, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
