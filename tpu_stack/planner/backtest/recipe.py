"""What a published row's model and recipe look like to the simulator, notes included.

The table's columns give a plain decoder; latent attention, leading dense layers, shared experts,
sliding windows, capacity factors and optimizers stand in its notes, in a few set phrases. What is
neither in a column nor in a phrase is assumed, and every assumption is listed.

    architecture(row).latent
"""

import re
from typing import Any

from tpu_stack.planner.backtest.known import known_facts
from tpu_stack.planner.backtest.table import Row
from tpu_stack.planner.simulate.architecture import Architecture, LatentAttention

ADAM_BYTES = 28.0
"""HBM traffic of Adam per parameter: weight, both moments and gradient, float32, read; three of
them written."""
SGD_BYTES = 12.0


def architecture(row: Row) -> Architecture:
    """The sizes in the row, in its notes, and in its family's configs (`known`), in that order.

    Raises UserError naming a column that is blank and needed.
    """
    layers, width, d_ff, heads, vocab = map(
        int, row.need("layers", "d_model", "d_ff", "n_heads", "vocab")
    )
    experts = int(row.number("experts") or 0)
    columns: dict[str, Any] = {
        "layers": layers,
        "d_model": width,
        "d_ff": d_ff,
        "n_heads": heads,
        "n_kv_heads": int(row.number("n_kv_heads") or heads),
        "head_dim": int(row.number("head_dim") or max(1, width // heads)),
        "vocab": vocab,
        "experts": experts,
        "active_experts": int(row.need("experts_active")[0]) if experts else 0,
        "gated": row.number("mlp_gated") != 0,
        "tied": row.number("tied_embed") == 1,
    }
    known = known_facts(row.text["model"])
    if row.number("head_dim"):
        known.pop("latent", None)
    return Architecture(**(columns | known | _noted(row.notes, columns)))


def _noted(notes: str, columns: dict[str, Any]) -> dict[str, Any]:
    """Fields of an architecture that the notes state in a set phrase."""
    found: dict[str, Any] = {}
    if match := re.search(r"global head_dim (\d+)", notes):
        found["global_head_dim"] = int(match[1])
    if match := re.search(r"sliding(?: window)? (\d+)", notes):
        found["window"] = int(match[1])
    if match := re.search(r"q_lora ?(\d+)", notes):
        found["latent"] = LatentAttention(q_rank=int(match[1]))
    if "alternating" in notes:
        found["local_share"] = 0.5
    if not columns["experts"]:
        return found
    if match := re.search(r"first (\d+ )?layers? dense d_ff=(\d+)", notes):
        found |= {"dense_layers": int(match[1] or 1), "dense_ff": int(match[2])}
    if match := re.search(r"shared dense mlp (\d+)", notes):
        found["shared_ff"] = int(match[1])
    elif match := re.search(r"(\d+) shared experts?", notes):
        found["shared_ff"] = int(match[1]) * columns["d_ff"]
    return found


def capacity(row: Row) -> float:
    """How far experts are filled where tokens are dropped; 0 where none are."""
    found = re.search(r"capacity_factor=([\d.]+)", row.notes)
    return float(found[1]) if found else 0.0


def optimizer_bytes(row: Row) -> float:
    """HBM traffic of the update per parameter."""
    if "opt=sgd" in row.notes:
        return SGD_BYTES
    return ADAM_BYTES - (4.0 if "mu_dtype=bf16" in row.notes else 0.0)


def microbatches(row: Row) -> int:
    """Micro-batches a step is accumulated over."""
    found = re.search(r"grad_acc_steps=(\d+)", row.notes)
    return int(found[1]) if found else 1


def fused_attention(row: Row) -> bool:
    """Whether attention is a flash kernel; MaxText's was not before the middle of 2023."""
    return "pre-flash" not in row.notes and row.text.get("publish_date", "9999") >= "2023-06"


def flops_per_token(row: Row, arch: Architecture) -> float:
    """FLOPs that the row's own convention counts per trained token.

    Raises UserError where the row has no parameter count and its convention needs one.
    """
    convention = row.text.get("flops_convention", "").lower()
    attention = 6 * arch.layers * arch.n_heads * arch.head_dim * (row.number("seq_len") or 0)
    if "6*n_total" in convention:
        total = 6 * row.need("params_b")[0] * 1e9
        if "only" in convention:
            return total
        return total + (2 * attention if "non-causal)" in convention else attention)
    body = 6 * arch.matmul_parameters
    seq_len = row.number("seq_len") or 0
    if "causal/sliding" in convention or not convention:
        local = min(arch.window, seq_len) if arch.window else seq_len / 2
        return body + 3 * arch.score_flops(seq_len / 2, local)
    return body + 3 * arch.score_flops(seq_len, seq_len)
