"""How much of the chip's HBM bandwidth a run kept busy, where the chip is known.

Counted is what has to move: every matrix once per program that ran, as it is stored, and in decode
the keys and values of the tokens before each new one. So the figure is a lower bound of what the
memory did, as "memory bandwidth utilisation" commonly is.

    hbm_utilisation(outcome, config, "int8", profile)  # 0.71
"""

from jax.numpy import dtype

from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.serving.bench.measure import Outcome
from tpu_stack.serving.layout import packed_bytes_per_device
from tpu_stack.sharding.profiles import Profile


def hbm_utilisation(
    outcome: Outcome, config: ModelConfig, format: str, profile: Profile
) -> float | None:
    """The share of the peak, of the run's whole time; None on an emulated chip, on one whose
    bandwidth is not published, or for a mixture, of which a program reads a part."""
    peak = profile.chip_facts.hbm_bytes_per_s
    if profile.emulated or peak is None or config.n_experts or format == "float32":
        return None
    per_device = float(peak.value) / profile.chip_facts.devices(1)
    return moved_bytes(outcome, config, format, profile) / (outcome.seconds * per_device)


def moved_bytes(outcome: Outcome, config: ModelConfig, format: str, profile: Profile) -> int:
    """Bytes that one device's memory had to deliver in a run, averaged over replicas."""
    before, after = outcome.before, outcome.after
    programs = after.decode_steps + after.prefill_steps - before.decode_steps - before.prefill_steps
    weights = sum(
        packed_bytes_per_device(spec, format, profile)[1]
        for spec in tensor_specs(config)
        if config.tie_embeddings or spec.name != "embed"
    )
    moved = programs * weights + _context_tokens(outcome) * _token_bytes(config, profile)
    return moved // profile.mesh.get("data", 1)  # replicas share the work


def _token_bytes(config: ModelConfig, profile: Profile) -> int:
    """Keys and values of one token in all layers, on one device."""
    shards = profile.mesh.get("tensor", 1)
    itemsize = dtype(profile.precision.cache or profile.precision.compute).itemsize
    return 2 * config.n_layers * config.n_kv_heads // shards * config.head_dim * itemsize


def _context_tokens(outcome: Outcome) -> int:
    """Tokens before each decoded one, summed."""
    total = 0
    for timing in outcome.timings:
        prompt, new = len(timing.request.prompt), len(timing.tokens)
        total += sum(prompt + i for i in range(1, new))
    return total
