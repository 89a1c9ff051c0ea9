"""Every tensor of a model without allocating one: names, shapes, dtypes, logical axes.

This is what the planner, the profiles and the checkpoints read; a 70B model takes milliseconds.

>>> sum(spec.size for spec in tensor_specs(get_preset("llama3_70b")))
70553706496
"""

from functools import lru_cache
from typing import Any

from flax import nnx

from tpu_stack.models.config import ModelConfig
from tpu_stack.models.decoder import abstract_model
from tpu_stack.sharding.axes import TensorSpec


@lru_cache(maxsize=64)
def tensor_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """One TensorSpec per parameter, in the order of the parameter tree."""
    _, state = abstract_model(config)
    specs = []
    for path, param in nnx.to_flat_state(state):
        meta = param.get_metadata()
        value = param.get_value()
        specs.append(
            TensorSpec(
                ".".join(map(str, path)),
                tuple(value.shape),
                str(value.dtype),
                meta["axes"],
                meta["granules"],
                meta["contract_axis"],
            )
        )
    return tuple(specs)


def map_specs(config: ModelConfig, function) -> dict[str, Any]:
    """The parameter tree with `function(spec)` in place of every tensor."""
    tree: dict[str, Any] = {}
    for spec in tensor_specs(config):
        *folders, leaf = spec.name.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = function(spec)
    return tree


def tensor_of(tree: Any, name: str) -> Any:
    """What stands in the parameter tree at the dotted path `name`."""
    for key in name.split("."):
        tree = tree[key]
    return tree


def parameter_count(config: ModelConfig) -> int:
    """Parameters in all, embeddings included."""
    return sum(spec.size for spec in tensor_specs(config))
