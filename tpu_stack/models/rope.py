"""Rotary position embeddings, with the frequency scalings of Llama 3 and Gemma 3.

>>> tables = rope_tables(jnp.arange(4)[None], inverse_frequencies(config, "global"))
>>> q_BTNH = rotate(jnp.ones((1, 4, 8, config.head_dim)), *tables)
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpu_stack.models.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, kind: str) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [head_dim / 2], for a layer of `kind`."""
    base = config.rope_base if kind == "global" else config.rope_base_local
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = base**-exponents
    if kind == "global" and config.rope_scaling is not None:
        frequencies = _scaled(frequencies, config.rope_scaling)
    return frequencies.astype(np.float32)


def _scaled(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max * frequencies / (2 * np.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rope_tables(
    positions_BT: Int[Array, "B T"], frequencies: np.ndarray
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosines and sines, float32 [B, T, head_dim / 2]."""
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x_BTNH: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """Rotates pairs (i, i + H/2), the layout of Hugging Face checkpoints; dtype is kept."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jax.lax.convert_element_type(rotated, x_BTNH.dtype)
