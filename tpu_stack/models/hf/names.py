"""Which Hugging Face tensor goes where in this project's stacked tensors.

Theirs are one per layer and expert, products [out, in]; ours are stacked over layers (and experts),
[in, out]. The embedding table is [V, D] in both.

>>> from tpu_stack.models.hf.families import family_of
>>> family = family_of({"architectures": ["Qwen3ForCausalLM"]})
>>> next(iter(pieces(family, config))).source
'model.layers.0.self_attn.k_norm.weight'
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.hf.families import Family

_OUTSIDE = {
    "embed": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "unembed": "lm_head.weight",
}


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor, and the part of one of ours that it is.

    Attributes:
      target: dotted name of our tensor. index: its part: (), (layer,) or (layer, expert).
      source: their name. shape: theirs. transposed: theirs is ours transposed.
    """

    target: str
    index: tuple[int, ...]
    source: str
    shape: tuple[int, ...]
    transposed: bool


def pieces(family: Family, config: ModelConfig) -> Iterator[Piece]:
    """Every tensor of a `family` folder of this model, in the order of our parameter tree."""
    for spec in tensor_specs(config):
        if spec.name in _OUTSIDE:
            template, stacked = _OUTSIDE[spec.name], 0
        else:
            within = spec.name.removeprefix("blocks.")
            template = "model.layers.{layer}." + family.block[within]
            stacked = 2 if "{expert}" in template else 1
        transposed = spec.contract_axis == -2 or spec.name.endswith(".router")
        shape = spec.shape[stacked:]
        for index in product(*map(range, spec.shape[:stacked])):
            named = dict(zip(("layer", "expert"), index, strict=False))
            yield Piece(
                spec.name,
                index,
                template.format(**named),
                tuple(reversed(shape)) if transposed else shape,
                transposed,
            )
