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
      tiles: the blocks, as the kernel's `tiles` takes them.
      scale_mode: where scales of weights are applied; None for ops without, and for several ways.
      block_bytes: what the first grid step loads and its results' block.
      call_bytes: what a call moves; where data decide, the average one (`step_share`).
      vmem_bytes: what it needs of VMEM, roughly.
      step_share: of the grid's steps, those that the average call does; data decide on the rest.
    """

    tiles: tuple[int, ...]
    scale_mode: str | None
    block_bytes: float
    call_bytes: float
    vmem_bytes: float
    step_share: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """Of `Case.call`."""
        found: dict[str, Any] = {"tiles": list(self.tiles)}
        return found if self.scale_mode is None else found | {"scale_mode": self.scale_mode}
