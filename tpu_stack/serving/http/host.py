"""What every route shares: the model, the bounds, the counters, and the calls in flight.

Example:
    host = Host(Model("nano", service, tokenizer), Limits())
    host.begin_drain()  # new requests are answered 503
"""

from dataclasses import dataclass, field
from typing import Protocol

from tpu_stack.serving.http.errors import ApiError, draining
from tpu_stack.serving.http.limits import Limits
from tpu_stack.serving.http.metrics import Metrics
from tpu_stack.serving.http.model import Model


class Abortable(Protocol):
    """A request in flight, as its host knows it: a `call.Call`."""

    def abort(self, error: ApiError) -> None: ...


@dataclass
class Host:
    """A server's state. Touched from the event loop only.

    Attributes:
      keys: API keys that are let in; empty lets everybody in.
      names: host names that it answers to, in lower case; None for any.
      calls: in flight; each takes itself out when it ends.
    """

    model: Model
    limits: Limits = field(default_factory=Limits)
    keys: frozenset[str] = frozenset()
    names: frozenset[str] | None = None
    draining: bool = False
    calls: set[Abortable] = field(default_factory=set)
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.model.service)

    def begin_drain(self) -> None:
        """Takes no more requests; those in flight go on."""
        self.draining = True

    def end_calls(self) -> None:
        """Ends every call in flight with an error, at the end of the drain's time."""
        for call in list(self.calls):
            call.abort(draining())
