"""The simulator's terms against arithmetic by hand, and the order of what it should order."""

from dataclasses import replace

import pytest

from tpu_stack.errors import UserError
from tpu_stack.hardware.chips import get_chip
from tpu_stack.models.abstract import parameter_count
from tpu_stack.models.presets import get_preset
from tpu_stack.planner.simulate.architecture import Architecture, LatentAttention
from tpu_stack.planner.simulate.constants import PRIOR, SERVE_PRIOR
from tpu_stack.planner.simulate.decode import (
    ServeJob,
    decode_step,
    prefill_seconds,
    weights_read,
)
from tpu_stack.planner.simulate.layout import Layout
from tpu_stack.planner.simulate.remat import Remat
from tpu_stack.planner.simulate.serve import Traffic, serve_throughput
from tpu_stack.planner.simulate.train import TrainJob, train_step

LLAMA = Architecture.of(get_preset("llama3_70b"))
IDEAL = PRIOR.with_changes(
    {"mxu_v5p": 1.0, "width_half": 1e-9, "flash": 1.0, "passes": 1e-9, "logit_passes": 1e-9}
)
JOB = TrainJob(LLAMA, Layout(get_chip("v5p"), 256, fsdp=256), 256, 4096)


def test_parameters_agree_with_the_model():
    for name in ("llama3_8b", "llama3_70b", "qwen3_0_6b", "gemma3_27b"):
        config = get_preset(name)
        found = Architecture.of(config).total_parameters
        assert found == pytest.approx(parameter_count(config), rel=1e-3), name


def test_matmul_time_is_flops_over_peak():
    """6 N per token without recompute: 8 less the unembedding's and the last MLP matmul's."""
    job = replace(JOB, remat=Remat.parse("none"))
    terms = train_step(job, IDEAL).terms
    body = LLAMA.matmul_parameters - LLAMA.table_parameters
    tokens = 256 * 4096 / 256
    assert terms["matmuls"] == pytest.approx(6 * body * tokens / 459e12)
    assert terms["logits"] == pytest.approx(6 * LLAMA.table_parameters * tokens / 459e12)


def test_a_full_recompute_adds_a_forward_pass_but_the_last_matmul():
    none = train_step(replace(JOB, remat=Remat.parse("none")), IDEAL).terms["matmuls"]
    full = train_step(JOB, IDEAL).terms["matmuls"]
    last = LLAMA.layers * LLAMA.d_model * LLAMA.d_ff
    body = LLAMA.matmul_parameters - LLAMA.table_parameters
    assert full / none == pytest.approx((8 * body - 2 * last) / (6 * body))


def test_terms_sum_to_the_step():
    step = train_step(JOB, PRIOR)
    assert sum(step.terms.values()) == pytest.approx(step.step_s)
    assert step.tokens_per_s_per_chip == pytest.approx(4096 / step.step_s)


def test_fewer_bits_are_faster_only_where_the_chip_multiplies_them():
    """v5p runs int8 at twice the rate; 7x has no integers and emulates them."""
    for chip, faster in (("v5p", True), ("7x", False)):
        layout = Layout(get_chip(chip), 256, fsdp=get_chip(chip).devices(256))
        bf16 = train_step(replace(JOB, layout=layout), PRIOR).step_s
        int8 = train_step(replace(JOB, layout=layout, activations="int8"), PRIOR).step_s
        assert (int8 < 0.95 * bf16) == faster, chip


def test_a_mesh_that_does_not_fill_the_chips_is_refused():
    with pytest.raises(UserError, match=r"fsdp=8 on 1 slice\(s\) has 8 devices; 16 v5e chips"):
        Layout(get_chip("v5e"), 16, fsdp=8)


