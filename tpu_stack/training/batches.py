"""Where batches come from, as the trainer sees it, and how they reach the devices.

A batch is any tree of arrays with one leading axis. `data.token_batches.TokenBatches` is one
source; a sampler of rollouts or a reader of video is another.

    placed = place_batch(batch, layout.batch)
"""

from typing import Any, Protocol

import jax
from jax.sharding import NamedSharding


class Batches(Protocol):
    """An endless, or finite, source of batches that can be resumed.

    `set_state(get_state())` in another process makes it continue bit for bit.
    The trainer asks for the batch after step s when its hooks have been told of step s, and while
    that step runs: a source that samples with the weights of step s gets them from a hook.
    """

    @property
    def element_spec(self) -> Any:
        """The global batch's tree: leaves with `shape` and `dtype`, all with the same leading B."""
        ...

    def __next__(self) -> Any:
        """This process's rows of the next batch, host arrays; StopIteration ends the run."""
        ...

    def get_state(self) -> Any:
        """Where it stands, JSON-ready."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes on from where another stood."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What decides the sequence of batches, JSON-ready; a resumed run must agree on it."""
        ...


def place_batch(batch: Any, sharding: NamedSharding) -> Any:
    """This process's rows as global arrays, each leaf's leading axis laid out by `sharding`.

    Returns at once where the backend copies in the background.
    """
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
