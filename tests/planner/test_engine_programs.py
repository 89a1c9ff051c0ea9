"""The server's own programs, as the planner compiles them."""

import jax
import pytest

from tpu_stack.errors import UserError
from tpu_stack.models.presets import get_preset
from tpu_stack.planner.aot.asked import ENGINE_PROGRAMS, Asked
from tpu_stack.planner.aot.compile import compile_program
from tpu_stack.planner.aot.request import make_request
from tpu_stack.planner.aot.result import Compiled
from tpu_stack.planner.engine_programs import trace_engine
from tpu_stack.planner.kernels.targets import has_compiler
from tpu_stack.planner.programs import compile_all
from tpu_stack.serving.paged.build import CHUNKS, PROMPTS
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile

NANO = get_preset("nano")


def traced(program, chips=2, mesh_words="data=1,tensor=2", batch=8):
    profile = get_profile(f"v6e:{chips}", "serve").with_mesh(mesh_words)
    mesh = make_mesh(profile.mesh, jax.devices("cpu"))
    return trace_engine(NANO, profile, "int4", program, batch=batch, context=200, mesh=mesh)


def flops(config, tokens, logits, seen):
    """The least and the most that products of a program have: with weights over `tokens`, logits
    of some, and attention, whose loops over pages are counted once or in full."""
    d, h = config.d_model, config.head_dim
    attention = 2 * d * h * (config.n_heads + config.n_kv_heads)
    mlp = (3 if config.gated_mlp else 2) * d * config.d_ff
    least = 2 * tokens * config.n_layers * (attention + mlp) + 2 * logits * d * config.vocab_size
    return least, least + 4 * tokens * seen * config.n_heads * h * config.n_layers


def test_a_decode_step_runs_one_token_of_each_slot_and_a_prefill_the_longest_chunks():
    tokens = CHUNKS[-1] * PROMPTS[-1]
    for program, sizes in (("engine-decode", (8, 8)), ("engine-prefill", (tokens, PROMPTS[-1]))):
        found = traced(program).flops.matmul_flops
        least, most = flops(NANO, *sizes, seen=256)  # 200 tokens take two pages of 128
        assert least <= found <= most


def test_each_slice_of_data_has_an_engine_of_its_own():
    one, both = traced("engine-decode"), traced("engine-decode", 4, "data=2,tensor=2", batch=16)
    assert dict(both.mesh.shape) == {"data": 1, "tensor": 2}
    assert both.flops.matmul_flops == one.flops.matmul_flops


def test_devices_talk_as_little_as_tensor_parallelism_needs():
    (program,) = compile_all([traced("engine-decode")])
    kinds = [c.kind for c in program.collectives if c.bytes >= 2 * 8 * NANO.d_model]
    assert kinds.count("all-reduce") == 2 * NANO.n_layers  # attention and MLP of each


def test_the_request_is_the_servers():
    asked = Asked("llama3_8b", "8i:2", "engine-decode", serve_batch=32, context=1000)
    request = make_request(asked)
    assert (request.profile.role, request.batch, request.context) == ("serve", 32, 1000)
    with pytest.raises(UserError, match="did you mean 'engine-decode'"):
        make_request(Asked("llama3_8b", "8i:2", "engine-decod"))


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs libtpu")
@pytest.mark.parametrize("program", ENGINE_PROGRAMS)
@pytest.mark.parametrize("mesh", ["data=1,tensor=4", "data=2,tensor=2"])
def test_the_compiler_takes_them_and_makes_no_second_cache(program, mesh, tmp_path):
    config = get_preset("qwen3_0_6b").replace(n_layers=2)
    asked = Asked("qwen3_0_6b", "v6e:2x2", program, mesh, serve_batch=16, context=4096)
    request = make_request(asked, config)
    result = compile_program(request, cache=tmp_path)
    assert isinstance(result, Compiled)
    tensor, data = request.profile.mesh["tensor"], request.profile.mesh["data"]
    tokens = 16 // data * 4096
    cache = 2 * 2 * 2 * tokens * config.n_kv_heads // tensor * config.head_dim
    assert result.memory.arguments > cache
    assert result.memory.aliased >= cache
    assert result.memory.temporaries < cache // 4
    if program == "engine-decode":
        # State counts tokens per row; weights, of four bits, take less than this table in bfloat16.
        table = 2 * config.vocab_size * config.d_model
        assert result.memory.arguments < cache + 16 // data * config.vocab_size * 8 + table
