"""The flags that say where a model runs: `--mesh` and `--devices`, and those of an engine.

>>> place: Annotated[PlacementOptions, Unprefixed] = field(default_factory=PlacementOptions)
"""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from tpu_stack.serving.launch import Where
from tpu_stack.sharding.placement import PlacementOptions

Unprefixed = tyro.conf.arg(name="")
"""Annotates a field of PlacementOptions so that its flags are `--mesh` and `--devices`."""


@dataclass(frozen=True)
class EngineWhere(Where):
    """`Where` with the flags of `PlacementOptions` unprefixed."""

    place: Annotated[PlacementOptions, Unprefixed] = field(default_factory=PlacementOptions)
