"""The one decoder: Llama 3, Qwen 3, Gemma 3 and the small CPU models, by config alone.

A Flax NNX module whose layers are stacked and scanned, or run in turn where the parameters are
split into layers (`per_layer`). `forward` is its pure form: parameters are a nested dict of arrays
or `QTensor`s, so training, packing and serving share one definition.

>>> params = init_params(config, jax.random.key(0))
>>> logits_BTV = forward(config, params, tokens_BT)
"""

from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tpu_stack.models.attention import Mask
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.layers import Block, LayerContext, Outputs, RMSNorm
from tpu_stack.models.paged_cache import PagedCache
from tpu_stack.models.per_layer import is_split, layer_of
from tpu_stack.models.rope import inverse_frequencies, rope_tables
from tpu_stack.models.weights import weight
from tpu_stack.quant.matmul import matmul
from tpu_stack.quant.take import take
from tpu_stack.sharding.axes import BATCH, EMBED, VOCAB
from tpu_stack.sharding.constrain import constrain

Params = dict[str, Any]
Remat = Literal["none", "dots", "full"]


class Decoder(nnx.Module):
    """Token ids, or embeddings, to hidden states to logits. Parameters are float32 and stacked over
    layers."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        V, D = config.vocab_size, config.d_model
        std = D**-0.5 if config.scale_embeddings or config.tie_embeddings else 1.0
        self.embed = weight(rngs, (V, D), (VOCAB, EMBED), std=std, contract_axis=-1)
        self.blocks = Block(config, rngs)
        self.final_norm = RMSNorm((D,), config)
        if not config.tie_embeddings:
            self.unembed = weight(rngs, (D, V), (EMBED, VOCAB), std=D**-0.5)

    def embeddings(
        self, tokens_BT: Int[Array, "B T"], dtype: Any = jnp.float32
    ) -> Float[Array, "B T D"]:
        """What token ids enter the first block as: [B, T, D] in `dtype`, scaled by the config."""
        x_BTD = take(self.embed.get_value(), tokens_BT, dtype)
        if self.config.scale_embeddings:
            x_BTD = x_BTD * jnp.asarray(self.config.d_model**0.5, dtype)
        return x_BTD

    def hidden(
        self,
        inputs: Int[Array, "B T"] | Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"] | None = None,
        cache: PagedCache | None = None,
        *,
        spans_BT: Int[Array, "B T"] | None = None,
        dtype: Any = jnp.float32,
        remat: Remat = "none",
        unroll: int = 1,
    ) -> Outputs:
        """The final norm's hidden states of token ids, or of embeddings.

        Args:
          inputs: token ids, or floats that enter the first block as they are (see `embeddings`).
          spans_BT: bidirectional spans, as in `Mask`; without a cache only.

        Raises ValueError for spans with a cache.
        """
        if spans_BT is not None and cache is not None:
            raise ValueError("bidirectional spans need whole sequences: a cache holds causal ones")
        config = self.config
        embedded = jnp.issubdtype(inputs.dtype, jnp.floating)
        x_BTD = inputs.astype(dtype) if embedded else self.embeddings(inputs, dtype)
        x_BTD = constrain(x_BTD, BATCH, None, None)
        graphdef, stacked = nnx.split(self.blocks)
        context_of = _layer_contexts(config, positions_BT, segments_BT, spans_BT, cache)

        def layer_step(carry, per_layer):
            x, cache = carry
            weights, layer, kind = per_layer
            block = nnx.merge(graphdef, weights)
            outputs = block(x, context_of(layer, kind), cache)
            return (outputs.hidden, outputs.cache), outputs.aux

        step = _with_remat(layer_step, remat)
        carry: Any = (x_BTD, cache)
        is_local = jnp.asarray([kind == "local" for kind in config.layer_kinds], jnp.int32)
        if is_split(stacked):
            each = []
            for layer in range(config.n_layers):
                carry, aux = step(carry, (layer_of(stacked, layer), layer, is_local[layer]))
                each.append(aux)
            aux = jax.tree.map(lambda *values: jnp.stack(values), *each)
        else:
            per_layer = (stacked, jnp.arange(config.n_layers), is_local)
            carry, aux = jax.lax.scan(step, carry, per_layer, unroll=unroll)
        return Outputs(self.final_norm(carry[0]), carry[1], jax.tree.map(jnp.mean, aux))

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Hidden states to float32 logits, soft-capped where the config asks for it."""
        config = self.config
        if config.tie_embeddings:
            logits = matmul(
                x, self.embed.get_value(), (VOCAB, EMBED), transpose=True, out_dtype=jnp.float32
            )
        else:
            logits = matmul(x, self.unembed.get_value(), (EMBED, VOCAB), out_dtype=jnp.float32)
        if config.logit_softcap is not None:
            logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
        return constrain(logits, BATCH, *(None,) * (logits.ndim - 2), VOCAB)


