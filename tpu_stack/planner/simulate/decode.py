"""The time of one decode step, term by term, and of a prompt's prefill.

A decode step reads every weight it needs once and the cache of every sequence, multiplies a few
rows, and adds up partial results over the tensor axis twice a layer. Products hide behind the
reading of their weights, imperfectly: the two count as the root of their sum of squares, of
which "compute" is what it has over the weights alone. The other terms are added.

    job = ServeJob(architecture, Layout(get_chip("v5e"), 16, tensor=16))
    decode_step(job, batch=8, context=2048, constants=constants, serving=serving)
"""

from dataclasses import dataclass
from math import hypot, log, sqrt

from tpu_stack.planner.simulate.architecture import Architecture
from tpu_stack.planner.simulate.constants import Constants, ServeConstants
from tpu_stack.planner.simulate.layout import Layout
from tpu_stack.planner.simulate.train import matrix_unit

BF16 = 2
BYTES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5, "fp4": 0.5}
"""Bytes of an element; scales are left out."""


@dataclass(frozen=True)
class ServeJob:
    """A model as it is served. Letters as everywhere.

    Attributes:
      weights, cache, activations: element types, keys of `BYTES`.
      cache_length: positions of the cache that a step reads whatever they hold; 0 where it reads
        only what is filled.
      bits_per_weight: scales included; 0 for those of `weights` alone.
    """

    architecture: Architecture
    layout: Layout
    weights: str = "bf16"
    cache: str = "bf16"
    activations: str = "bf16"
    cache_length: int = 0
    bits_per_weight: float = 0.0

    @property
    def weight_bytes(self) -> float:
        """Bytes of a stored weight."""
        return self.bits_per_weight / 8 or BYTES[self.weights]

    @property
    def replicas(self) -> int:
        """Groups of devices that each serve their own sequences."""
        return self.layout.data * self.layout.slices

    @property
    def sharers(self) -> int:
        """Devices over which a replica's heads and experts are split."""
        return self.layout.tensor * self.layout.expert

    @property
    def chips_per_replica(self) -> float:
        """Chips that share one copy of the weights."""
        return self.layout.chips / self.replicas


def decode_step(
    job: ServeJob, batch: float, context: float, constants: Constants, serving: ServeConstants
) -> dict[str, float]:
    """Seconds of a step by term: `batch` sequences over all replicas, `context` positions each."""
    arch, chip = job.architecture, job.layout.chip
    rows, chips = batch / job.replicas, job.chips_per_replica
    hbm = chip.require("hbm_bytes_per_s") * chips
    cached = max(context, job.cache_length)
    latent = serving.latent_cache * job.sharers / chip.devices(1) if arch.latent else 1.0
    local = min(cached, arch.window) if arch.window else cached
    keys = (1 - arch.local_share) * cached + arch.local_share * local
    cache_bytes = rows * keys * arch.layers * arch.cache_width * BYTES[job.cache]
    rate = matmul_rate(job, constants) * serving.decode_mxu
    flops = 2 * rows * arch.matmul_parameters + rows * arch.score_flops(cached, local)
    weights = weights_read(arch, rows) + _read_beyond_a_share(job, rows)
    weights_s = weights * job.weight_bytes / (hbm * serving.weights_hbm)
    both_s = hypot(weights_s, flops / (rate * chips))
    terms = {
        "weights": weights_s,
        "compute": both_s - weights_s,
        "cache": cache_bytes * latent / (hbm * serving.cache_hbm),
        "collectives": serving.collectives * _collectives(job, rows),
        "layers": arch.layers * serving.layer_s,
    }
    if arch.experts:
        moved = rows * arch.active_experts * arch.d_model * BF16 * serving.pair_passes
        moved_s = moved / (chip.require("hbm_bytes_per_s") / chip.devices(1))
        terms["experts"] = arch.moe_layers * (serving.moe_layer_s + moved_s)
    return terms


def _read_beyond_a_share(job: ServeJob, rows: float) -> float:
    """Weights read because work does not split evenly, over all devices of a replica.

    Latent attention's down-projections are read by every device. A step waits for the devices
    whose share of the experts was hit most: of n shares, each hit about normally, the most is
    sqrt(2 ln n) standard deviations over the mean.
    """
    arch, shares = job.architecture, job.layout.expert
    copies = arch.layers * arch.down_parameters * (job.sharers - 1)
    if not arch.experts or shares == 1:
        return copies
    held = arch.experts / shares
    hit = 1 - (1 - arch.active_experts / arch.experts) ** rows
    most = min(held, held * hit + sqrt(2 * log(shares) * held * hit * (1 - hit)))
    return copies + arch.expert_parameters * (most / held - hit)


def weights_read(arch: Architecture, rows: float) -> float:
    """Weights that a step of so many rows reads: of the experts, those that any row is sent to."""
    fixed = arch.total_parameters - arch.expert_parameters - arch.extra_parameters
    fixed -= 0 if arch.tied else arch.table_parameters  # the embedding is looked up
    if not arch.experts:
        return fixed
    missed = (1 - arch.active_experts / arch.experts) ** rows
    return fixed + arch.expert_parameters * (1 - missed)


def matmul_rate(job: ServeJob, constants: Constants) -> float:
    """FLOP/s of a chip in large matmuls of the job's operand types."""
    arch, chip = job.architecture, job.layout.chip
    peak = chip.peak_flops_per_s(job.activations, job.activations).flops_per_s_per_chip
    return peak * constants.mxu(chip.name) * arch.d_model / (arch.d_model + constants.width_half)


def _collectives(job: ServeJob, rows: float) -> float:
    """Two all-reduces a layer over all devices of a replica: tensor axis, then experts' axis."""
    block = rows * job.architecture.d_model * BF16
    axes = (job.layout.links(axis) for axis in ("tensor", "expert"))
    return 2 * job.architecture.layers * sum(links.all_reduce_s(block) for links in axes)


def prefill_seconds(
    job: ServeJob, tokens: float, length: float, constants: Constants, *, share: float = 1.0
) -> float:
    """Seconds in which a replica runs `tokens` prompt tokens of prompts of `length`.

    share: of a large matmul's rate, what the engine reaches.
    """
    arch, chips = job.architecture, job.chips_per_replica
    rate = matmul_rate(job, constants) * share * chips
    body = 2 * (arch.matmul_parameters - arch.table_parameters)
    unit = matrix_unit(job.layout.chip)
    depth = arch.query_width / arch.n_heads
    idle = max(1.0, unit / depth) / constants.flash_share(unit)
    local = min(length / 2, arch.window) if arch.window else length / 2
    scores = arch.score_flops(length / 2, local) * idle
    seconds = tokens * (body + scores) / rate
    if not arch.experts:
        return seconds
    slower = 1 / constants.grouped_share(arch.d_ff / job.layout.tensor) - 1
    grouped_s = tokens * 2 * arch.active_expert_parameters * slower / rate
    return seconds + grouped_s + _dispatch_s(job, tokens, constants)


def _dispatch_s(job: ServeJob, tokens: float, constants: Constants) -> float:
    """Prompt tokens to their experts and back: every device of a replica permutes all of them."""
    arch, chip = job.architecture, job.layout.chip
    rows = tokens * arch.moe_layers * arch.active_experts
    hbm = chip.require("hbm_bytes_per_s") / chip.devices(1)
    return 2 * rows * arch.d_model * BF16 / (hbm * constants.dispatch)
