"""Collectives of the real train step, compiled by XLA:TPU, against formulas derived by hand.

Letters: B, T, D, V, L as everywhere; f and t are the sizes of the fsdp and tensor axes; weights of
one layer are A = 2*D*N*H + 2*D*K*H (wq, wo, wk, wv) and M = 3*D*F. All payloads are bfloat16, two
bytes, and per device. A layer is recomputed in the backward pass (remat "full").

fsdp shards D of every weight, so a use gathers a whole weight, A/t or M/t elements in all:

- forward gathers A + M; backward gathers wq, wk, wv, wo again to recompute attention, and once more
  for the gradients of its inputs; the MLP's weights once for both: L*(3*A + 2*M)/t, and the
  unembedding V*D/t once;
- each weight gradient is summed over fsdp and scattered, which takes the whole gradient in:
  (L*(A + M) + V*D)/t, as reduce-scatters or as all-reduces whose output is sliced at once;
- gradients of the L pairs of norms and the last one, D each, are summed whole.

tensor shards heads, F and V, so products over them are partial sums of [B/f, T, D]:

- forward sums after attention and after the MLP; backward sums attention's output again (it is
  recomputed; the MLP's is not needed) and the gradients of the inputs of both: 5*L, and that of the
  unembedding's input: 1;
- the loss sums [B/f, T] float32 three times: maximum, sum of exponentials, logit of the target.

The embedding table is cut over V by tensor and over D by fsdp, and XLA:TPU chooses how to look up:

- fsdp alone: tokens, 4 bytes each, are gathered, and rows of [B/f, T, D] exchanged there and back;
- tensor alone: each device looks up what it has, and [B, T, D] is summed, once;
- both: tokens are permuted and gathered over tensor, rows of [B, T, D/f] are looked up in what
  each device has, summed over tensor and exchanged over fsdp; backward, the gradient [B, T, D] is
  gathered over fsdp.
"""

from importlib.util import find_spec

import pytest

from tpu_stack.models.config import ModelConfig
from tpu_stack.planner.aot.compile import compile_program
from tpu_stack.planner.aot.request import make_request
from tpu_stack.planner.aot.result import Compiled
from tpu_stack.planner.aot.spec import CompileSpec
from tpu_stack.planner.hlo_collective import Collective, summarize

pytestmark = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu (the aot extra)")

B, T = 8, 128
CONFIG = ModelConfig(
    vocab_size=2048, d_model=512, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=128, d_ff=1536,
    max_seq_len=1024,
)  # fmt: skip
D, V, L = CONFIG.d_model, CONFIG.vocab_size, CONFIG.n_layers
A = 2 * D * 128 * (CONFIG.n_heads + CONFIG.n_kv_heads)
M = 3 * D * CONFIG.d_ff
ROWS = B * T * D
NORMS = (2 * L + 1) * D
SCALARS = 64  # bytes of the loss, the gradient's norm and other sums of single numbers
BF16, F32 = 2, 4


def expected(f: int, t: int) -> dict[tuple[str, str], int]:
    """Bytes by kind and axis, without what the embedding's lookup moves."""
    found: dict[tuple[str, str], int] = {}
    if f > 1:
        found["all-gather", "fsdp"] = BF16 * (L * (3 * A + 2 * M) + V * D) // t
        found["reduce-scatter", "fsdp"] = BF16 * (L * (A + M) + V * D) // t
        found["all-reduce", "fsdp"] = BF16 * NORMS
    if t > 1:
        loss = 3 * F32 * B * T // f
        found["all-reduce", "tensor"] = BF16 * (5 * L + 1) * ROWS // f + loss
    return found


LOOKUP: dict[tuple[int, int], dict[tuple[str, str], int]] = {
    (4, 1): {("all-gather", "fsdp"): 4 * B * T, ("all-to-all", "fsdp"): 2 * BF16 * ROWS // 4},
    (1, 4): {("all-reduce", "tensor"): BF16 * ROWS},
    (2, 2): {
        ("all-gather", "tensor"): 4 * B * T,
        ("all-reduce", "tensor"): BF16 * ROWS // 2,
        ("all-to-all", "fsdp"): BF16 * ROWS // 2,
        ("all-gather", "fsdp"): BF16 * ROWS,
        ("collective-permute", "fsdp+tensor"): 4 * B * T // 2,
    },
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("aot")


def compiled(cache, f: int, t: int) -> Compiled:
    spec = CompileSpec("tiny", "v5e:2x2", "train", f"fsdp={f},tensor={t}", batch_size=B, seq_len=T)
    result = compile_program(make_request(spec, CONFIG), cache=cache)
    assert isinstance(result, Compiled)
    return result


def figures(found: tuple[Collective, ...]) -> dict[tuple[str, str], int]:
    rows = summarize(found, as_written=True)
    return {(row.kind, row.axes_label): row.bytes for row in rows if row.bytes > SCALARS}


@pytest.mark.slow
@pytest.mark.parametrize(("f", "t"), [(4, 1), (1, 4), (2, 2)])
def test_bytes_by_kind_and_axis(cache, f, t):
    found = figures(compiled(cache, f, t).report.collectives)
    wanted = expected(f, t)
    for key, count in LOOKUP[f, t].items():
        wanted[key] = wanted.get(key, 0) + count
    assert found.keys() == wanted.keys()
    for key, count in wanted.items():
        assert 0 <= found[key] - count <= SCALARS, key


@pytest.mark.slow
def test_what_collectives_serve_and_what_covers_them(cache):
    result = compiled(cache, 2, 2)
    found = result.report.collectives
    gathered = [c.purpose for c in found if c.kind == "all-gather" and c.axes == ("fsdp",)]
    for name in ("wq", "wk", "wv", "wo"):
        assert f"gather of blocks.attention.{name}, forward" in gathered
    for name in ("w_gate", "w_up", "w_down"):
        assert f"gather of blocks.mlp.{name}, forward" in gathered
        assert f"gather of blocks.mlp.{name}, backward" in gathered
    assert "gather of unembed, forward" in gathered
    sums = [c.purpose for c in found if c.kind == "all-reduce" and c.axes == ("tensor",)]
    assert any("dot_general in MLP.__call__ (models/mlp.py:" in text for text in sums)
    asynchronous = [c for c in found if c.overlapped and c.kind == "all-gather"]
    assert asynchronous
    assert all((c.cover_cycles or 0) > 0 for c in asynchronous)
    synchronous = [c for c in found if not c.overlapped]
    assert synchronous
    assert all(c.cover_cycles is None for c in synchronous)
    for item, time in zip(found, result.exposures, strict=True):
        assert time.exposed_s == max(0.0, time.own_s - time.cover_s)
        assert (time.cover_s > 0) == bool(item.cover_cycles)


def test_memory_and_operations(cache):
    result = compiled(cache, 2, 2)
    parameters = L * (A + M + 2 * D) + 2 * V * D + D
    matrices = parameters - NORMS  # norms are whole on every device
    state = 3 * F32 * (matrices // 4 + NORMS)  # weights, mu and nu
    # The batch is 17 bytes a token over two devices; XLA pads small arrays to tiles of 8 x 128.
    assert state < result.memory.arguments < state * 1.02
    assert result.memory.total_bytes > state
    report = result.report
    assert report.cycles == sum(op.total_cycles for op in report.operations) > 0
    assert {op.trips for op in report.operations} >= {1, L}
    assert any("models/layers.py" in op.source for op in report.operations)
    assert result.hlo_text().startswith("HloModule jit_train_step")
    assert result.matmul_flops > 6 * B * T * (L * (A + M) + V * D)
