"""Published decode, serving and prefill rows as jobs of the simulator.

Example:
    job, assumed = serve_job(row)
    predict_decode(row, job, constants, serving, assumed)  # ms per token
"""

import re
from dataclasses import replace

from tpu_stack.errors import UserError
from tpu_stack.planner.backtest import recipe
from tpu_stack.planner.backtest.table import Row
from tpu_stack.planner.backtest.training import layout_of
from tpu_stack.planner.simulate.constants import Constants, ServeConstants
from tpu_stack.planner.simulate.decode import BYTES, ServeJob, decode_step, prefill_seconds
from tpu_stack.planner.simulate.serve import Traffic, serve_throughput

SHAREGPT = (220.0, 200.0)
"""Mean input and output tokens of ShareGPT as serving benchmarks filter it, rounded."""
RANDOM_RANGE = 0.9
"""Mean over nominal length where lengths are drawn from 0.8x to 1.0x."""
DEFAULT_CONCURRENCY = 256.0
"""Sequences that vLLM decodes together unless told otherwise."""


def serve_job(row: Row) -> tuple[ServeJob, list[str]]:
    """The job, and what was assumed. Raises UserError where the row cannot be simulated."""
    assumed: list[str] = []
    arch = recipe.architecture(row)
    layout = layout_of(row, assumed, axis="tensor")
    if arch.experts and "enable-expert-parallel" in row.notes:  # vLLM: whole experts on each device
        layout = replace(layout, expert=layout.expert * layout.tensor, tensor=1)
    weights = _type(row, "weight_precision", assumed)
    cache = _type(row, "kv_cache_precision", []) if row.text.get("kv_cache_precision") else "bf16"
    operands = _type(row, "activation_precision", [])
    operands = operands if operands in ("int8", "fp8") and operands == weights else "bf16"
    static = _note(row, r"cache_len=(\d+)", row.text.get("other_metrics", ""))
    return ServeJob(arch, layout, weights, cache, operands, int(static or 0)), assumed


def _type(row: Row, column: str, assumed: list[str]) -> str:
    written = row.text.get(column, "").lower().replace("bfloat16", "bf16")
    if not written:
        assumed.append(f"{column} not given: bf16 was assumed")
        return "bf16"
    if written not in BYTES:
        raise UserError(f"{column} {written!r} is none of {', '.join(BYTES)}")
    return written


def _note(row: Row, pattern: str, text: str | None = None) -> float | None:
    found = re.search(pattern, row.notes if text is None else text)
    return float(found[1].replace(",", "")) if found else None


def predict_decode(
    row: Row, job: ServeJob, constants: Constants, serving: ServeConstants, assumed: list[str]
) -> float:
    """The row's metric of a decode step."""
    batch = row.number("concurrency") or row.number("global_batch")
    if batch is None:
        raise UserError("concurrency is blank: the batch of a decode step is not known")
    context = row.number("input_len") or row.number("seq_len")
    if context is None:
        context = 2048.0
        assumed.append("context not given: 2048 positions were assumed")
    step_s = sum(decode_step(job, batch, context, constants, serving).values())
    return _in_metric(row, step_s, batch / step_s / job.layout.chips)


def _in_metric(row: Row, step_s: float, rate: float) -> float:
    """A step's seconds, or its tokens a second per chip, as the row's metric says.

    Raises UserError for a metric that is neither.
    """
    if row.metric == "ms_per_token":
        return 1e3 * step_s
    if row.metric in ("out_tok_s_per_chip", "tokens_per_s_per_chip"):
        return rate
    known = "ms_per_token, out_tok_s_per_chip"
    raise UserError(f"metric {row.metric!r} of a {row.kind} row is none of {known}")


def traffic_of(row: Row, assumed: list[str]) -> Traffic:
    """The requests of a serving row."""
    given, produced = row.number("input_len"), row.number("output_len")
    if given is None or produced is None:
        given, produced = SHAREGPT
        assumed.append(f"lengths not given: {given:g} in and {produced:g} out were assumed")
    if "random-range-ratio 0.8" in row.notes:
        given, produced = RANDOM_RANGE * given, RANDOM_RANGE * produced
    limit = _note(row, r"max-num-seqs[= ](\d+)")
    replicas = row.mesh.get("data", 1)
    concurrency = row.number("concurrency")
    if concurrency is None:
        concurrency = limit or DEFAULT_CONCURRENCY
        assumed.append(f"concurrency not given: {concurrency:g} sequences were assumed")
    if limit:
        concurrency = min(concurrency, limit * replicas)
    requests = _note(row, r"([\d,]+) prompts") or 0
    if "few prompts" in row.notes and not requests:
        requests = concurrency
    old_engine = "jetstream" in row.notes or "jetstream" in row.text.get("source", "").lower()
    return Traffic(concurrency, given, produced, int(requests), chunked=not old_engine)


def predict_serve(
    row: Row, job: ServeJob, constants: Constants, serving: ServeConstants, assumed: list[str]
) -> float:
    """The row's metric of an engine's steady state."""
    found = serve_throughput(job, traffic_of(row, assumed), constants, serving)
    return _in_metric(row, sum(found.terms.values()), found.out_tokens_per_s_per_chip)


def predict_prefill(row: Row, job: ServeJob, constants: Constants, assumed: list[str]) -> float:
    """The row's metric, MFU or tokens a second per chip, of a prompt batch that fills the chip."""
    length = row.number("input_len") or row.number("seq_len")
    if length is None:
        raise UserError("input_len and seq_len are blank: the prompt's length is not known")
    assumed.append("a batch that fills the matrix units was assumed")
    tokens_per_s = 1 / prefill_seconds(job, 1.0, length, constants) / job.chips_per_replica
    if row.metric == "tokens_per_s_per_chip":
        return tokens_per_s
    if row.metric != "mfu":
        known = "mfu, tokens_per_s_per_chip"
        raise UserError(f"metric {row.metric!r} of a {row.kind} row is none of {known}")
    arch, chip = job.architecture, job.layout.chip
    flops = 2 * arch.matmul_parameters + arch.score_flops(length / 2, length / 2)
    return tokens_per_s * flops / chip.require("bf16_flops_per_s")
