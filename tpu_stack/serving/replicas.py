"""Data parallelism of a server: engines side by side, each a replica on its slice of the mesh.

A request goes to the replica that has least to do and stays there, so its tokens are what any one
engine would give. Prefixes are shared within a replica, not between two.

    slices = split_mesh(mesh)
    services = [start_service(config, on_slice(params, each), profile, each, o) for each in slices]
    service = Replicas(services, slices, facts)
"""

import itertools
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from tpu_stack.serving.requests import Event, Finished, GenerationRequest
from tpu_stack.serving.service import InFlight, Listener, Service, Stats, Ticket
from tpu_stack.sharding.profiles import Profile

AXIS = "data"


@dataclass
class _Route:
    """The replica that has a request, and its ticket there."""

    at: int
    ticket: Ticket | None = None


class Replicas:
    """`Service` over several of one model; service number i runs on `slices[i]`."""

    def __init__(self, services: Sequence[Service], slices: Sequence[Mesh], facts: dict[str, Any]):
        self._services, self._slices, self._facts = tuple(services), tuple(slices), facts
        self._numbers = itertools.count(1)
        self._routes: dict[int, _Route] = {}
        self._lock = threading.Lock()

    @property
    def max_length(self) -> int:
        """Prompt and output tokens of one request, at most."""
        return self._services[0].max_length

    @property
    def vocab_size(self) -> int:
        """Ids lie in [0, vocab_size)."""
        return self._services[0].vocab_size

    def submit(self, request: GenerationRequest, listener: Listener) -> Ticket:
        """Queues a request where the fewest are. Raises as `Service.submit`."""
        number = next(self._numbers)
        with self._lock:
            busy = Counter(route.at for route in self._routes.values())
            route = _Route(min(range(len(self._services)), key=lambda at: busy[at]))
            self._routes[number] = route

        def forward(event: Event) -> None:
            if isinstance(event, Finished):
                self._forget(number)
            listener(event)

        try:
            route.ticket = self._services[route.at].submit(request, forward)
        except BaseException:
            self._forget(number)
            raise
        return Ticket(number, request)

    def _forget(self, number: int) -> None:
        with self._lock:
            self._routes.pop(number, None)

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request with reason "cancelled"; nothing happens when it has finished."""
        route = self._routes.get(ticket.number)
        if route is not None and route.ticket is not None:
            self._services[route.at].cancel(route.ticket)

    def load(self, params: Any, in_flight: InFlight = "finish") -> Future[int]:
        """Replaces the weights, laid out on the whole mesh, of every replica between two steps.

        Returns: a future of their generation, done when they are live on all replicas.
        """
        slices = [on_slice(params, mesh) for mesh in self._slices]
        each = [
            service.load(part, in_flight)
            for service, part in zip(self._services, slices, strict=True)
        ]
        return _all_live(each)

    def stats(self) -> Stats:
        """The sums; `generation` is that of the replica with the oldest weights."""
        each = [service.stats() for service in self._services]
        finished: Counter[str] = Counter()
        for stats in each:
            finished.update(stats.finished)
        counted = (f.name for f in fields(Stats) if f.name not in ("finished", "generation"))
        sums: dict[str, Any] = {
            name: sum(getattr(stats, name) for stats in each) for name in counted
        }
        generation = min(stats.generation for stats in each)
        return Stats(finished=dict(finished), generation=generation, **sums)

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts that do not change."""
        return dict(self._facts)

    def close(self, drain_s: float | None = None) -> None:
        """Takes no more requests, waits up to `drain_s` for those there are, cancels the rest."""
        with ThreadPoolExecutor(len(self._services)) as pool:
            list(pool.map(lambda service: service.close(drain_s), self._services))


def _all_live(each: Sequence[Future[int]]) -> Future[int]:
    """The least generation of several loads once all are live; the first error of any."""
    live: Future[int] = Future()
    live.set_running_or_notify_cancel()
    left, lock = set(each), threading.Lock()

    def note(one: Future[int]) -> None:
        with lock:
            left.discard(one)
            if live.done():
                return
            if (error := one.exception()) is not None:
                live.set_exception(error)
            elif not left:
                live.set_result(min(done.result() for done in each))

    for one in each:
        one.add_done_callback(note)
    return live


def one_replica(profile: Profile) -> Profile:
    """The profile of each of `split_mesh`'s slices."""
    if AXIS not in profile.mesh:
        return profile
    return replace(profile, mesh={**profile.mesh, AXIS: 1})


def split_mesh(mesh: Mesh) -> list[Mesh]:
    """A mesh for every replica: the same axes, with `data` of size 1."""
    at = mesh.axis_names.index(AXIS)
    return [
        Mesh(np.expand_dims(devices, at), mesh.axis_names, axis_types=mesh.axis_types)
        for devices in np.moveaxis(mesh.devices, at, 0)
    ]


def on_slice(params: Any, mesh: Mesh) -> Any:
    """The copy that one slice of a mesh holds of arrays laid out on all of it; nothing moves."""

    def one(array: jax.Array) -> jax.Array:
        sharding = array.sharding
        assert isinstance(sharding, NamedSharding)
        spec = sharding.spec
        assert AXIS not in jax.tree.leaves(tuple(spec)), f"weights are split over {AXIS}: {spec}"
        here = set(mesh.devices.flat)
        shards = [shard.data for shard in array.addressable_shards if shard.device in here]
        target = NamedSharding(mesh, spec)
        return jax.make_array_from_single_device_arrays(array.shape, target, shards)

    return jax.tree.map(one, params)
