"""Which product runs for a weight format on a chip, and why: a choice by projected times.

The rule: take the activation type with the least projected time at the shape, given the types that
the kernel's plan feeds the matrix unit; of those within 1% of it, the one that rounds the
activations least. So, where the product binds, 8i multiplies fp8 by int4, v5e and v6e int8 by int8,
7x fp8 by fp8; where reading the weight binds, activations stay bfloat16.

>>> explain("int4_channel", "8i", (512, 4096, 14336)).activation
'fp8'
"""

from dataclasses import asdict, dataclass
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.hardware import Chip, get_chip
from tpu_stack.kernels.quantized_matmul import Plan, make_plan
from tpu_stack.planner.kernels.cases import Case
from tpu_stack.planner.kernels.matmul_cases import ACTIVATIONS, make_case
from tpu_stack.planner.kernels.targets import known_chip, nearest
from tpu_stack.quant import FORMATS, get_format

PREFERENCE = ("bf16", "fp8", "int8")
"""Most exact activation first. On Gaussian rows fp8 has a signal-to-noise ratio of 31.6 dB and int8
of 42.1; but int8 rounds rows with outliers to few levels, and fp8 keeps its relative precision."""


@dataclass(frozen=True)
class Candidate:
    """One activation type for a format on a chip.

    Attributes:
      activation: a key of `matmul_cases.ACTIVATIONS`.
      operands: dtypes of x and of the weight as stored.
      computed_as: the dtypes that the matrix unit multiplies.
      support: "native" or "emulated", by the kernel's plan, and why.
      peak_flops_per_s: the chip's peak for `computed_as`.
      ridge_rows: M above which the product takes longer than moving the operands once.
      time_s: the least time at the shape: the longer of product and HBM. Projected.
      refused: the kernel's reason to refuse it; the fields from `computed_as` are then empty.
    """

    activation: str
    operands: tuple[str, str]
    computed_as: tuple[str, str] = ("", "")
    support: str = ""
    peak_flops_per_s: float = 0.0
    ridge_rows: float = 0.0
    time_s: float = float("inf")
    refused: str | None = None


