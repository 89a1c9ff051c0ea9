"""Checksums see every single changed element, and do not see the mesh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tpu_stack.checkpoint import checksums
from tpu_stack.checkpoint.checksums import damaged, leaf_names, tree_checksums
from tpu_stack.sharding.mesh import make_mesh

DTYPES = [
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
]
SHAPE = (3, 8, 5)


def sum_of(array) -> str:
    return tree_checksums({"w": array})["w"]


def by_hand(array: np.ndarray) -> str:
    """The module's definition, one element at a time, in Python integers."""
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    words = array.reshape(-1).view(width).tolist()

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    first = [mix(word ^ mix(index)) for index, word in enumerate(words)]
    second = [mix(value ^ 0x9E3779B1) for value in first]
    return f"{sum(first) % 2**32:08x}{sum(second) % 2**32:08x}"


def sample(dtype: str) -> np.ndarray:
    values = np.random.default_rng(0).integers(-100, 100, SHAPE)
    return np.asarray(jnp.asarray(values).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_sum_of_the_mixed_bits(dtype):
    assert sum_of(jnp.asarray(sample(dtype))) == by_hand(sample(dtype))


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from([d for d in DTYPES if d != "bool"]),
    element=st.integers(0, int(np.prod(SHAPE)) - 1),
    bits=st.integers(1, 2**32 - 1),
)
def test_any_change_of_one_element_is_seen(dtype, element, bits):
    """Whichever of its bits change: a sign of zero and the payload of a NaN count too."""
    before = sample(dtype)
    after = before.copy()
    words = after.reshape(-1).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[after.dtype.itemsize])
    flip = bits % (np.iinfo(words.dtype).max) + 1
    words[element] ^= words.dtype.type(flip)
    expected = tree_checksums({"w": before, "other": before})
    assert damaged({"w": after, "other": before}, expected) == ["w"]


@settings(deadline=None, max_examples=60)
@given(array=hnp.arrays(np.float32, (4, 6), elements=st.floats(width=32)), seed=st.integers(0, 99))
def test_moved_rows_are_seen(array, seed):
    """Round numbers too: their low bits are zeros, which cancel in sums linear in the bits."""
    order = np.random.default_rng(seed).permutation(4)
    if not np.array_equal(array[order].view(np.uint32), array.view(np.uint32)):
        assert sum_of(array[order]) != sum_of(array)


def test_swapped_halves_of_round_numbers_are_seen():
    array = np.zeros((1024, 256), np.float32)
    array[512:] = 1.0
    assert sum_of(array[::-1]) != sum_of(array)
    assert sum_of(np.ones((4, 4), np.float32)) != sum_of(np.ones((4, 5), np.float32))


def test_zero_filled_and_transposed_arrays_are_seen():
    array = np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32)
    blank = array.copy()
    blank[4:8] = 0
    assert len({sum_of(array), sum_of(blank), sum_of(array.T), sum_of(np.roll(array, 1))}) == 4


@pytest.mark.parametrize(
    "spec", [P("a", "b"), P("b", "a"), P(None, ("a", "b")), P(("b", "a")), P()]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_sharding_does_not_matter(spec, dtype):
    mesh = make_mesh({"a": 2, "b": 4})
    array = jnp.asarray(np.random.default_rng(2).integers(-99, 99, (16, 24))).astype(dtype)
    assert sum_of(jax.device_put(array, NamedSharding(mesh, spec))) == sum_of(array)


def test_names_keys_scalars_and_empty_arrays():
    tree = {"b": {"w": jnp.float32(3)}, "a": (jnp.zeros((0, 4)), jax.random.key(1))}
    found = tree_checksums(tree)
    assert list(found) == leaf_names(tree) == ["a.0", "a.1", "b.w"]
    assert found["a.0"] == "0" * 16
    assert found["a.1"] == sum_of(jax.random.key_data(jax.random.key(1)))
    assert found["a.1"] != sum_of(jax.random.key(2))
    assert tree_checksums({}) == {}


def test_a_tensor_without_a_checksum_counts_as_damaged():
    tree = {"w": jnp.ones(3), "v": jnp.ones(3)}
    expected = tree_checksums(tree)
    del expected["v"]
    assert damaged(tree, expected) == ["v"]
    chex.assert_trees_all_equal(damaged(tree, tree_checksums(tree)), [])


def test_leaves_that_go_one_by_one_have_the_same_sums(monkeypatch):
    """Large leaves have programs of their own, so that memory holds one's temporaries at a time."""
    tree = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(3, jnp.int8), "c": jnp.zeros(())}
    together = tree_checksums(tree)
    monkeypatch.setattr(checksums, "_TOGETHER", 3)
    assert tree_checksums(tree) == together