def _with_remat(step, remat: Remat):
    if remat == "none":
        return step
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    policy = dots if remat == "dots" else None
    return jax.checkpoint(step, policy=policy, prevent_cse=False)


def _layer_contexts(
    config: ModelConfig,
    positions_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"] | None,
    spans_BT: Int[Array, "B T"] | None,
    cache: PagedCache | None,
):
    """A function (layer, is_local) -> LayerContext that shares what layers have in common."""
    present = set(config.layer_kinds)
    kinds = [kind for kind in ("global", "local") if kind in present]
    tables = [rope_tables(positions_BT, inverse_frequencies(config, kind)) for kind in kinds]
    tables = jax.lax.optimization_barrier(tables)  # or each layer computes them again
    if cache is None:
        k_positions, k_segments = positions_BT, segments_BT
        if segments_BT is not None:  # positions restart at each document; order within a row counts
            k_positions = jnp.broadcast_to(jnp.arange(positions_BT.shape[1]), positions_BT.shape)
    else:
        k_positions, k_segments = jnp.arange(cache.length)[None], None
    q_positions = positions_BT if cache is not None else k_positions

    def context_of(layer, is_local) -> LayerContext:
        if len(kinds) == 1:
            (cos, sin), window = tables[0], config.window if kinds == ["local"] else None
        else:
            cos, sin = (jnp.where(is_local, b, a) for a, b in zip(*tables, strict=True))
            window = jnp.where(is_local, config.window, np.iinfo(np.int32).max)
        mask = Mask(q_positions, k_positions, segments_BT, k_segments, window, spans_BT, spans_BT)
        return LayerContext(layer, positions_BT, cos, sin, mask)

    return context_of


@lru_cache(maxsize=64)
def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph definition and abstract parameters (shapes and metadata, nothing allocated)."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(params=0))))


def init_params(config: ModelConfig, key: Array) -> Params:
    """Fresh float32 parameters as a nested dict. Jit it with out_shardings for large models."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(params=key))))


def bind(config: ModelConfig, params: Params) -> Decoder:
    """The Flax module with these parameters; they may be arrays or QTensors."""
    return nnx.merge(abstract_model(config)[0], params)


def forward(
    config: ModelConfig,
    params: Params,
    inputs: Int[Array, "B T"] | Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"] | None = None,
    segments_BT: Int[Array, "B T"] | None = None,
    *,
    spans_BT: Int[Array, "B T"] | None = None,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    unroll: int = 1,
) -> Float[Array, "B T V"]:
    """Float32 logits of every position, without a cache. Positions default to 0 .. T-1."""
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape[:2])
    model = bind(config, params)
    outputs = model.hidden(
        inputs,
        positions_BT,
        segments_BT,
        spans_BT=spans_BT,
        dtype=dtype,
        remat=remat,
        unroll=unroll,
    )
    return model.logits(outputs.hidden)