@dataclass(frozen=True)
class Explanation:
    """What runs for one format, chip and shape, and why; `as_json` for machines."""

    format: str
    chip: str
    shape: tuple[int, ...]
    implementation: str
    activation: str
    chosen_by: str
    support: str
    computed_as: tuple[str, str]
    plan: dict[str, Any]
    reasons: tuple[str, ...]
    candidates: tuple[Candidate, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON-ready."""
        data = asdict(self)
        for candidate in data["candidates"]:
            if candidate["refused"]:
                candidate["time_s"] = None
        return data


def explain(
    format: str, chip: str, shape: tuple[int, ...], activation: str | None = None
) -> Explanation:
    """Says what runs for `x [M, K] @ W [K, N]`.

    Args:
      format: a quantized format's name.
      chip: a chip of `targets.CHIPS`.
      shape: M, K, N.
      activation: a key of `ACTIVATIONS`; None applies the rule.

    Raises: UserError for an unknown name (with the nearest), a format that is not quantized, a
      shape that the format or kernel refuses, and an activation that the kernel refuses with it.
    """
    if not get_format(format).quantized:
        quantized = [name for name, fmt in FORMATS.items() if fmt.quantized]
        raise UserError(f"{format} is not quantized: XLA's own dot runs; try {quantized[0]}")
    facts = get_chip(known_chip(chip))
    if activation is not None and activation not in ACTIVATIONS:
        raise nearest("activation", activation, list(ACTIVATIONS))
    make_case(format, "bf16").check_shape(shape)
    candidates = [_candidate(format, name, facts, shape) for name in PREFERENCE]
    chosen, by = _choose(candidates, activation)
    plan = _plan(make_case(format, chosen.activation), facts, shape)
    return Explanation(
        format=format,
        chip=chip,
        shape=shape,
        implementation="pallas quantized_matmul",
        activation=chosen.activation,
        chosen_by=by,
        support=chosen.support,
        computed_as=chosen.computed_as,
        plan={
            name: getattr(plan, name)
            for name in ("scale_mode", "grid", "bm", "bk", "bn", "group", "accumulator")
        },
        reasons=tuple(_reasons(format, facts, shape, chosen, plan)),
        candidates=tuple(candidates),
    )


def _plan(case: Case, chip: Chip, shape: tuple[int, ...]) -> Plan:
    """The kernel's own plan for the chip. Raises ValueError, the kernel's reason to refuse."""
    arrays = dict(case.abstract(shape))
    x, values, scales = (arrays.pop(name) for name in ("x", "values", "scales"))
    offset = get_format(case.format).offset
    return make_plan(x, values, scales, offset=offset, kind=chip.device_kinds[0], **arrays)


def _candidate(format: str, activation: str, chip: Chip, shape: tuple[int, ...]) -> Candidate:
    case = make_case(format, activation)
    assert case.pair is not None
    try:
        plan = _plan(case, chip, shape)
    except ValueError as error:
        return Candidate(activation, case.pair, refused=str(error))
    rate = chip.peak_flops_per_s(*plan.operands).flops_per_s_per_chip
    hbm_s = case.nbytes(shape) / chip.require("hbm_bytes_per_s")
    compute_s = case.flops(shape) / rate
    return Candidate(
        activation=activation,
        operands=case.pair,
        computed_as=plan.operands,
        support=plan.support,
        peak_flops_per_s=rate,
        ridge_rows=shape[0] * hbm_s / compute_s,
        time_s=max(hbm_s, compute_s),
    )


def _choose(candidates: list[Candidate], requested: str | None) -> tuple[Candidate, str]:
    """The requested candidate, or the most exact of those within 1% of the least time."""
    if requested is not None:
        [found] = [c for c in candidates if c.activation == requested]
        if found.refused:
            raise UserError(f"the kernel refuses {requested} activations: {found.refused}")
        return found, "requested"
    able = [c for c in candidates if c.refused is None]
    least = min(c.time_s for c in able)
    best = next(c for c in able if c.time_s <= 1.01 * least)
    if best is able[0]:
        return best, "no narrower activation takes less time at this shape (projected)"
    return (
        best,
        f"{able[0].time_s / best.time_s:.2f}x less time than {able[0].activation} (projected)",
    )


SCALE_REASONS = {
    "after": "one scale per output column: applied to the result, N of them per row",
    "input": "one scale per row of the weight: applied to x, outside the kernel",
    "before": "groups: applied to the widened weight, K*N multiplies whatever M is",
    "after_group": "groups: applied to each group's product, M*K*N/g multiplies",
}


def _decoding(plan: Plan) -> list[str]:
    """What the kernel does beside casting and multiplying."""
    if plan.uses_planes:
        return ["decodes the weight to e5m2 bit planes, with one copy of each row of x per group"]
    if plan.tile_schedule:
        return [f"interleaves tiles of {plan.depth} rows: {', '.join(plan.tile_schedule)}"]
    if plan.interleaves_halves:
        return ["flips the sign bits of the scales, with the columns of x interleaved to match"]
    return []


def _reasons(
    format: str, chip: Chip, shape: tuple[int, ...], chosen: Candidate, plan: Plan
) -> list[str]:
    binds = "moving the operands" if shape[0] < chosen.ridge_rows else "the product"
    bits = get_format(format).bits_per_weight(shape[1])
    reasons = [
        chosen.support,
        f"M={shape[0]} against a ridge of {chosen.ridge_rows:.0f} rows: {binds} binds (projected)",
        f"scales {plan.scale_mode}: {SCALE_REASONS[plan.scale_mode]}",
        *_decoding(plan),
        f"{format} is {bits:.2f} bits a weight, {16 / bits:.1f} times less than bfloat16",
    ]
    if chip.is_projected:
        reasons.append(
            f"no compiler for {chip.name} is public: lowered there, compiled and tuned for 7x"
        )
    return reasons
