"""The time of a train step, term by term: matmuls, attention, memory passes, collectives.

Matmuls and the passes between them follow one another, so their times add up; a collective hides
behind the matmuls but for the constant share that never does and for what is longer than they are.
All work is per chip and per step.

    job = TrainJob(architecture, Layout(get_chip("v5p"), 256, fsdp=256), 512, 8192)
    train_step(job, Constants()).step_s
"""

from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, log2

from tpu_stack.hardware.chips import Chip
from tpu_stack.planner.simulate.architecture import Architecture
from tpu_stack.planner.simulate.constants import Constants
from tpu_stack.planner.simulate.layout import Layout
from tpu_stack.planner.simulate.remat import Remat

BF16, F32 = 2, 4


@dataclass(frozen=True)
class TrainJob:
    """One training step over all chips.

    Attributes:
      global_batch, seq_len: sequences, and tokens of each.
      activations: operand type of the matmuls: "bf16", "int8" or "fp8".
      fused_attention: a flash kernel, rather than scores written to memory.
      capacity: how far experts are filled where tokens are dropped; 0 means dropless.
      microbatches: parts that a step is accumulated over.
      optimizer_bytes: HBM traffic of the update per parameter: 4 + 4 + 4 read and written, and the
        gradient, for Adam in float32.
    """

    architecture: Architecture
    layout: Layout
    global_batch: int
    seq_len: int
    remat: Remat = field(default_factory=Remat)
    activations: str = "bf16"
    fused_attention: bool = True
    capacity: float = 0.0
    optimizer_bytes: float = 28.0
    microbatches: int = 1

    @cached_property
    def tokens(self) -> float:
        """Tokens of a step, per chip."""
        return self.global_batch * self.seq_len / self.layout.chips


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by term, exposed time only; they sum to `step_s`."""

    terms: dict[str, float]
    tokens_per_chip: float

    @cached_property
    def step_s(self) -> float:
        """Seconds of the step."""
        return sum(self.terms.values())

    @property
    def tokens_per_s_per_chip(self) -> float:
        """Trained tokens a second, per chip."""
        return self.tokens_per_chip / self.step_s


def train_step(job: TrainJob, constants: Constants) -> StepTime:
    """Seconds of one step of `job`.

    Raises UserError where the chip lacks a fact that this needs.
    """
    compute = _matmuls(job, constants) | _attention(job, constants)
    busy = sum(compute.values())
    terms = compute | _memory(job, constants)
    layers = job.architecture.layers
    terms["fixed"] = constants.step_s + 3 * layers * constants.layer_s
    terms |= _collectives(job, constants, busy)
    slices = job.layout.slices
    terms["slices"] += sum(terms.values()) * constants.straggle * log2(slices)
    return StepTime(terms, job.tokens)


def _rate(job: TrainJob, constants: Constants, operand: str = "bf16") -> float:
    chip, width = job.layout.chip, job.architecture.d_model
    peak = chip.peak_flops_per_s(operand, operand).flops_per_s_per_chip
    return peak * constants.mxu(chip.name) * width / (width + constants.width_half)


def _matmuls(job: TrainJob, constants: Constants) -> dict[str, float]:
    """Dense and expert matmuls and the unembedding: forward, two backward, recompute."""
    arch, remat, tokens = job.architecture, job.remat, job.tokens
    bf16, low = _rate(job, constants), _rate(job, constants, job.activations)
    mlp_passes = 3 + remat.mlp * (arch.mlp_matrices - 1) / arch.mlp_matrices
    dense = arch.layers * (
        arch.qkv_parameters * (3 + remat.qkv) + arch.out_parameters * (3 + remat.out)
    )
    dense += arch.dense_mlp_parameters * mlp_passes
    experts = arch.active_expert_parameters * (3 + remat.mlp) * (job.capacity or 1.0)
    q, qe = constants.quantized_shares(job.activations)
    dense_rate = 1 / ((1 - q) / bf16 + q / low)
    width = arch.d_ff / job.layout.tensor
    grouped = 1.0 if job.capacity else constants.grouped_share(width)  # filled: a plain batch
    expert_rate = grouped / ((1 - qe) / bf16 + qe / low)
    return {
        "matmuls": 2 * tokens * dense / dense_rate,
        "experts": 2 * tokens * experts / expert_rate,
        "logits": 2 * tokens * 3 * arch.table_parameters / bf16,
    }


def _attention(job: TrainJob, constants: Constants) -> dict[str, float]:
    """Scores and weighted sums; the backward kernel runs five matmuls for the forward's two.

    A head narrower than the matrix unit leaves the rest of it idle.
    """
    arch, tokens = job.architecture, job.tokens
    rate = _rate(job, constants)
    passes = 1 + job.remat.scores + 2.5
    if not job.fused_attention:
        flops = arch.score_flops(job.seq_len, job.seq_len)
        return {"attention": tokens * flops * (3 + job.remat.scores) / rate}
    causal = job.seq_len / 2
    local = min(causal, arch.window + 256) if arch.window else causal
    depth = arch.query_width / arch.n_heads
    value = arch.context_width / arch.n_heads
    unit = matrix_unit(job.layout.chip)
    padded = (_padded(depth, unit) + _padded(value, unit)) / (depth + value)
    flops = arch.score_flops(causal, local) * padded * passes
    return {"attention": tokens * flops / (rate * constants.flash_share(unit))}


def matrix_unit(chip: Chip) -> int:
    """Columns of the chip's matrix unit; 128 where no source gives them."""
    return int(chip.mxu_columns.number) if chip.mxu_columns else 128


