"""The dense feed-forward part of a block.

Example:
    hidden_BTD = MLP(config, rngs)(x_BTD)
"""

import jax
from flax import nnx
from jaxtyping import Array, Float

from tpu_stack.models.config import ModelConfig
from tpu_stack.models.weights import weight
from tpu_stack.quant.matmul import matmul
from tpu_stack.sharding.axes import BATCH, EMBED, FFW, LAYERS
from tpu_stack.sharding.constrain import constrain


def activation_of(config: ModelConfig):
    """The config's nonlinearity."""
    return jax.nn.silu if config.activation == "silu" else jax.nn.gelu


class MLP(nnx.Module):
    """Feed-forward, gated or not. Weights are [D, F] and [F, D] per layer; F is the config's d_ff
    unless `width` says otherwise."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, width: int | None = None):
        self.config = config
        L, D, F = config.n_layers, config.d_model, width or config.d_ff
        self.w_up = weight(rngs, (L, D, F), (LAYERS, EMBED, FFW), std=D**-0.5)
        if config.gated_mlp:
            self.w_gate = weight(rngs, (L, D, F), (LAYERS, EMBED, FFW), std=D**-0.5)
        self.w_down = weight(rngs, (L, F, D), (LAYERS, FFW, EMBED), std=(2 * L * F) ** -0.5)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        activation = activation_of(self.config)
        up = matmul(x_BTD, self.w_up.get_value(), (EMBED, FFW))
        if self.config.gated_mlp:
            hidden = activation(matmul(x_BTD, self.w_gate.get_value(), (EMBED, FFW))) * up
        else:
            hidden = activation(up)
        hidden = constrain(hidden, BATCH, None, FFW)
        return matmul(hidden, self.w_down.get_value(), (FFW, EMBED))
