"""Checksums of sharded arrays that do not depend on how they are sharded.

Each is two 32-bit sums, modulo 2**32, of every element's bits mixed with its global index. Integer
sums are exact in any order, so a tensor saved from one mesh verifies on another without gathering
it. The mixing is one-to-one in the bits, so a change of any one element always changes the sums;
it is not linear, so that elements which change places do not cancel (a sum of bits times an
odd weight per index misses moved rows of round numbers).

>>> tree_checksums({"w": np.arange(4, dtype=np.int32)})
{'w': '...'}
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from tpu_stack.errors import UserError

_SALT = 0x9E3779B1


def leaf_names(tree: Any) -> list[str]:
    """Dotted path of every leaf, in flattening order."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def _is_summable(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return False
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return True
    whole_bytes = leaf.dtype == jnp.bool_ or jax.dtypes.itemsize_bits(leaf.dtype) % 8 == 0
    return whole_bytes and leaf.dtype.itemsize in (1, 2, 4)


def _words(x: Array) -> UInt32[Array, "..."]:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)


def _checksum(x: Array) -> UInt32[Array, "2"]:
    words = _words(x)
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(words.ndim)):
        counter = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
        index += counter * jnp.uint32(stride % 2**32)
        stride *= words.shape[dim]
    first = _mix(words ^ _mix(index))
    second = _mix(first ^ jnp.uint32(_SALT))
    return jnp.stack([jnp.sum(term, dtype=jnp.uint32) for term in (first, second)])


def _mix(x: Array) -> Array:
    """MurmurHash3's 32-bit finalizer (Appleby 2011): one-to-one, every bit moved by every other."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


_TOGETHER = 2**20
"""Elements up to which leaves share a program; larger ones go one by one, as each may take its own
size in temporaries."""


@jax.jit
def _checksums(leaves: list[Array]) -> UInt32[Array, "n 2"]:
    return jnp.stack([_checksum(leaf) for leaf in leaves])


def _in_turn(leaves: list[Array]) -> list[Any]:
    """The sums of every leaf, on the host."""
    small = [i for i, leaf in enumerate(leaves) if leaf.size <= _TOGETHER]
    sums: dict[int, Any] = {}
    if small:
        sums.update(zip(small, jax.device_get(_checksums([leaves[i] for i in small])), strict=True))
    for i, leaf in enumerate(leaves):
        if i not in sums:
            sums[i] = jax.device_get(_checksums([leaf]))[0]
    return [sums[i] for i in range(len(leaves))]


def tree_checksums(tree: Any) -> dict[str, str]:
    """Leaf name -> 16 hexadecimal digits. Leaves are arrays of 1, 2 or 4 byte elements, or keys.

    Raises UserError naming a leaf of another kind.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return {}
    for name, leaf in zip(leaf_names(tree), leaves, strict=True):
        if not _is_summable(leaf):
            raise UserError(
                f"{name} is {getattr(leaf, 'dtype', type(leaf).__name__)}; a checkpoint's tensors"
                " have elements of 1, 2 or 4 bytes"
            )
    sums = _in_turn(leaves)
    return {
        name: f"{int(a):08x}{int(b):08x}"
        for name, (a, b) in zip(leaf_names(tree), sums, strict=True)
    }


def damaged(tree: Any, expected: dict[str, str]) -> list[str]:
    """Names of the leaves whose checksum differs from `expected` or is missing there."""
    found = tree_checksums(tree)
    return [name for name, value in found.items() if expected.get(name) != value]
