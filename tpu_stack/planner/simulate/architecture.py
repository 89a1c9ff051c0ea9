"""A decoder as the numbers that its cost depends on, whatever family or trainer it comes from.

`ModelConfig` describes what this project can run; this also describes what others have published
results for: experts, shared experts, latent attention, sliding windows.

>>> Architecture.of(get_preset("llama3_8b")).active_parameters
8029995008
"""

from dataclasses import dataclass
from functools import cached_property

from tpu_stack.models.config import ModelConfig


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): ranks and head sizes.

    `q_rank` 0 means that queries come straight from the model width. The cache holds
    kv_rank + rope elements a position, shared by all heads.
    """

    q_rank: int
    kv_rank: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder; letters as everywhere (L layers, D d_model, F d_ff, N, K, H, V, E).

    Attributes:
      d_ff: width of a dense MLP, or of one expert where there are experts.
      experts, active_experts: 0 and 0 for a dense model.
      shared_ff: total width of the experts (or MLP) that every token passes beside the routed ones.
      dense_layers, dense_ff: layers without experts, and the width of their MLP.
      window, local_share: tokens that a local layer sees, and the share of layers that are local.
      global_head_dim: head size of the global layers where it differs from H.
      latent: set for latent attention, which replaces n_kv_heads and head_dim.
      extra_parameters: weights that cost memory and optimizer traffic but no matmul (tables).
    """

    layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 0
    active_experts: int = 0
    shared_ff: int = 0
    dense_layers: int = 0
    dense_ff: int = 0
    gated: bool = True
    tied: bool = False
    window: int = 0
    local_share: float = 0.0
    global_head_dim: int = 0
    latent: LatentAttention | None = None
    extra_parameters: int = 0

    @classmethod
    def of(cls, config: ModelConfig) -> "Architecture":
        """The sizes of a model of this project."""
        local = sum(kind == "local" for kind in config.layer_kinds)
        return cls(
            layers=config.n_layers,
            d_model=config.d_model,
            d_ff=config.d_ff,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            vocab=config.vocab_size,
            experts=config.n_experts,
            active_experts=config.experts_per_token,
            shared_ff=config.d_ff_shared,
            gated=config.gated_mlp,
            tied=config.tie_embeddings,
            window=config.window if local else 0,
            local_share=local / config.n_layers,
        )

    @property
    def mlp_matrices(self) -> int:
        """Matrices of one MLP: gate, up and down, or up and down."""
        return 3 if self.gated else 2

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def query_width(self) -> int:
        """Elements of a layer's queries a token."""
        latent = self.latent
        return self.n_heads * (latent.nope + latent.rope if latent else self.head_dim)

    @property
    def context_width(self) -> int:
        """Elements that attention puts out a token, before the output projection."""
        return self.n_heads * (self.latent.value if self.latent else self.head_dim)

    @property
    def cache_width(self) -> int:
        """Elements of the cache that a layer holds a position."""
        if self.latent:
            return self.latent.kv_rank + self.latent.rope
        return 2 * self.n_kv_heads * self.head_dim

    @cached_property
    def qkv_parameters(self) -> int:
        """Projections into attention, one layer."""
        latent = self.latent
        if latent is None:
            return self.d_model * (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        q_in = latent.q_rank or self.d_model
        into = self.d_model * latent.q_rank + q_in * self.query_width
        down = self.d_model * (latent.kv_rank + latent.rope)
        return into + down + latent.kv_rank * self.n_heads * (latent.nope + latent.value)

    @property
    def down_parameters(self) -> int:
        """Of `qkv_parameters`, the projections into latent attention's ranks.

        No head owns them, so tensor parallelism over heads leaves a copy on every device.
        """
        latent = self.latent
        return self.d_model * (latent.q_rank + latent.kv_rank + latent.rope) if latent else 0

    @cached_property
    def out_parameters(self) -> int:
        """The projection out of attention, one layer."""
        return self.d_model * self.context_width

    @cached_property
    def dense_mlp_parameters(self) -> int:
        """Dense MLPs and shared experts, all layers together."""
        if not self.experts:
            return self.layers * self.mlp_matrices * self.d_model * self.d_ff
        dense = self.dense_layers * self.dense_ff + self.moe_layers * self.shared_ff
        return self.mlp_matrices * self.d_model * dense

    @cached_property
    def expert_parameters(self) -> int:
        """Routed experts, all of them in all layers."""
        return self.moe_layers * self.experts * self.mlp_matrices * self.d_model * self.d_ff

    @cached_property
    def active_expert_parameters(self) -> int:
        """Routed experts that one token passes, all layers together."""
        return self.expert_parameters * self.active_experts // self.experts if self.experts else 0

    @cached_property
    def attention_parameters(self) -> int:
        """Projections of attention, all layers together."""
        return self.layers * (self.qkv_parameters + self.out_parameters)

    @property
    def table_parameters(self) -> int:
        """One embedding or unembedding table."""
        return self.vocab * self.d_model

    @cached_property
    def total_parameters(self) -> int:
        """Every weight; norms and biases are left out."""
        tables = (1 if self.tied else 2) * self.table_parameters
        router = self.moe_layers * self.d_model * self.experts
        body = self.attention_parameters + self.dense_mlp_parameters + self.expert_parameters
        return body + router + tables + self.extra_parameters

    @cached_property
    def matmul_parameters(self) -> int:
        """Weights that one token is multiplied with, the unembedding included."""
        router = self.moe_layers * self.d_model * self.experts
        active = self.dense_mlp_parameters + self.active_expert_parameters + router
        return self.attention_parameters + active + self.table_parameters

    @property
    def active_parameters(self) -> int:
        """`matmul_parameters` and, where it is a table of its own, the embedding."""
        return self.matmul_parameters + (0 if self.tied else self.table_parameters)

    def score_flops(self, keys_global: float, keys_local: float) -> float:
        """Attention FLOPs of one token's forward pass, all layers: scores and weighted sum.

        The keys are how many of them a token meets in a global and in a local layer.
        """
        width = self.query_width + self.context_width
        wide = width * self.global_head_dim / self.head_dim if self.global_head_dim else width
        local = self.layers * self.local_share
        return 2 * ((self.layers - local) * wide * keys_global + local * width * keys_local)
