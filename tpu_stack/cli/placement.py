"""The flags `--mesh` and `--devices` of every verb that runs a model.

>>> place: Annotated[PlacementOptions, Unprefixed] = field(default_factory=PlacementOptions)
"""

import tyro

Unprefixed = tyro.conf.arg(name="")
"""Annotates a field of PlacementOptions so that its flags are `--mesh` and `--devices`."""
