"""What distinguishes one decoder from another: fields only, never a family's name.

>>> config = get_preset("nano").replace(vocab_size=65, n_layers=4)
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from tpu_stack.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are stretched beyond the length a model was first trained on.

    kind "llama3": wavelengths over `original_max / low_freq_factor` are divided by `factor`, those
    under `original_max / high_freq_factor` are kept, the rest interpolated (Llama 3.1 report and
    its reference code). kind "linear": all frequencies are divided by `factor` (Chen et al. 2023).
    """

    kind: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Letters as everywhere: D, F, N, K, H, V, L.

    Attributes:
      vocab_size: V. d_model: D. n_layers: L. n_heads: N. n_kv_heads: K. head_dim: H. d_ff: F.
      activation: the MLP's nonlinearity; "gelu" is the tanh approximation.
      gated_mlp: down(act(gate(x)) * up(x)) rather than down(act(up(x))).
      block_pattern: kind of each layer, repeated over the depth: "global" sees every earlier
        token, "local" the last `window` ones, itself included.
      window: tokens a local layer sees.
      rope_base, rope_base_local: RoPE base of global and of local layers.
      rope_scaling: applied to global layers only.
      qk_norm: RMSNorm over head_dim on queries and keys (Qwen 3, Gemma 3).
      post_norms: a second RMSNorm on the output of attention and MLP (Gemma 2 and 3).
      norm_offset: RMSNorm multiplies by (1 + scale) (Gemma).
      query_scale: queries are multiplied by it; None means head_dim ** -0.5.
      attention_softcap, logit_softcap: cap * tanh(x / cap) on scores and logits (Gemma 2).
      scale_embeddings: embeddings are multiplied by sqrt(D) (Gemma).
      tie_embeddings: the unembedding is the embedding table.
      max_seq_len: the longest sequence the positions are meant for.
      n_experts: E; 0 for a dense MLP. Each expert is an MLP of width F.
      experts_per_token: experts that a token is sent to, the likeliest by its router.
      normalize_experts: their weights are divided by their sum (Mixtral, Qwen 3).
      d_ff_shared: width of an MLP that every token passes besides its experts; 0 for none.
      balance_loss: what the load-balance loss of the routers is multiplied by in training.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    activation: Literal["silu", "gelu"] = "silu"
    gated_mlp: bool = True
    block_pattern: tuple[Literal["global", "local"], ...] = ("global",)
    window: int = 4096
    rope_base: float = 10_000.0
    rope_base_local: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: bool = False
    norm_eps: float = 1e-6
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    scale_embeddings: bool = False
    tie_embeddings: bool = False
    max_seq_len: int = 8192
    n_experts: int = 0
    experts_per_token: int = 0
    normalize_experts: bool = True
    d_ff_shared: int = 0
    balance_loss: float = 0.0

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff")
        for name in (*sizes, "window", "max_seq_len"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"model.n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}; RoPE needs an even one")
        if not self.block_pattern:
            raise UserError("model.block_pattern is empty; it names at least one kind of layer")
        self._check_experts()

    def _check_experts(self) -> None:
        if self.n_experts == 0 and (self.experts_per_token or self.d_ff_shared):
            raise UserError("model.experts_per_token and d_ff_shared need model.n_experts")
        if self.n_experts and not 1 <= self.experts_per_token <= self.n_experts:
            raise UserError(
                f"model.experts_per_token is {self.experts_per_token};"
                f" it must lie in 1 to n_experts, {self.n_experts}"
            )
        if self.n_experts < 0 or self.d_ff_shared < 0 or self.balance_loss < 0:
            raise UserError("model.n_experts, d_ff_shared and balance_loss cannot be negative")
        if self.n_experts and not self.gated_mlp:
            raise UserError("model.gated_mlp is off; experts are gated")

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of every layer: the pattern repeated and cut to L."""
        pattern = self.block_pattern
        return tuple(pattern[layer % len(pattern)] for layer in range(self.n_layers))

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with these fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`. Raises UserError on a field this version does not know."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise UserError(
                f"model config has unknown fields {unknown}; written by a newer version?"
            )
        fields = dict(fields, block_pattern=tuple(fields.get("block_pattern", ("global",))))
        if fields.get("rope_scaling"):
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        return cls(**fields)
