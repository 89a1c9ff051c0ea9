"""Collectives of real XLA:CPU programs against formulas derived by hand.

The model is L scanned layers y = x + relu(x @ W1) @ W2 with W1 [D, F] and W2 [F, D], batch B, in
float32, on a (data, fsdp, tensor) mesh of 2 x 2 x 2. Writing d, f, t for the axis sizes:

- fsdp shards D of both weights: each use gathers a whole weight, D*F/t elements;
- tensor shards F: each layer sums the second product over tensor, B/(d*f)*D elements;
- the gradient gathers again, sums dx over tensor once, and each weight gradient is
  reduce-scattered over fsdp (input D*F/t elements) and all-reduced over data (D*F/(t*f)).

Every axis shards something in every case: given an idle axis, XLA moves weights onto it (a
collective-permute and an all-reduce over the idle axis) rather than gather them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tpu_stack.planner.hlo import Collective, CollectiveRow, collectives, summarize

L, D, F, B = 3, 256, 512, 64
AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")


def _mesh(order: tuple[int, ...] = tuple(range(8))) -> Mesh:
    return Mesh(np.array(jax.devices())[list(order)].reshape(2, 2, 2), AXES)


def _text(compiled: jax.stages.Compiled) -> str:
    text = compiled.as_text()
    assert text is not None
    return text


def _compile(mesh, fsdp: str | None, tensor: str | None, batch, *, grad, dtype=jnp.float32) -> str:
    def sharding(*spec):
        return NamedSharding(mesh, P(*spec))

    def forward(weights, x):
        def layer(x, w):
            y = jax.nn.relu(x @ w[0]) @ w[1]
            return x + jax.lax.with_sharding_constraint(y, sharding(batch, None)), None

        return jax.lax.scan(layer, x, weights)[0]

    def step(weights, x):
        grads = jax.grad(lambda w: jnp.sum(forward(w, x).astype(jnp.float32) ** 2))(weights)
        return jax.tree.map(lambda w, g: w - 0.1 * g.astype(w.dtype), weights, grads)

    def array(shape, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(*spec))

    weights = (array((L, D, F), None, fsdp, tensor), array((L, F, D), None, tensor, fsdp))
    out = tuple(w.sharding for w in weights) if grad else sharding(batch, None)
    function = jax.jit(step if grad else forward, out_shardings=out)
    return _text(function.lower(weights, array((B, D), batch, None)).compile())


def _rows(found: list[Collective]) -> dict[tuple[str, str], CollectiveRow]:
    return {(r.kind, r.axes_label): r for r in summarize(found, as_written=True)}


def _figures(found: list[Collective]) -> dict[tuple[str, str], int]:
    return {key: row.bytes for key, row in _rows(found).items()}


def test_forward_fsdp():
    mesh = _mesh()
    found = collectives(_compile(mesh, "fsdp", None, AXES, grad=False), mesh)
    assert {c.kind for c in found} == {"all-gather"}
    assert all(c.bytes == D * F * 4 and c.trips == L and c.group_size == 2 for c in found)
    assert _figures(found) == {("all-gather", "fsdp"): 2 * L * D * F * 4}
    assert _rows(found)["all-gather", "fsdp"].count == 2 * L
    assert "while/body" in found[0].op_name


def test_forward_tensor():
    mesh = _mesh()
    found = collectives(_compile(mesh, None, "tensor", "data", grad=False), mesh)
    assert _figures(found) == {("all-reduce", "tensor"): L * (B // 2) * D * 4}
    assert found[0].wire_bytes == 2 * found[0].bytes * (2 - 1) / 2


def test_forward_both():
    mesh = _mesh()
    found = collectives(_compile(mesh, "fsdp", "tensor", BATCH, grad=False), mesh)
    assert _figures(found) == {
        ("all-gather", "fsdp"): 2 * L * D * F // 2 * 4,
        ("all-reduce", "tensor"): L * (B // 4) * D * 4,
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_both(dtype):
    """In bfloat16 XLA:CPU moves float32; as written, the bytes are those of bfloat16."""
    mesh, width = _mesh(), jnp.dtype(dtype).itemsize
    found = collectives(_compile(mesh, "fsdp", "tensor", BATCH, grad=True, dtype=dtype), mesh)
    weight = D * F // 2 * width
    assert _figures(found) == {
        ("all-gather", "fsdp"): 4 * L * weight,
        ("all-reduce", "tensor"): 2 * L * (B // 4) * D * width,
        ("reduce-scatter", "fsdp"): 2 * L * weight,
        ("all-reduce", "data"): 2 * L * weight // 2,
    }
    scattered = [c for c in found if any(p.kind == "reduce-scatter" for p in c.as_written)]
    assert {c.kind for c in scattered} == {"all-reduce"}
    assert all("written as reduce-scatter" in c.notes[-1] for c in scattered)
    assert {c.dtype for c in found} == {"f32"}


def test_gradient_fsdp():
    mesh = _mesh()
    figures = _figures(collectives(_compile(mesh, "fsdp", None, AXES, grad=True), mesh))
    assert figures == {
        ("all-gather", "fsdp"): 4 * L * D * F * 4,
        ("reduce-scatter", "fsdp"): 2 * L * D * F * 4,
        ("all-reduce", "data+tensor"): 2 * L * D * F // 2 * 4,
    }


def test_gradient_tensor():
    mesh = _mesh()
    figures = _figures(collectives(_compile(mesh, None, "tensor", BATCH, grad=True), mesh))
    assert figures == {
        ("all-reduce", "tensor"): 2 * L * (B // 4) * D * 4,
        ("all-reduce", "data+fsdp"): 2 * L * D * F // 2 * 4,
    }


def _every_kind(mesh: Mesh) -> str:
    def body(x, w):
        def turn(c, _):
            return jax.lax.ppermute(c, "tensor", [(0, 1), (1, 0)]) * 2, None

        return (
            jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True),
            jax.lax.all_gather(w, ("data", "tensor"), axis=0, tiled=True),
            jax.lax.all_to_all(x, "tensor", 0, 1, tiled=True),
            jax.lax.ppermute(w, "data", [(0, 1), (1, 0)]),
            jax.lax.psum(x @ w, BATCH),
            jax.lax.scan(lambda c, _: jax.lax.scan(turn, c, None, length=3), w, None, length=5)[0],
        )

    x = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(P(), P()), out_specs=(P(),) * 6, check_vma=False
    )
    return _text(jax.jit(mapped).lower(x, x).compile())


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5, 6, 7), (3, 1, 2, 0, 7, 6, 4, 5)])
def test_every_kind_and_positions_not_hardware_ids(order):
    """Groups number positions in mesh.devices.flat: permuting the devices changes nothing."""
    mesh, payload = _mesh(order), 128 * 128 * 4
    figures = _figures(collectives(_every_kind(mesh), mesh))
    assert figures == {
        ("reduce-scatter", "fsdp"): payload,
        ("all-gather", "data+tensor"): 4 * payload,
        ("all-to-all", "tensor"): payload,
        ("collective-permute", "data"): payload,
        ("all-reduce", "data+fsdp"): payload,
        ("collective-permute", "tensor"): 3 * 5 * payload,
    }


def test_int4_is_moved_as_bytes_but_written_as_int4():
    mesh = _mesh()
    mapped = jax.shard_map(
        lambda w: jax.lax.all_gather(w, "fsdp", axis=0, tiled=True),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    text = _text(jax.jit(mapped).lower(jax.ShapeDtypeStruct((64, 64), jnp.int4)).compile())
    (gather,) = collectives(text, mesh)
    assert (gather.dtype, gather.bytes) == ("s8", 2 * 64 * 64)
    assert [(p.dtype, p.bytes) for p in gather.as_written] == [("s4", 64 * 64)]


def _permute_while(limit: int | None) -> str:
    """A while loop whose limit is a constant, or an argument when `limit` is None."""
    mesh = _mesh()

    def body(x, n):
        stop = n if limit is None else limit

        def turn(c):
            return c[0] + 2, jax.lax.ppermute(c[1], "fsdp", [(0, 1), (1, 0)]) + 1

        return jax.lax.while_loop(lambda c: c[0] < stop, turn, (jnp.int32(1), x))[1]

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    x, n = jax.ShapeDtypeStruct((8,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    return _text(jax.jit(mapped).lower(x, n).compile())


def test_while_with_constant_limit():
    (permute,) = collectives(_permute_while(10), _mesh())
    assert permute.trips == 5  # 1, 3, 5, 7, 9


def test_unknown_trip_count_is_reported():
    (permute,) = collectives(_permute_while(None), _mesh())
    assert permute.trips is None
    assert permute.total_bytes is None
    assert "trip count unknown" in permute.notes[0]
    (row,) = summarize([permute])
    assert (row.sites, row.unknown_sites, row.count, row.bytes) == (1, 1, 0, 0)


def test_conditional_counts_its_largest_branch():
    mesh = _mesh()

    def body(x, n):
        def big(v):
            return jax.lax.psum(v, "data")

        def small(v):
            return v + jax.lax.psum(v[:1], "tensor")

        return jax.lax.cond(n > 0, big, small, x)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    x, n = jax.ShapeDtypeStruct((64,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    text = _text(jax.jit(mapped).lower(x, n).compile())
    (reduce,) = collectives(text, mesh)
    assert (reduce.kind, reduce.axes, reduce.bytes) == ("all-reduce", ("data",), 64 * 4)
    assert "largest of 2 branches" in reduce.notes[0]


def test_wrong_mesh_and_wrong_text_raise():
    text = _text(jax.jit(lambda x: x + 1).lower(1.0).compile())
    with pytest.raises(ValueError, match="compiled for 1 devices"):
        collectives(text, _mesh())
    with pytest.raises(ValueError, match="ENTRY"):
        collectives("not a program", _mesh())
