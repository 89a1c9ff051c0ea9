"""A published training row as a job of the simulator, and a step's time in the row's own metric.

Example:
    job, assumed = train_job(row)
    in_metric(row, train_step(job, constants).tokens_per_s_per_chip)
"""

from math import prod

from tpu_stack.errors import UserError
from tpu_stack.hardware.chips import get_chip
from tpu_stack.planner.backtest import recipe
from tpu_stack.planner.backtest.table import Row
from tpu_stack.planner.simulate.layout import Layout
from tpu_stack.planner.simulate.remat import Remat
from tpu_stack.planner.simulate.train import TrainJob

_AXES = {
    "data": "data", "fsdp": "fsdp", "fsdp_transpose": "fsdp", "context": "context",
    "sequence": "context", "expert": "expert", "tensor": "tensor", "model": "tensor",
    "tensor_transpose": "tensor",
}  # fmt: skip
_DCN = ("dcn_data", "dcn_fsdp")
_OPERANDS = {"": "bf16", "bf16": "bf16", "bfloat16": "bf16", "int8": "int8", "fp8": "fp8"}


def train_job(row: Row) -> tuple[TrainJob, list[str]]:
    """The job, and what was assumed because the row does not say it.

    Raises UserError with the reason where the row cannot be simulated.
    """
    assumed: list[str] = []
    arch = recipe.architecture(row)
    layout = layout_of(row, assumed)
    batch, seq_len = row.number("global_batch"), row.number("seq_len")
    if not batch and row.number("per_device_batch"):
        batch = row.need("per_device_batch")[0] * layout.devices
    if not batch or not seq_len:
        blank = "global_batch" if not batch else "seq_len"
        raise UserError(f"{blank} is blank: the tokens of a step are not known")
    remat = Remat.parse(row.text["remat_policy"])
    if remat.assumed:
        assumed.append(remat.assumed)
    operands = row.text["activation_precision"].lower()
    if operands not in _OPERANDS:
        raise UserError(f"activation_precision {operands!r} is none of bf16, int8, fp8")
    job = TrainJob(
        arch,
        layout,
        int(batch),
        int(seq_len),
        remat=remat,
        activations=_OPERANDS[operands],
        fused_attention=recipe.fused_attention(row),
        capacity=recipe.capacity(row),
        optimizer_bytes=recipe.optimizer_bytes(row),
        microbatches=recipe.microbatches(row),
    )
    return job, assumed


def layout_of(row: Row, assumed: list[str], axis: str = "fsdp") -> Layout:
    """The row's mesh: without one, all devices of a slice on `axis`, which is then assumed.

    `fsdp_transpose` of 2 or more beside a full `fsdp` is the same devices named twice in a 2D
    sharding of weights; it is dropped where the axes otherwise exceed the devices.
    """
    chip, chips = get_chip(row.chip), int(row.need("n_chips")[0])
    slices = int(row.number("n_slices") or 1)
    per_slice = chip.devices(chips) // slices
    sizes = _sizes(row, per_slice)
    dcn_fsdp = row.mesh.get("dcn_fsdp", 1) > 1
    if not row.mesh or prod(sizes.values()) == 1 < per_slice:
        assumed.append(f"mesh not given: {axis}={per_slice} was assumed")
        sizes[axis] = per_slice
    if prod(sizes.values()) == slices * per_slice and sizes["data"] % slices == 0:
        sizes["data"] //= slices  # some recipes count the slices in the data axis
    while prod(sizes.values()) > per_slice and "fsdp_transpose" in row.mesh and sizes["fsdp"] > 1:
        sizes["fsdp"] //= 2
    return Layout(chip, chips, slices, dcn_fsdp=dcn_fsdp, **sizes)


def _sizes(row: Row, per_slice: int) -> dict[str, int]:
    """Axis of the simulator -> devices of a slice, -1 resolved."""
    sizes, open_axis = dict.fromkeys(set(_AXES.values()), 1), ""
    for axis, size in row.mesh.items():
        if axis in _DCN:
            continue
        if axis not in _AXES:
            raise UserError(f"mesh axis {axis!r} is not one that the simulator knows")
        if size == -1:
            open_axis = _AXES[axis]
        else:
            sizes[_AXES[axis]] *= size
    if open_axis:
        sizes[open_axis] *= max(1, per_slice // prod(sizes.values()))
    return sizes


def in_metric(row: Row, tokens_per_s_per_chip: float) -> float:
    """Tokens a second per chip as the row's metric."""
    if row.metric == "tokens_per_s_per_chip":
        return tokens_per_s_per_chip
    if row.metric == "step_time_s":
        batch, seq_len, chips = row.need("global_batch", "seq_len", "n_chips")
        return batch * seq_len / chips / tokens_per_s_per_chip
    if row.metric != "mfu":
        known = "tokens_per_s_per_chip, step_time_s, mfu"
        raise UserError(f"metric {row.metric!r} of a {row.kind} row is none of {known}")
    peak = get_chip(row.chip).require("bf16_flops_per_s")
    return tokens_per_s_per_chip * recipe.flops_per_token(row, recipe.architecture(row)) / peak
