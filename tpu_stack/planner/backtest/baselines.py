"""What a prediction has to beat: rules that need no simulator.

Each predicts a row's metric from arithmetic on its columns: the pure roofline; half of it (50% MFU,
for decode and serving half of the HBM bandwidth); and the median share of the roofline that the
*other* rows of the chip and kind reach.

    baselines(rows)["half"][row.id]
"""

from statistics import median

from tpu_stack.errors import UserError
from tpu_stack.hardware.chips import get_chip
from tpu_stack.planner.backtest import recipe, serving, training
from tpu_stack.planner.backtest.table import Row
from tpu_stack.planner.simulate.decode import BYTES, ServeJob, weights_read

NAMES = {
    "roofline": "pure roofline",
    "half": "50% MFU, or 50% of the HBM bandwidth",
    "chip_median": "the chip's median utilisation over the other rows",
}
_FASTER_IS_LESS = ("step_time_s", "ms_per_token")


def baselines(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Baseline -> row id -> predicted metric; rows whose roofline is unknown are left out."""
    roofs: dict[str, float] = {}
    for row in rows:
        try:
            roofs[row.id] = roofline_value(row)
        except UserError:
            continue
    shares = {row.id: _share(row, roofs[row.id]) for row in rows if row.id in roofs}
    found: dict[str, dict[str, float]] = {name: {} for name in NAMES}
    for row in rows:
        if row.id not in roofs:
            continue
        roof = roofs[row.id]
        found["roofline"][row.id] = roof
        found["half"][row.id] = _scaled(row, roof, 0.5)
        same = [r for r in rows if r.id in roofs and r.id != row.id and r.kind == row.kind]
        others = [r for r in same if r.chip == row.chip] or same
        if others:
            share = median(shares[r.id] for r in others)
            found["chip_median"][row.id] = _scaled(row, roof, share)
    return found


def roofline_value(row: Row) -> float:
    """The row's metric at 100% of the bf16 peak, or of the HBM bandwidth for decode and serving.

    Raises UserError where the row lacks what that needs.
    """
    if row.kind in ("train", "prefill") and row.metric == "mfu":
        return 1.0
    if row.kind == "train":
        arch = recipe.architecture(row)
        seq_len = row.need("seq_len")[0]
        local = min(arch.window, seq_len) if arch.window else seq_len / 2
        flops = 6 * arch.matmul_parameters + 3 * arch.score_flops(seq_len / 2, local)
        peak = get_chip(row.chip).require("bf16_flops_per_s")
        return training.in_metric(row, peak / flops)
    job, _ = serving.serve_job(row)
    if row.metric not in ("ms_per_token", "out_tok_s_per_chip"):
        raise UserError(f"no roofline for metric {row.metric!r}")
    if row.kind == "decode":
        batch, context = row.need("concurrency", "input_len")
        step_s = _step_s(job, batch, context)
        return 1e3 * step_s if row.metric == "ms_per_token" else batch / step_s / job.layout.chips
    traffic = serving.traffic_of(row, [])
    context = traffic.input_len + traffic.output_len / 2
    step_s = _step_s(job, traffic.concurrency, context)
    if row.metric == "ms_per_token":
        return 1e3 * step_s
    return traffic.concurrency / step_s / job.layout.chips


def _step_s(job: ServeJob, batch: float, context: float) -> float:
    """Weights and filled cache over the HBM bandwidth of all chips of a replica."""
    rows = batch / job.replicas
    cache = rows * context * job.architecture.layers * job.architecture.cache_width
    moved = weights_read(job.architecture, rows) * job.weight_bytes + cache * BYTES[job.cache]
    return moved / (job.layout.chip.require("hbm_bytes_per_s") * job.chips_per_replica)


def _share(row: Row, roof: float) -> float:
    return roof / row.value if row.metric in _FASTER_IS_LESS else row.value / roof


def _scaled(row: Row, roof: float, share: float) -> float:
    return roof / share if row.metric in _FASTER_IS_LESS else roof * share
