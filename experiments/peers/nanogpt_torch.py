"""The PyTorch peer of `experiments/shakespeare_char.py`: a small GPT-2 on characters, on CPU.

It exists so that tpu_stack's training speed and quality are compared with another stack on the
same machine, in the same minutes. It follows the CPU configuration that nanoGPT's README gives for
tinyshakespeare (4 layers, 4 heads, width 128, context 64, batch 12, dropout 0, 2,000 steps of
AdamW, learning rate 1e-3 to 1e-4 on a cosine after 100 steps of warm-up, beta2 0.99, weight decay
0.1 on matrices, clipping at 1.0), eager rather than compiled. Written for this project; it needs
only torch (any Python torch supports, so 3.11 as well) and imports nothing of tpu_stack.

    python experiments/peers/nanogpt_torch.py --data plays.txt --steps 2000 --json peer.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

try:
    import torch  # type: ignore[import-not-found]
    from torch import Tensor, nn  # type: ignore[import-not-found]
    from torch.nn import functional  # type: ignore[import-not-found]
except ImportError:
    sys.exit(
        "nanogpt_torch: PyTorch is not installed for this Python; install torch (CPU is enough)"
    )


@dataclass(frozen=True)
class Config:
    """nanoGPT's CPU configuration. Sizes in tokens or elements, rates per step."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    batch: int = 12
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    clip_norm: float = 1.0


class Block(nn.Module):
    """Pre-norm causal attention, then a GELU MLP four times as wide; [B, T, D] to [B, T, D]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(
            batch, length, 3, self.heads, width // self.heads
        )
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(functional.gelu(self.mlp_in(self.norm_mlp(x))))


class CharacterGPT(nn.Module):
    """GPT-2 with learned positions and tied embeddings; token ids [B, T] to logits [B, T, V]."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, config.width)
        self.positions = nn.Parameter(torch.empty(config.context, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        # GPT-2's initialisation: 0.02, and smaller for what is added to the residual stream.
        residual_std = 0.02 / math.sqrt(2 * config.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=residual_std if residual else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.tokens.weight)


def load_characters(path: Path) -> tuple[Tensor, Tensor, int]:
    """Read text; return its first 90 % and last 10 % as ids [tokens], and the vocabulary's size."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"nanogpt_torch: cannot read --data {path}: {error}")
    characters = sorted(set(text))
    index = {character: i for i, character in enumerate(characters)}
    ids = torch.tensor([index[character] for character in text], dtype=torch.long)
    split = int(0.9 * len(ids))
    if len(ids) - split <= Config.context + 1:
        sys.exit(
            f"nanogpt_torch: --data {path} is too short: its last tenth must exceed one context"
        )
    return ids[:split], ids[split:], len(characters)


def sample_batch(ids: Tensor, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows: inputs [B, T] and the next-character targets [B, T]."""
    starts = torch.randint(len(ids) - config.context, (config.batch, 1), generator=generator)
    windows = ids[starts + torch.arange(config.context + 1)]
    return windows[:, :-1], windows[:, 1:].contiguous()


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per character."""
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, ids: Tensor, config: Config, batch: int = 128) -> float:
    """Mean nats per character over every whole window of `ids`, windows not overlapping."""
    windows = (len(ids) - 1) // config.context
    inputs = ids[: windows * config.context].view(windows, config.context)
    targets = ids[1 : windows * config.context + 1].view(windows, config.context)
    total = 0.0
    for start in range(0, windows, batch):
        rows = slice(start, start + batch)
        total += loss_of(model, inputs[rows], targets[rows]).item() * len(inputs[rows])
    return total / windows


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Linear warm-up, then a cosine from `learning_rate` to `final_learning_rate` at `steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.final_learning_rate + cosine * (config.learning_rate - config.final_learning_rate)


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings, not the norms' vectors."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


def train(data: Path, steps: int, eval_every: int, seed: int) -> dict:
    """Train and return the report; times in seconds exclude validation, except where named so."""
    config = Config()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train_ids, validation_ids, vocabulary = load_characters(data)
    began = time.perf_counter()
    model = CharacterGPT(config, vocabulary)
    optimizer = make_optimizer(model, config)
    setup_seconds = time.perf_counter() - began
    step_seconds: list[float] = []
    curve: list[dict] = []
    for step in range(steps):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config)
        loss = loss_of(model, *sample_batch(train_ids, config, generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        train_loss = loss.item()
        step_seconds.append(time.perf_counter() - start)
        last = step + 1 == steps
        if last or (eval_every and (step + 1) % eval_every == 0):
            point = {
                "step": step + 1,
                "train_loss": train_loss,
                "validation_loss": validation_loss(model, validation_ids, config),
                "train_seconds": setup_seconds + sum(step_seconds),
            }
            curve.append(point)
            print(
                f"step {point['step']:5d}  train {train_loss:.4f}"
                f"  validation {point['validation_loss']:.4f}"
                f"  {point['train_seconds']:.1f} s",
                flush=True,
            )
    median = statistics.median(step_seconds)
    return {
        "framework": f"torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "ms_per_step_median": 1e3 * median,
        "ms_per_step_mean": 1e3 * statistics.fmean(step_seconds),
        "ms_per_step_min": 1e3 * min(step_seconds),
        "tokens_per_s": config.batch * config.context / median,
        "train_seconds": setup_seconds + sum(step_seconds),
        "wall_seconds_with_validation": time.perf_counter() - began,
        "validation_loss": curve[-1]["validation_loss"],
        "curve": curve,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="a text file, e.g. tinyshakespeare.txt"
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--eval-every", type=int, default=250, help="steps between validations; 0: only last"
    )
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--json", type=Path, default=None, help="write the report here")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    report = train(arguments.data, arguments.steps, arguments.eval_every, arguments.seed)
    print(
        f"{report['framework']}, {report['threads']} threads, {report['parameters']:,} parameters: "
        f"{report['ms_per_step_median']:.1f} ms/step (median), validation loss "
        f"{report['validation_loss']:.4f}, {report['train_seconds']:.1f} s of training"
    )
    if arguments.json is not None:
        beside = arguments.json.with_name(arguments.json.name + ".part")
        beside.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(beside, arguments.json)


if __name__ == "__main__":
    main()
