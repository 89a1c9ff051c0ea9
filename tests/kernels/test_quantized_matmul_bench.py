"""The bench: what a case's name says, what a peer is and refuses, and who is faster."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_stack.kernels.compiled import estimated_cycles
from tpu_stack.kernels.quantized_matmul import bench, reference_quantized_matmul
from tpu_stack.kernels.quantized_matmul.cases import FORMATS, random_operands
from tpu_stack.kernels.quantized_matmul.peers import make_peer

SHAPE = (16, 512, 256)
needs_qwix = pytest.mark.skipif(
    importlib.util.find_spec("qwix") is None, reason="needs qwix, an optional peer"
)


def test_a_case_names_its_parts():
    assert bench.parse("int4") == ("", "int4", "bfloat16", "")
    assert bench.parse("int2@int8:before") == ("", "int2", "int8", "before")
    assert bench.parse("qwix_dot:int8@int8") == ("qwix_dot", "int8", "int8", "")
    assert bench.parse("jax:bf16").peer == "jax"


@pytest.mark.parametrize("case", ["int5", "bf16", "xla:int5", "int4@int5", "other:int4"])
def test_a_case_that_does_not_exist_is_refused(case):
    with pytest.raises(ValueError, match=r"no (format|activation)"):
        bench.parse(case)


@pytest.mark.parametrize(
    ("peer", "case"),
    [
        *(("xla", case) for case in ("int4", "nvfp4", "int2", "int1", "int8@int8")),
        pytest.param("qwix_dot", "int4", marks=needs_qwix),
        pytest.param("qwix_dot", "int8@int8", marks=needs_qwix),
    ],
)
def test_a_peer_computes_the_same_product(peer, case):
    _, name, activation, _ = bench.parse(case)
    x, values, scales, keywords = random_operands(FORMATS[name], activation, *SHAPE)
    arrays = {key: keywords[key] for key in keywords if key != "offset"}
    made = make_peer(peer, name, activation, SHAPE)
    flat = scales.astype(jnp.float32).reshape(-1, SHAPE[2])
    given = (scales, arrays) if peer == "xla" else (flat, arrays.get("x_scales"))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), given, made.operands[2:])
    y = np.asarray(jax.jit(made.function)(x, values, *given), np.float64)
    exact = np.asarray(reference_quantized_matmul(x, values, scales, **keywords), np.float64)
    # bfloat16 weights and result: 2**-9 each at most, 2**-9 / sqrt(3) apiece in the mean square.
    assert np.linalg.norm(y - exact) <= 2**-8 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("peer", "name", "shape", "says"),
    [
        ("jax", "int4", SHAPE, "takes only bf16"),
        ("jax", "bf16", (16, 1500, 256), "multiples of its blocks"),
        pytest.param("qwix", "int4", SHAPE, "multiplies int8 by int8", marks=needs_qwix),
        pytest.param("qwix_dot", "int2", SHAPE, "no half-offset", marks=needs_qwix),
        pytest.param("qwix_dot", "int1", SHAPE, "no packed signs", marks=needs_qwix),
        ("qwix", "bf16", SHAPE, "takes only quantized weights"),
    ],
)
def test_a_peer_refuses_what_it_does_not_take(peer, name, shape, says):
    with pytest.raises(ValueError, match=says):
        make_peer(peer, name, "bfloat16", shape)


def test_cycles_at_the_peak_are_those_of_the_slower_type():
    shape = [2048, 4096, 14336]
    bf16 = bench.mxu_cycles("int8", "v6e", shape, ("bfloat16", "bfloat16"))
    assert bf16 == round(2 * 2048 * 4096 * 14336 / 920e12 * 1.75e9)
    assert bench.mxu_cycles("int8@int8", "v6e", shape, ("int8", "int8")) == round(bf16 / 2)
    assert bench.mxu_cycles("int8@int8", "v6e", shape, ("bfloat16", "int8")) == bf16
    assert bench.mxu_cycles("qwix:int8@int8", "v6e", shape, ()) == round(bf16 / 2)
    assert bench.mxu_cycles("xla:int8@int8", "7x", shape, ()) == round(
        2 * 2048 * 4096 * 14336 / 1155e12 * 2.2e9  # no such unit there
    )


def test_where_xla_knows_no_estimate_there_is_none():
    line = '"estimated_cycles":"{}"'
    assert estimated_cycles(line.format(7) + line.format(5)) == 12
    assert estimated_cycles(line.format(7) + line.format(2**63 - 1)) is None
    assert estimated_cycles("no fusion") is None


def test_ratios_are_of_one_product_on_one_chip():
    cycles = [
        ("v6e", "int4", 50), ("v6e", "xla:int4", 200), ("v6e", "xla:bf16", 100),
        ("7x", "xla:int4", 1), ("v6e", "xla:int4@int8", 1), ("v6e", "int8@int8", 110),
    ]  # fmt: skip
    rows = [{"chip": chip, "case": case, "cycles": count} for chip, case, count in cycles]
    rows.append({"chip": "v6e", "case": "qwix:int4", "error": "refused"})
    lines = bench.add_ratios(rows)
    assert rows[0]["ratios"] == {"xla:int4": 0.25, "xla:bf16": 0.5}
    assert rows[5]["ratios"] == {"xla:bf16": 1.1}
    assert [line.endswith("SLOWER") for line in lines] == [False, True]
