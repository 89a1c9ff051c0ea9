"""Bytes per tensor on both sides and bytes that move, against figures derived by hand."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P

from tpu_stack.errors import UserError
from tpu_stack.models.abstract import parameter_count, tensor_specs
from tpu_stack.models.presets import PRESETS, get_preset
from tpu_stack.planner.request import make_request
from tpu_stack.planner.tensors import abstract_mesh, reshard_bytes, tensor_rows
from tpu_stack.quant.qtensor import QTensor
from tpu_stack.serving.layout import PackedLayout, with_groups
from tpu_stack.sharding.profiles import get_profile
from tpu_stack.training.config import OptimizerConfig
from tpu_stack.training.layout import StateLayout
from tpu_stack.training.optimizer import make_optimizer


def _rows(format: str = "int4"):
    """nano, L=6 D=192 F=512, on fsdp 4 x tensor 2 and on data 4 x tensor 2."""
    train = get_profile("8t:8", "train").with_mesh("fsdp=4,tensor=2")
    serve = get_profile("8i:4", "serve").with_mesh("data=4,tensor=2")
    rows = tensor_rows(get_preset("nano"), train, serve, format)
    return train, serve, {row.spec.name: row for row in rows}


def test_a_matrix_by_hand():
    row = _rows()[2]["blocks.mlp.w_up"]
    assert row.train_spec == P(None, "fsdp", "tensor")
    assert row.serve_spec == P(None, None, "tensor")
    assert row.train_elements == 6 * 192 * 512 // 8
    assert row.gathered_elements == 6 * 192 * 512 // 2
    assert row.master_bytes == 4 * row.train_elements
    assert row.state_bytes == 3 * row.master_bytes  # float32 weights, mu and nu
    nibbles, scales = 6 * 192 * 256 // 2, 6 * (192 // 32) * 256 * 2
    assert (row.serve_format, row.serve_bytes) == ("int4", nibbles + scales)
    assert row.reshard_bytes == 4 * 6 * 192 * 256  # all of it: 8i devices hold nothing of 8t's
    assert row.reshard_total_bytes == 8 * row.reshard_bytes


def test_tables_and_norms_by_hand():
    rows = _rows()[2]
    embed, norm = rows["embed"], rows["blocks.mlp_norm.scale"]
    assert (embed.serve_format, embed.serve_bytes) == ("int8", 1024 * 192 + 1024 * 4)
    assert embed.state_bytes == 3 * 4 * 2048 * 192 // 8
    assert norm.train_spec == P(None, None)
    assert (norm.master_bytes, norm.serve_bytes) == (6 * 192 * 4, 6 * 192 * 2)
    assert norm.serve_format == "bf16"


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_bytes_agree_with_what_training_and_serving_place(format):
    train, serve, rows = _rows(format)
    config = get_preset("nano")
    optimizer = make_optimizer(OptimizerConfig(), 1, config)
    state = StateLayout.of(config, optimizer, train, abstract_mesh(train))  # pyright: ignore
    weights = (state.abstract.params, state.abstract.opt_state)
    placed = sum(
        4 * leaf.sharding.shard_shape(leaf.shape)[0] * leaf.size // leaf.shape[0]
        if leaf.ndim == 1
        else 4 * _elements(leaf)
        for leaf in jax.tree.leaves(weights)
        if leaf.ndim
    )
    assert sum(row.state_bytes for row in rows.values()) == placed
    layout = PackedLayout.of(config, format, serve, abstract_mesh(serve))  # pyright: ignore
    packed = jax.tree.leaves(layout.abstract, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    assert sum(row.serve_bytes for row in rows.values()) == sum(map(_packed_bytes, packed))


def _elements(leaf) -> int:
    size = 1
    for part in leaf.sharding.shard_shape(leaf.shape):
        size *= part
    return size


def _packed_bytes(leaf) -> int:
    def shard(x):
        return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)

    local = jax.tree.map(shard, leaf)
    return local.nbytes_packed if isinstance(local, QTensor) else local.size * 2


def test_resharding_between_different_machines_moves_all_that_is_needed():
    train = get_profile("v5p:4", "train").with_mesh("fsdp=2,tensor=2")
    serve = get_profile("8i", "serve").with_mesh("data=2,tensor=2")
    each, total = reshard_bytes((8, 8), train, P("fsdp", "tensor"), serve, P(None, "tensor"))
    assert (each, total) == (4 * 8 * 4, 4 * 4 * 8 * 4)


def test_resharding_on_the_same_machine_keeps_what_is_in_place():
    """Device (i, j) holds rows half i, columns half j, and needs all rows of columns half j."""
    train = get_profile("v5p:4", "train").with_mesh("fsdp=2,tensor=2")
    serve = get_profile("v5p:4", "serve").with_mesh("data=2,tensor=2")
    each, total = reshard_bytes((8, 8), train, P("fsdp", "tensor"), serve, P(None, "tensor"))
    assert (each, total) == (4 * 4 * 4, 4 * 4 * 4 * 4)
    same = get_profile("v5p:4", "train").with_mesh("tensor=4")
    tensor = get_profile("v5p:4", "serve").with_mesh("tensor=4")
    assert reshard_bytes((8, 8), same, P(None, "tensor"), tensor, P(None, "tensor")) == (0, 0)


def test_resharding_counts_the_worst_device():
    """Columns in halves over fsdp become rows in halves over tensor: a quarter is in place."""
    train = get_profile("v5p:2", "train").with_mesh("fsdp=2")
    serve = get_profile("v5p:2", "serve").with_mesh("tensor=2")
    each, total = reshard_bytes((8, 8), train, P(None, "fsdp"), serve, P("tensor", None))
    assert (each, total) == (4 * (32 - 16), 2 * 4 * (32 - 16))


def test_llama3_8b_in_int4():
    request = make_request("llama3_8b", "8t:4x4x4", "8i:8")
    rows = tensor_rows(request.config, request.train, request.serve, "int4")
    table = 128_256 * 4096
    norms = 4096 * (2 * 32 + 1)
    matrices = parameter_count(request.config) - table - norms
    over_tensor = matrices * 4.5 / 8 + table + 128_256 * 4
    assert dict(request.serve.mesh) == {"data": 2, "tensor": 8}
    assert request.serve_mesh_by == "Profile.fit"
    assert sum(row.serve_bytes for row in rows) == over_tensor / 8 + norms * 2
    sharded = parameter_count(request.config) - norms
    assert sum(row.state_bytes for row in rows) == 12 * (sharded // 64 + norms)


@pytest.mark.parametrize("model", sorted(PRESETS))
@pytest.mark.parametrize(("train", "serve"), [("8t:4x4x4", "8i:8"), ("v5p:4x4x4", "v6e:4x4")])
def test_every_preset_finds_meshes_that_its_groups_divide(model, train, serve):
    request = make_request(model, train, serve)
    rows = tensor_rows(request.config, request.train, request.serve, "int4")
    assert [row.spec for row in rows] == list(tensor_specs(request.config))
    assert all(row.serve_bytes > 0 for row in rows)


def test_a_mesh_must_not_cut_the_groups_of_a_format():
    config = get_preset("nano").replace(d_ff=96)  # three groups of 32
    specs = {spec.name: spec for spec in with_groups(config, "int4")}
    assert specs["blocks.mlp.w_down"].granules == (1, 32, 1)
    assert specs["blocks.attention.wo"].granules == (1, 64, 1)  # whole heads already
    serve = get_profile("8i:1", "serve")
    assert dict(serve.fit(with_groups(config, "int4")).mesh) == {"data": 2, "tensor": 1}
    with pytest.raises(UserError, match=r"w_down.*tensor=2"):
        dataclasses.replace(serve, mesh={"data": 1, "tensor": 2}).check(specs.values())
