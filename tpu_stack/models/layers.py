"""The parts of one decoder block: RMSNorm, attention, and the block that joins them to an MLP.

Every parameter is stacked over layers, [L, ...]; `decoder.py` scans over that axis and calls a
block with one layer's slice. All matmuls go through `matmul`, so a weight may be a float
array (training) or a packed `QTensor` (serving).

    outputs = Block(config, rngs)(x_BTD, context, cache)
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tpu_stack.models.attention import Mask, attend
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.mlp import MLP
from tpu_stack.models.moe import MoE
from tpu_stack.models.paged_cache import PagedCache
from tpu_stack.models.rope import rotate
from tpu_stack.models.weights import norm_scale, weight
from tpu_stack.quant.matmul import matmul
from tpu_stack.sharding.axes import BATCH, EMBED, HEADS, KV_HEADS, LAYERS
from tpu_stack.sharding.constrain import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Outputs:
    """What a block, or the whole decoder, returns.

    Attributes:
      hidden: [B, T, D] in the compute dtype.
      cache: the cache that was passed in, with this call's keys and values; None without one.
      aux: float32 scalars for the loss, by name. "balance_loss": the router's load-balance loss
        (see `moe.balance_loss`), of a mixture of experts; the decoder's are means over layers.
    """

    hidden: Float[Array, "B T D"]
    cache: PagedCache | None
    aux: dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerContext:
    """What a block needs to know besides its input and weights.

    Attributes:
      layer: index of the layer, int32 scalar.
      positions: [B, T]; where the queries stand, and where the cache is written.
      cos, sin: RoPE tables of this layer's kind, float32 [B, T, H/2].
      mask: who sees whom.
    """

    layer: Int[Array, ""] | int
    positions: Int[Array, "B T"]
    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    mask: Mask


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in float32, dtype kept."""

    def __init__(self, shape: tuple[int, ...], config: ModelConfig):
        axes = (LAYERS, *(None,) * (len(shape) - 1)) if len(shape) > 1 else (None,)
        self.scale = norm_scale(shape, axes, offset=config.norm_offset)
        self.offset = config.norm_offset
        self.eps = config.norm_eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        scale = self.scale[...].astype(jnp.float32) + (1.0 if self.offset else 0.0)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        scale = jax.lax.broadcast_to_rank(scale, x.ndim)
        return (x32 * inverse * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention. Weights are [D, N*H], [D, K*H] and [N*H, D] per layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        L, D, H = config.n_layers, config.d_model, config.head_dim
        q_size, kv_size = config.n_heads * H, config.n_kv_heads * H
        std = D**-0.5
        self.wq = weight(rngs, (L, D, q_size), (LAYERS, EMBED, HEADS), std=std, granules=(1, 1, H))
        kv_axes = (LAYERS, EMBED, KV_HEADS)
        self.wk = weight(rngs, (L, D, kv_size), kv_axes, std=std, granules=(1, 1, H))
        self.wv = weight(rngs, (L, D, kv_size), kv_axes, std=std, granules=(1, 1, H))
        out_std = (2 * L * q_size) ** -0.5
        out_axes = (LAYERS, HEADS, EMBED)
        self.wo = weight(rngs, (L, q_size, D), out_axes, std=out_std, granules=(1, H, 1))
        if config.qk_norm:
            self.q_norm = RMSNorm((L, H), config)
            self.k_norm = RMSNorm((L, H), config)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: LayerContext, cache: PagedCache | None
    ) -> tuple[Float[Array, "B T D"], PagedCache | None]:
        config = self.config
        B, T, _ = x_BTD.shape
        kv_axes, kv_shape = (EMBED, KV_HEADS), (B, T, config.n_kv_heads, config.head_dim)
        q = matmul(x_BTD, self.wq.get_value(), (EMBED, HEADS))
        q = q.reshape(B, T, config.n_heads, config.head_dim)
        k = matmul(x_BTD, self.wk.get_value(), kv_axes).reshape(kv_shape)
        v = matmul(x_BTD, self.wv.get_value(), kv_axes).reshape(kv_shape)
        q = constrain(q, BATCH, None, HEADS, None)
        k = constrain(k, BATCH, None, KV_HEADS, None)
        v = constrain(v, BATCH, None, KV_HEADS, None)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q, context.cos, context.sin)
        k = rotate(k, context.cos, context.sin)
        scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        how: Any = {"scale": scale, "softcap": config.attention_softcap}
        new_cache: Any = None
        if cache is None:
            out = attend(q, k, v, context.mask, **how)
        else:
            out, new_cache = cache.attend(context.layer, q, k, v, context.mask, **how)
        out = constrain(out, BATCH, None, HEADS, None)
        out = out.reshape(B, T, config.n_heads * config.head_dim)
        return matmul(out, self.wo.get_value(), (HEADS, EMBED)), new_cache


class Block(nnx.Module):
    """Pre-norm residual block, with a second norm on each output where the config asks for it."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.n_layers, config.d_model)
        self.config = config
        self.attention_norm = RMSNorm(shape, config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(shape, config)
        self.mlp = MoE(config, rngs) if config.n_experts else MLP(config, rngs)
        if config.post_norms:
            self.attention_post_norm = RMSNorm(shape, config)
            self.mlp_post_norm = RMSNorm(shape, config)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: LayerContext, cache: PagedCache | None
    ) -> Outputs:
        mixed, cache = self.attention(self.attention_norm(x_BTD), context, cache)
        if self.config.post_norms:
            mixed = self.attention_post_norm(mixed)
        x_BTD = constrain(x_BTD + mixed, BATCH, None, None)
        normed, aux = self.mlp_norm(x_BTD), {}
        if isinstance(self.mlp, MoE):
            hidden, aux["balance_loss"] = self.mlp(normed)
        else:
            hidden = self.mlp(normed)
        if self.config.post_norms:
            hidden = self.mlp_post_norm(hidden)
        return Outputs(constrain(x_BTD + hidden, BATCH, None, None), cache, aux)
