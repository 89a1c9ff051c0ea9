"""The serving engine's programs, as the planner traces and compiles them."""

import pytest

from tpu_stack.cli.main import main
from tpu_stack.errors import UserError
from tpu_stack.models.presets import get_preset
from tpu_stack.planner import serve_programs
from tpu_stack.planner.aot.compile import compile_program
from tpu_stack.planner.aot.request import make_request
from tpu_stack.planner.aot.result import Compiled
from tpu_stack.planner.aot.spec import CompileSpec
from tpu_stack.planner.hlo import summarize
from tpu_stack.planner.kernels.targets import has_compiler
from tpu_stack.planner.programs import compile_all
from tpu_stack.planner.serve_programs import SERVE_PROGRAMS, trace_serve
from tpu_stack.sharding.profiles import get_profile

NANO = get_preset("nano")
EXPERTS = NANO.replace(n_layers=2, n_experts=4, experts_per_token=2)
LOCAL = NANO.replace(n_layers=2, block_pattern=("local", "global"), window=128)


def traced(config=NANO, mesh="data=1,tensor=2", batch=8, programs=SERVE_PROGRAMS):
    profile = get_profile("v6e", "serve").with_mesh(mesh)
    return trace_serve(
        config, profile, "int4", batch=batch, context=200, prompt=180, programs=programs
    )


def communication(programs):
    """Of each program: kind, axes, count and bytes of its collectives, as written."""
    return {
        program.name: sorted(
            (row.kind, row.axes, row.count, row.bytes, row.unknown_sites)
            for row in summarize(program.collectives, as_written=True)
        )
        for program in compile_all(programs)
    }


@pytest.mark.parametrize("config", [NANO.replace(n_layers=2), EXPERTS, LOCAL])
def test_stacked_weights_are_the_program_of_layers_run_in_turn(config, monkeypatch):
    """What the emulated mesh compiles, against what the engine runs: the same collectives and the
    same products, layer by layer."""
    stacked = traced(config)
    inside = serve_programs.PackedLayout.of

    class InLayers:
        @staticmethod
        def of(*args):
            layout = inside(*args)
            return type("Layout", (), {"abstract": serve_programs.per_layer(layout.abstract)})

    monkeypatch.setattr(serve_programs, "PackedLayout", InLayers)
    in_turn = traced(config)
    assert [p.flops.matmul_flops for p in stacked] == [p.flops.matmul_flops for p in in_turn]
    assert communication(stacked) == communication(in_turn)


def test_each_slice_of_data_has_an_engine_of_its_own():
    one, both = traced(), traced(mesh="data=2,tensor=2", batch=16)
    for alone, of_two in zip(one, both, strict=True):
        assert dict(of_two.mesh.shape) == {"data": 1, "tensor": 2}
        assert of_two.flops.matmul_flops == 2 * alone.flops.matmul_flops
        assert not of_two.shrunk


def test_devices_talk_as_little_as_tensor_parallelism_needs():
    (program,) = compile_all(traced(programs=("decode",)))
    large = [c for c in program.collectives if c.bytes >= 2 * 8 * NANO.d_model]
    # attention and MLP of each layer; the logits are gathered; rows of the embedding are int8
    assert sum(c.trips or 0 for c in large if c.kind == "all-reduce") == 2 * NANO.n_layers
    assert [c.kind for c in large if c.kind != "all-reduce"] == ["all-gather"]


def test_a_program_that_was_renamed_names_the_new_one(capsys):
    spec = CompileSpec("llama3_8b", "8i:4", "decode", serve_batch=32, context=1000)
    request = make_request(spec)
    assert (request.profile.role, request.batch, request.context) == ("serve", 32, 1000)
    for old, new in (("engine-decode", "decode"), ("engine-prefill", "prefill")):
        with pytest.raises(UserError, match=f"did you mean '{new}'"):
            make_request(CompileSpec("llama3_8b", "8i:4", old))
    with pytest.raises(SystemExit) as stop:
        main(["plan", "compile", "--program", "engine-decode"])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "engine-decode" in error
    assert "decode" in error.replace("engine-decode", "")


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs libtpu")
@pytest.mark.parametrize("program", SERVE_PROGRAMS)
@pytest.mark.parametrize("mesh", ["data=1,tensor=4", "data=2,tensor=2"])
def test_the_compiler_takes_them_and_makes_no_second_cache(program, mesh, tmp_path):
    config = get_preset("qwen3_0_6b").replace(n_layers=2)
    spec = CompileSpec("qwen3_0_6b", "v6e:2x2", program, mesh, serve_batch=16, context=4096)
    request = make_request(spec, config)
    result = compile_program(request, cache=tmp_path)
    assert isinstance(result, Compiled)
    tensor, data = request.profile.mesh["tensor"], request.profile.mesh["data"]
    tokens = 16 // data * 4096
    cache = 2 * 2 * 2 * tokens * config.n_kv_heads // tensor * config.head_dim
    assert result.memory.arguments > cache
    assert result.memory.aliased >= cache
    assert result.memory.temporaries < cache // 4
    if program == "decode":
        # State counts tokens per row; weights, of four bits, take less than this table in bfloat16.
        table = 2 * config.vocab_size * config.d_model
        assert result.memory.arguments < cache + 16 // data * config.vocab_size * 8 + table
