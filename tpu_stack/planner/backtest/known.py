"""What a table's columns leave out: facts of well-known architectures, from their public configs.

The columns have no place for latent attention, shared experts, leading dense layers or sliding
windows. What stands here is in the models' own configuration files and holds for every result of
the family; nothing here is a time. A row's notes, where they speak, come before it.

>>> known_facts("DeepSeek-R1-671B")["dense_layers"]
3
"""

import re
from typing import Any

from tpu_stack.planner.simulate.architecture import LatentAttention

_DEEPSEEK = LatentAttention(q_rank=1536)

# Pattern of the model's name -> what its config adds to the columns. The first match counts.
_KNOWN: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        r"deepseek.*(v2.?lite|16b)",
        {"dense_layers": 1, "dense_ff": 10944, "shared_ff": 2816, "latent": LatentAttention(0)},
    ),
    (
        r"deepseek",
        {"dense_layers": 3, "dense_ff": 18432, "shared_ff": 2048, "latent": _DEEPSEEK},
    ),
    (r"kimi", {"dense_layers": 1, "dense_ff": 18432, "shared_ff": 2048, "latent": _DEEPSEEK}),
    (r"llama.?4.*maverick", {"dense_layers": 24, "dense_ff": 16384, "shared_ff": 8192}),
    (r"llama.?4.*scout", {"shared_ff": 8192}),
    (r"gpt.?oss", {"window": 128, "local_share": 0.5}),
    (r"gemma.?2\b", {"window": 4096, "local_share": 0.5}),
    (r"gemma.?3", {"window": 1024, "local_share": 5 / 6}),
    # e2b: 20 of 35 layers have an MLP twice as wide; e2b and e4b have a table per layer, 256 wide.
    (
        r"gemma.?4.*2b",
        {"d_ff": 9655, "window": 512, "local_share": 0.8, "global_head_dim": 512,
         "extra_parameters": 35 * 256 * 262_144},
    ),
    (
        r"gemma.?4.*4b",
        {"window": 512, "local_share": 5 / 6, "global_head_dim": 512,
         "extra_parameters": 42 * 256 * 262_144},
    ),
    (
        r"gemma.?4.*26b",
        {"window": 1024, "local_share": 5 / 6, "global_head_dim": 512, "shared_ff": 2112},
    ),
    (r"gemma.?4", {"window": 1024, "local_share": 5 / 6, "global_head_dim": 512}),
)  # fmt: skip


def known_facts(model: str) -> dict[str, Any]:
    """Fields of `Architecture` that the public configs of the model's family add; {} if unknown."""
    name = model.lower()
    return next((dict(facts) for pattern, facts in _KNOWN if re.search(pattern, name)), {})