def test_tensor_parallelism_shortens_a_decode_step_and_costs_throughput():
    jobs = [
        ServeJob(LLAMA, Layout(get_chip("v5e"), 16, data=data, tensor=16 // data), "int8")
        for data in (1, 2)
    ]
    wide, narrow = (sum(decode_step(j, 16, 2048, PRIOR, SERVE_PRIOR).values()) for j in jobs)
    assert wide < narrow < 2 * wide


def test_experts_that_no_row_is_sent_to_are_not_read():
    moe = replace(LLAMA, experts=64, active_experts=2, d_ff=1024)
    fixed = moe.total_parameters - moe.expert_parameters - moe.table_parameters
    assert weights_read(moe, 1) == pytest.approx(fixed + moe.expert_parameters * 2 / 64)
    assert weights_read(moe, 1000) == pytest.approx(fixed + moe.expert_parameters)


def latent_moe(tensor: int, expert: int = 1) -> ServeJob:
    """DeepSeek-like: 32 heads of latent attention, 64 experts of which 4 are active."""
    arch = replace(LLAMA, experts=64, active_experts=4, d_ff=1024, latent=LatentAttention(1536))
    return ServeJob(arch, Layout(get_chip("v5e"), 64, expert=expert, tensor=tensor))


def test_every_device_reads_a_latent_cache_and_the_projections_down_to_it():
    """Splitting experts over 4 groups of devices leaves neither: all 64 read both, as by heads."""
    split, heads = latent_moe(expert=4, tensor=16), latent_moe(tensor=64)
    alone = ServeJob(heads.architecture, Layout(get_chip("v5e"), 1))
    caches = [decode_step(j, 8, 8192, PRIOR, SERVE_PRIOR)["cache"] for j in (split, heads, alone)]
    assert caches == pytest.approx([caches[2]] * 3)
    arch = heads.architecture
    assert arch.down_parameters == arch.d_model * (1536 + 512 + 64)
    rate = get_chip("v5e").require("hbm_bytes_per_s") * SERVE_PRIOR.weights_hbm
    least = arch.layers * arch.down_parameters * 2 / rate
    weights = decode_step(heads, 1, 0, PRIOR, SERVE_PRIOR)["weights"]
    read_once = weights_read(arch, 1) - arch.layers * arch.down_parameters
    assert weights == pytest.approx(least + read_once * 2 / 64 / rate)


def test_a_step_waits_for_the_shard_whose_experts_were_hit_most():
    """Uneven with few rows, even once every expert is hit."""
    for rows, uneven in ((1, True), (4096, False)):
        jobs = latent_moe(tensor=64), latent_moe(expert=4, tensor=16)
        even, most = (decode_step(j, rows, 0, PRIOR, SERVE_PRIOR)["weights"] for j in jobs)
        assert (most > 1.01 * even) == uneven, rows


def test_routed_rows_move_as_fast_as_the_chip_reads_memory():
    moe = replace(LLAMA, experts=64, active_experts=4, d_ff=1024)
    none = SERVE_PRIOR.with_changes({"moe_layer_s": 0.0})
    v5e, v6e = (
        decode_step(ServeJob(moe, Layout(get_chip(chip), 8, tensor=8)), 64, 0, PRIOR, none)
        for chip in ("v5e", "v6e")
    )
    ratio = get_chip("v6e").require("hbm_bytes_per_s") / get_chip("v5e").require("hbm_bytes_per_s")
    assert v5e["experts"] / v6e["experts"] == pytest.approx(ratio)


def test_a_prompt_through_experts_pays_for_narrow_ones_and_for_permuting_rows():
    """Against a model whose MLP is as wide as all active experts: the same products otherwise."""
    chip = get_chip("v5e")
    dense = replace(LLAMA, d_ff=4 * 1024)
    moe = replace(LLAMA, experts=64, active_experts=4, d_ff=1024)
    found = {}
    for name, arch in (("dense", dense), ("moe", moe)):
        job = ServeJob(arch, Layout(chip, 8, tensor=8))
        found[name] = prefill_seconds(job, 1000, 1000, PRIOR) * 8
    rate = 197e12 * PRIOR.mxu("v5e") * 8192 / (8192 + PRIOR.width_half)
    products = 2 * 1000 * moe.active_expert_parameters / rate
    router = 2 * 1000 * moe.layers * moe.d_model * 64 / rate
    narrow = products / PRIOR.grouped_share(1024 / 8) - products
    permuted = 8 * 2 * 1000 * moe.layers * 4 * moe.d_model * 2
    permuted_s = permuted / (chip.require("hbm_bytes_per_s") * PRIOR.dispatch)
    assert found["moe"] - found["dense"] == pytest.approx(router + narrow + permuted_s, rel=1e-3)


def test_prompts_run_alone_are_padded():
    job = ServeJob(LLAMA, Layout(get_chip("v6e"), 8, tensor=8))
    none = SERVE_PRIOR.with_changes({"request_s": 0.0})
    chunks, alone = (
        serve_throughput(job, Traffic(64, 1000, 1000, chunked=chunked), PRIOR, none).terms
        for chunked in (True, False)
    )
    assert alone["prefill"] / chunks["prefill"] == pytest.approx(1.386, rel=1e-3)


def test_serving_is_slower_with_longer_prompts_and_short_runs():
    job = ServeJob(LLAMA, Layout(get_chip("v6e"), 8, tensor=8))

    def rate(**changes):
        traffic = replace(Traffic(64, 1000, 1000), **changes)
        return serve_throughput(job, traffic, PRIOR, SERVE_PRIOR).out_tokens_per_s_per_chip

    assert rate(input_len=4000) < rate()
    assert rate(requests=65) == pytest.approx(rate() * 65 / 128)
    assert rate(chunked=False) < rate()


def test_boardfly_and_torus_layouts_have_links():
    assert Layout(get_chip("8i"), 8, tensor=16).links("tensor").kind == "direct"
    assert Layout(get_chip("8t"), 64, fsdp=64).links("fsdp").kind == "ring"
