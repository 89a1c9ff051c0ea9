"""One Flax model definition: trained under TPU 8t profiles, served under TPU 8i profiles.

`import tpu_stack as ts` offers the library: `ts.train`, `ts.pack`, `ts.open`, `ts.evaluate`,
`ts.compare`, `ts.plan` (see `tpu_stack.api`). Each is imported when it is first named, so that
`tpu-stack --help` starts at once. The package is laid out bottom-up; the README has the commands,
and CONTRIBUTING.md says which folder holds what.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpu_stack.api.evaluation import evaluate
    from tpu_stack.api.model import Model, open
    from tpu_stack.api.packing import pack
    from tpu_stack.api.planning import compare, plan
    from tpu_stack.api.training import train

__version__ = "0.1.0"
__all__ = ["Model", "compare", "evaluate", "open", "pack", "plan", "train"]
_HOMES = {
    "Model": "model",
    "compare": "planning",
    "evaluate": "evaluation",
    "open": "model",
    "pack": "packing",
    "plan": "planning",
    "train": "training",
}
"""Name -> module of `tpu_stack.api`."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tpu_stack' has no attribute {name!r}")
    return getattr(import_module(f"tpu_stack.api.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
