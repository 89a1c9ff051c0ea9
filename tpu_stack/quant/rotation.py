"""Block-Hadamard rotation: spreads outliers over a block, so that a group's scale fits them.

Rows are mixed in blocks of a power of two by Sylvester's Hadamard matrix over the root of its size:
symmetric and orthonormal, hence its own inverse, and `x @ w == rotate(x, -1) @ rotate(w, -2)`.
Method: QuIP# (Tseng et al. 2024, arXiv:2402.04396) and QuaRot (Ashkboos et al. 2024,
arXiv:2404.00456), without their random signs.

>>> rotate(w, block=64, axis=-2).shape == w.shape
True
"""

from functools import cache

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tpu_stack.errors import UserError


@cache
def hadamard(size: int) -> Float[np.ndarray, "size size"]:
    """The orthonormal Hadamard matrix, float32. `size` is a power of two."""
    matrix = np.ones((1, 1))
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(size)).astype(np.float32)


def rotate(array: Float[Array, "*B"], block: int, axis: int) -> Float[Array, "*B"]:
    """`array` with each `block` entries along `axis` (-1 or -2) rotated; 0 leaves it alone.

    Computed in float32 and rounded once to the dtype of `array`. Its own inverse.
    """
    if not block:
        return array
    moved = jnp.swapaxes(array, axis, -1).astype(jnp.float32)
    split = moved.reshape(*moved.shape[:-1], -1, block)
    mixed = jnp.einsum("...i,ij->...j", split, hadamard(block), precision="highest")
    return jnp.swapaxes(mixed.reshape(moved.shape), axis, -1).astype(array.dtype)


def check_rotation(block: int, contract_size: int, bits: int, name: str = "weight") -> None:
    """Raises UserError, naming the tensor, unless its contraction may be rotated in `block`s."""
    if not block:
        return
    if block < 2 or block & (block - 1):
        raise UserError(f"{name}: a rotation's block is a power of two, not {block}")
    if bits != 4:
        raise UserError(f"{name}: rotation is for the 4-bit formats, this one has {bits} bits")
    if contract_size % block:
        raise UserError(f"{name}: K={contract_size} is not a multiple of the rotation's {block}")