def _padded(size: float, unit: int) -> int:
    return unit * ceil(size / unit)


def _memory(job: TrainJob, constants: Constants) -> dict[str, float]:
    """Passes over HBM between the matmuls, the update, and exchange with the host."""
    arch, layout, tokens = job.architecture, job.layout, job.tokens
    rate = layout.chip.require("hbm_bytes_per_s") * constants.hbm
    mlp_width = arch.dense_mlp_parameters + arch.active_expert_parameters
    inner = arch.layers * (arch.query_width + arch.cache_width + arch.context_width)
    inner += mlp_width / arch.d_model
    elements = constants.passes * (arch.layers * arch.d_model + inner / 10)
    weights = arch.total_parameters / (layout.tensor * layout.expert * layout.fsdp)
    per_chip = weights * layout.chip.devices(1)
    terms = {
        "elementwise": tokens * elements * BF16 / rate,
        "logit passes": tokens * arch.vocab * F32 * constants.logit_passes / rate,
        "update": per_chip * job.optimizer_bytes / rate,
    }
    if not job.fused_attention:
        scores = arch.layers * arch.n_heads * job.seq_len
        terms["score passes"] = tokens * scores * F32 * constants.score_passes / rate
    if arch.experts:
        moved = arch.moe_layers * arch.active_experts * arch.d_model * BF16
        terms |= _dispatch(job, constants, tokens * moved)
    return terms


def _dispatch(job: TrainJob, constants: Constants, moved: float) -> dict[str, float]:
    """Tokens to experts and back: permuted rows where dropless, one-hot matmuls where capped.

    A capped dispatch multiplies every token with a mask of seq_len * active * capacity columns,
    there and back, forward and backward (GShard, arXiv 2006.16668).
    """
    if not job.capacity:
        rate = job.layout.chip.require("hbm_bytes_per_s") * constants.dispatch
        return {"dispatch": 4 * moved / rate}
    columns = job.seq_len * job.architecture.active_experts * job.capacity
    flops = 2 * job.architecture.moe_layers * job.architecture.d_model * columns * 2 * 3
    return {"dispatch": job.tokens * flops / _rate(job, constants)}


def _collectives(job: TrainJob, constants: Constants, busy_s: float) -> dict[str, float]:
    """Exposed seconds of every mesh axis, and of the exchange with the host."""
    arch, layout = job.architecture, job.layout
    experts = arch.expert_parameters / layout.expert
    held = (arch.total_parameters - arch.expert_parameters + experts) / layout.tensor
    gathered = 3 * job.microbatches * layout.links("fsdp").all_gather_s(held * BF16)
    reduced = layout.links("data").all_reduce_s(held / layout.fsdp * F32)
    terms = {
        "fsdp": _exposed(gathered, constants.fsdp, busy_s),
        "data": _exposed(reduced, constants.data, busy_s),
        "tensor": _exposed(_tensor_s(job), constants.tensor, busy_s),
        "context": _exposed(_context_s(job), constants.tensor, busy_s),
        "expert": _exposed(_expert_s(job), constants.expert, busy_s),
        "host": _exposed(_host_bytes(job) / constants.host, 0.0, busy_s),
    }
    shard = held / layout.fsdp * layout.chip.devices(1) * F32
    across = 2 * shard * (layout.slices - 1) / layout.slices
    dcn_s = across / (layout.dcn_bytes_per_s * constants.dcn)
    terms["slices"] = max(0.0, dcn_s - busy_s / 2)
    return terms


def _exposed(collective_s: float, never_hidden: float, busy_s: float) -> float:
    hideable = (1 - never_hidden) * collective_s
    return never_hidden * collective_s + max(0.0, hideable - busy_s)


def _tensor_s(job: TrainJob) -> float:
    """Two all-reduces a layer forward and two backward, and what is recomputed."""
    arch, layout = job.architecture, job.layout
    block = job.tokens * layout.tensor / layout.chip.devices(1) * arch.d_model * BF16
    return arch.layers * (4 + job.remat.out) * layout.links("tensor").all_reduce_s(block)


def _context_s(job: TrainJob) -> float:
    """Keys and values gathered over the context axis: forward, backward, and their gradient."""
    arch, layout = job.architecture, job.layout
    whole = job.tokens * layout.context / layout.chip.devices(1) * arch.cache_width * BF16
    return arch.layers * 3 * layout.links("context").all_gather_s(whole / layout.tensor)


def _expert_s(job: TrainJob) -> float:
    """Tokens to their experts and back: forward, backward, and what is recomputed."""
    arch, layout = job.architecture, job.layout
    sent = job.tokens * arch.active_experts * arch.d_model * BF16 * (job.capacity or 1.0)
    whole = sent * layout.expert / layout.chip.devices(1)
    times = 4 + job.remat.mlp
    return arch.moe_layers * times * layout.links("expert").all_to_all_s(whole)


def _host_bytes(job: TrainJob) -> float:
    """What a chip sends to its host and, later, takes back: one way."""
    arch = job.architecture
    routed = arch.active_experts if arch.experts else 1
    widths = {
        "input": arch.d_model,
        "qkv": arch.query_width + 2 * arch.n_kv_heads * arch.head_dim,
        "out": arch.d_model,
        "mlp_in": (arch.mlp_matrices - 1) * (arch.d_ff * routed + arch.shared_ff),
        "mlp_out": arch.d_model * routed,
    }
    width = sum(widths.get(name, 0) for name in job.remat.offloaded)
    return job.tokens * arch.layers * width * BF16
