"""A model under a profile as the simulator's jobs, and what its times mean: rates, cost, energy.

Times come with the constants fitted to published results (`planner.backtest`), so they are rung 4:
projected, for every chip.

    constants, profile = Calibration.load().full.train, get_profile("v5p:4x8x8")
    simulate_train(get_preset("llama3_70b"), profile, constants, batch=512, seq_len=8192)
"""

from typing import Any

from tpu_stack.hardware.chips import Chip
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.flops import train_flops_per_token
from tpu_stack.planner.simulate.architecture import Architecture
from tpu_stack.planner.simulate.constants import Constants, ServeConstants
from tpu_stack.planner.simulate.decode import ServeJob, decode_step, prefill_seconds
from tpu_stack.planner.simulate.layout import AXES, Layout
from tpu_stack.planner.simulate.remat import Remat
from tpu_stack.planner.simulate.train import TrainJob, train_step
from tpu_stack.quant.formats import get_format
from tpu_stack.sharding.profiles import Profile

_REMAT = {"none": "none", "dots": "minimal", "full": "full"}


def layout_of(profile: Profile) -> Layout:
    """The profile's mesh as the simulator takes it. Raises UserError where it fills no whole chips.

    A profile without a topology is as many chips as its mesh has devices for.
    """
    chip = profile.chip_facts
    chips = profile.chips or max(1, profile.devices // chip.devices(1))
    axes = {axis: profile.mesh.get(axis, 1) for axis in AXES}
    return Layout(
        chip, chips, 1, axes["data"], axes["fsdp"], axes["context"], axes["expert"], axes["tensor"]
    )


def train_job(
    config: ModelConfig, profile: Profile, *, batch: int, seq_len: int, accumulate: int = 1
) -> TrainJob:
    """The train step of `batch` sequences of `seq_len` tokens over all devices."""
    return TrainJob(
        Architecture.of(config),
        layout_of(profile),
        batch,
        seq_len,
        remat=Remat.parse(_REMAT[profile.remat]),
        microbatches=accumulate,
    )


def serve_job(config: ModelConfig, profile: Profile, format: str) -> ServeJob:
    """The model with its weights stored in `format`, scales and all; products run in bfloat16."""
    cache = profile.precision.cache or profile.precision.compute
    return ServeJob(
        Architecture.of(config),
        layout_of(profile),
        cache="bf16" if cache == "bfloat16" else "fp8",
        bits_per_weight=get_format(format).bits_per_weight(),
    )


def simulate_train(
    config: ModelConfig,
    profile: Profile,
    constants: Constants,
    *,
    batch: int,
    seq_len: int,
    accumulate: int = 1,
) -> dict[str, Any]:
    """Seconds of a train step by term, tokens per second and chip, MFU (causal attention counted
    once, recompute not), dollars and energy. JSON-ready."""
    job = train_job(config, profile, batch=batch, seq_len=seq_len, accumulate=accumulate)
    step, chip = train_step(job, constants), job.layout.chip
    rate = step.tokens_per_s_per_chip
    flops = train_flops_per_token(config, seq_len)
    return {
        "step_s": step.step_s,
        "terms_s": step.terms,
        "tokens_per_step": batch * seq_len,
        "tokens_per_s": rate * job.layout.chips,
        "tokens_per_s_per_chip": rate,
        "mfu": rate * flops / chip.require("bf16_flops_per_s"),
        **economics(chip, rate),
    }


def simulate_decode(
    job: ServeJob,
    constants: Constants,
    serving: ServeConstants,
    *,
    batch: int,
    context: int,
) -> dict[str, Any]:
    """Seconds of a decode step by term, its rates, dollars and energy. JSON-ready."""
    terms = decode_step(job, batch, context, constants, serving)
    step_s = sum(terms.values())
    rate = batch / step_s / job.layout.chips
    return {
        "batch": batch,
        "step_s": step_s,
        "terms_s": terms,
        "tokens_per_s": batch / step_s,
        "tokens_per_s_per_chip": rate,
        **economics(job.layout.chip, rate),
    }


def simulate_prefill(
    job: ServeJob, constants: Constants, serving: ServeConstants, *, prompt: int
) -> dict[str, float]:
    """Seconds until one prompt of one replica is through, and prompt tokens a second per chip."""
    seconds = prefill_seconds(job, prompt, prompt, constants, share=serving.prefill)
    return {
        "prompt": prompt,
        "seconds": seconds,
        "tokens_per_s_per_chip": prompt / seconds / job.chips_per_replica,
    }


def economics(chip: Chip, tokens_per_s_per_chip: float) -> dict[str, float | str | None]:
    """Dollars per million tokens where a price is known, and what is known of energy.

    `energy_vs_7x`: the published performance per watt over 7x's. Joules are not given: no source
    has the power of these chips.
    """
    price, energy = chip.price_usd_per_hour, chip.perf_per_watt_vs_7x
    per_million = None
    if price:
        per_million = price.number / 3600 / tokens_per_s_per_chip * 1e6
    return {
        "usd_per_million_tokens": per_million,
        "usd_per_chip_hour": price.number if price else None,
        "perf_per_watt_vs_7x": energy.number if energy else None,
    }
