"""How a module declares a weight: shape, logical axes, granules, initializer, in one call.

The metadata rides on the `nnx.Param`, so that `abstract.py` can list every tensor of a model
without allocating one.

    self.wq = weight(rngs, (L, D, N * H), (LAYERS, EMBED, HEADS), std=D**-0.5, granules=(1, 1, H))
"""

import jax
import jax.numpy as jnp
from flax import nnx


def weight(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    std: float,
    granules: tuple[int, ...] | None = None,
    contract_axis: int = -2,
) -> nnx.Param:
    """A float32 matmul weight, normal with standard deviation `std`."""
    return nnx.Param(
        std * jax.random.normal(rngs.params(), shape, jnp.float32),
        axes=axes,
        granules=granules or (1,) * len(shape),
        contract_axis=contract_axis,
    )


def router_weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], *, std: float
) -> nnx.Param:
    """A router's float32 weight. It is no `weight` to quantize: a few bits less would send tokens
    to other experts, and it is a thousandth of the bytes."""
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=axes, granules=(1,) * len(shape), contract_axis=None)


def norm_scale(shape: tuple[int, ...], axes: tuple[str | None, ...], *, offset: bool) -> nnx.Param:
    """An RMSNorm scale that starts as the identity: zeros where 1 is added to it, else ones."""
    value = jnp.zeros(shape, jnp.float32) if offset else jnp.ones(shape, jnp.float32)
    return nnx.Param(value, axes=axes, granules=(1,) * len(shape), contract_axis=None)
