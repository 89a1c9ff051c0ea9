"""One way to call a kernel, as an op's module of settings proposes it to the tuner.

>>> Setting((16, 4096, 1024), None, 1e6, 1e8, 2e6).options
{'tiles': [16, 4096, 1024]}
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One way to call a kernel.

    Attributes:
      tiles: the blocks, as the kernel's argument `tiles`.
      scale_mode: where scales of weights are applied; None for ops without scales and for tiles
        with several modes.
      block_bytes: bytes that one grid step loads and stores.
      call_bytes: bytes that a call moves; the average where they depend on the data.
      vmem_bytes: a rough count of the VMEM that it takes.
      step_share: mean share of the grid's steps that a call executes; below 1 where this depends on
        the data.
    """

    tiles: tuple[int, ...]
    scale_mode: str | None
    block_bytes: float
    call_bytes: float
    vmem_bytes: float
    step_share: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for `Case.call`."""
        found: dict[str, Any] = {"tiles": list(self.tiles)}
        return found if self.scale_mode is None else found | {"scale_mode": self.scale_mode}
