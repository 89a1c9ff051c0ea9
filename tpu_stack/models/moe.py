"""Mixture of experts: a router sends every token to a few of many MLPs.

Nothing is dropped: rows are sorted by expert and multiplied as they are, so what a token gets does
not depend on the others. On a mesh each device multiplies the rows that its experts (axis `expert`)
have, by its part of their width (axis `tensor`), and the parts are summed.

    hidden_BTD, balance = MoE(config, rngs)(x_BTD)
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tpu_stack.models.config import ModelConfig
from tpu_stack.models.mlp import MLP, activation_of
from tpu_stack.models.weights import router_weight, weight
from tpu_stack.quant.grouped import grouped_matmul
from tpu_stack.quant.shard_specs import batch_axes, weight_specs
from tpu_stack.sharding.axes import EMBED, EXPERT, FFW, LAYERS
from tpu_stack.sharding.constrain import current_scope


class MoE(nnx.Module):
    """Experts are gated MLPs, [E, D, F] and [E, F, D] per layer; the router is [D, E].

    An MLP of width `d_ff_shared`, where there is one, is added to every token.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        L, E, D, F = config.n_layers, config.n_experts, config.d_model, config.d_ff
        wide, narrow = (LAYERS, EXPERT, EMBED, FFW), (LAYERS, EXPERT, FFW, EMBED)
        self.router = router_weight(rngs, (L, D, E), (LAYERS, EMBED, None), std=D**-0.5)
        self.w_gate = weight(rngs, (L, E, D, F), wide, std=D**-0.5)
        self.w_up = weight(rngs, (L, E, D, F), wide, std=D**-0.5)
        self.w_down = weight(rngs, (L, E, F, D), narrow, std=(2 * L * F) ** -0.5)
        if config.d_ff_shared:
            self.shared = MLP(config, rngs, config.d_ff_shared)

    def __call__(
        self, x_BTD: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """The experts' weighted sum, and the load-balance loss of this layer, float32."""
        probabilities = route(x_BTD, self.router.get_value())
        shares, experts = choose(self.config, probabilities)
        weights = tuple(w.get_value() for w in (self.w_gate, self.w_up, self.w_down))
        y_BTD = _everywhere(self.config, x_BTD, experts, shares, weights)
        if self.config.d_ff_shared:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, balance_loss(probabilities, experts)


def route(x_BTD: Float[Array, "B T D"], router_DE: Float[Array, "D E"]) -> Float[Array, "B T E"]:
    """The probability of every expert for every token, in float32."""
    router = router_DE.astype(jnp.float32)
    logits = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), router)
    return jax.nn.softmax(logits, axis=-1)


def choose(
    config: ModelConfig, probabilities: Float[Array, "B T E"]
) -> tuple[Float[Array, "B T k"], Int[Array, "B T k"]]:
    """The likeliest experts of every token and their weights: their probabilities, divided by
    their sum where the config says so, which is the softmax over the chosen (Mixtral)."""
    shares, experts = jax.lax.top_k(probabilities, config.experts_per_token)
    if config.normalize_experts:
        shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    return shares, experts


def balance_loss(
    probabilities: Float[Array, "B T E"], experts: Int[Array, "B T k"]
) -> Float[Array, ""]:
    """E times the sum over experts of (share of tokens sent) x (mean probability).

    Its least value is k, when all experts get as many tokens. Fedus et al. 2021 (arXiv:2101.03961,
    equations 4 to 6), extended to k experts as Mixtral's code does; of one layer.
    """
    count = probabilities.shape[-1]
    sent = jnp.mean(jax.nn.one_hot(experts, count, dtype=jnp.float32), axis=(0, 1))
    return count * jnp.sum(sent.sum(0) * jnp.mean(probabilities, axis=(0, 1)))


def _everywhere(config: ModelConfig, x, experts, shares, weights) -> Float[Array, "B T D"]:
    """`_local` on one device, or on every device of the mesh in force."""
    scope = current_scope()
    if scope is None or scope[0].size == 1:
        return _local(x, experts, shares, weights, config=config)
    mesh, rules = scope
    tokens = PartitionSpec(batch_axes(x.shape[0], mesh, rules), None, None)
    over_experts, over_width = rules.mesh_axes(EXPERT), rules.mesh_axes(FFW)
    wide = PartitionSpec(over_experts or None, None, over_width or None)
    narrow = PartitionSpec(over_experts or None, over_width or None, None)
    specs = tuple(
        weight_specs(w, spec, mesh) for w, spec in zip(weights, (wide, wide, narrow), strict=True)
    )
    return jax.shard_map(
        partial(_local, config=config, over_experts=over_experts, over_width=over_width),
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, specs),
        out_specs=tokens,
        check_vma=False,  # a pallas_call does not say over which axes its result varies
    )(x, experts, shares, weights)


def _local(
    x_BTD: Float[Array, "B T D"],
    experts_BTk: Int[Array, "B T k"],
    shares_BTk: Float[Array, "B T k"],
    weights: tuple[Any, Any, Any],
    *,
    config: ModelConfig,
    over_experts: tuple[str, ...] = (),
    over_width: tuple[str, ...] = (),
) -> Float[Array, "B T D"]:
    """This device's experts for its tokens; sorted by expert, rows of other devices' at the end."""
    w_gate, w_up, w_down = weights
    count, k = w_gate.shape[0], experts_BTk.shape[-1]
    first = jax.lax.axis_index(over_experts) * count if over_experts else 0
    expert = experts_BTk.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < count), expert, count)
    order = jnp.argsort(expert, stable=True)
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])[order // k]
    sizes = jnp.bincount(expert, length=count).astype(jnp.int32)
    gate, up = (grouped_matmul(x_MD, w, sizes) for w in (w_gate, w_up))
    out_MD = grouped_matmul(activation_of(config)(gate) * up, w_down, sizes)
    each = out_MD[jnp.argsort(order)].reshape(*shares_BTk.shape, -1).astype(jnp.float32)
    y_BTD = jnp.sum(shares_BTk[..., None] * each, axis=-2).astype(x_BTD.dtype)
    return jax.lax.psum(y_BTD, over) if (over := over_experts + over_width) else y_BTD
