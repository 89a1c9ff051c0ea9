"""What a published row's model and recipe look like to the simulator, notes included.

The table's columns give a plain decoder; latent attention, leading dense layers, shared experts,
sliding windows, capacity factors and optimizers stand in its notes, in a few set phrases. What is
neither in a column nor in a phrase is assumed, and every assumption is listed.

>>> architecture(row).latent
LatentAttention(q_rank=1536, kv_rank=512, nope=128, rope=64, value=128)
"""

import re

from tpu_stack.planner.backtest.table import Row
from tpu_stack.planner.simulate.architecture import Architecture, LatentAttention

ADAM_BYTES = 28.0
"""HBM traffic of Adam per parameter: weight, both moments and gradient, float32, read; three of
them written."""
SGD_BYTES = 12.0


def architecture(row: Row) -> Architecture:
    """The sizes in the row. Raises UserError naming a column that is blank and needed."""
    notes = row.notes
    layers, width, d_ff, heads, vocab = map(
        int, row.need("layers", "d_model", "d_ff", "n_heads", "vocab")
    )
    latent = _latent(row)
    head_dim = int(row.number("head_dim") or (128 if latent else width // heads))
    experts = int(row.number("experts") or 0)
    dense_layers, dense_ff = _dense_layers(notes, layers) if experts else (0, 0)
    window, local_share = _window(row, notes)
    found = re.search(r"global head_dim (\d+)", notes)
    return Architecture(
        layers=layers,
        d_model=width,
        d_ff=d_ff if experts else _widened(notes, d_ff, layers),
        n_heads=heads,
        n_kv_heads=int(row.number("n_kv_heads") or heads),
        head_dim=head_dim,
        vocab=vocab,
        experts=experts,
        active_experts=int(row.number("experts_active") or 0) if experts else 0,
        shared_ff=_shared_ff(notes, d_ff) if experts else 0,
        dense_layers=dense_layers,
        dense_ff=dense_ff,
        gated=row.number("mlp_gated") != 0,
        tied=row.number("tied_embed") == 1,
        window=window,
        local_share=local_share,
        global_head_dim=int(found[1]) if found else 0,
        latent=latent,
    )


def _latent(row: Row) -> LatentAttention | None:
    """Latent attention, where the notes or the model's name speak of it."""
    name = row.text["model"].lower()
    if "mla" not in re.findall(r"\w+", row.notes) and "deepseek" not in name:
        return None
    found = re.search(r"q_lora ?(\d+)", row.notes)
    large = (row.number("layers") or 0) > 40  # DeepSeek-V2-Lite has no query compression
    return LatentAttention(q_rank=int(found[1]) if found else (1536 if large else 0))


def _dense_layers(notes: str, layers: int) -> tuple[int, int]:
    """Layers without experts and the width of their MLP."""
    found = re.search(r"first (\d+ )?layers? dense d_ff=(\d+)", notes)
    if found:
        return int(found[1] or 1), int(found[2])
    if "moe every 2nd layer" in notes:
        found = re.search(r"dense layers d_ff=(\d+)", notes)
        return layers // 2, int(found[1]) if found else 0
    return 0, 0


def _widened(notes: str, d_ff: int, layers: int) -> int:
    """The mean width of an MLP where layers that share keys and values have twice the width."""
    found = re.search(r"(\d+) kv-shared layers, double-wide mlp", notes)
    return d_ff * (layers + int(found[1])) // layers if found else d_ff


def _shared_ff(notes: str, d_ff: int) -> int:
    found = re.search(r"shared dense mlp (\d+)", notes)
    if found:
        return int(found[1])
    found = re.search(r"(\d+) shared experts?", notes)
    return int(found[1]) * d_ff if found else 0


def _window(row: Row, notes: str) -> tuple[int, float]:
    """Sliding window and the share of layers that have one."""
    found = re.search(r"sliding(?: window)? (\d+)", notes)
    if not found:
        return 0, 0.0
    name = row.text["model"].lower()
    share = 0.5 if "alternating" in notes or "gemma2" in name or "gemma-2" in name else 5 / 6
    return int(found[1]), share


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
