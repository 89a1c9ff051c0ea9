"""What a program will hold on one device, by formula: named terms, and the most of them at once.

Arithmetic over shapes alone, quick enough for a search. Terms were read off programs that XLA:TPU
compiled (libtpu 0.0.52, `memory.buffers`); the reason stands with each.

    prediction = Verdict.of(request).prediction
    prediction.total_bytes, [term.name for term in prediction.at_most]
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from tpu_stack.planner.memory.tiles import padded_bytes
from tpu_stack.sharding.axes import TensorSpec
from tpu_stack.sharding.profiles import Profile


@dataclass(frozen=True)
class Term:
    """One kind of buffer on one device. `owner`: the layers and mesh axes that it belongs to.

    `argument`: the program is given it, and holds it throughout.
    """

    name: str
    bytes: int
    shape: str
    owner: str
    argument: bool = False


@dataclass(frozen=True)
class Prediction:
    """Predicted HBM of one JAX device.

    Attributes:
      always: what is held throughout. moments: name -> what is held then beside it; the compiler
        reuses one moment's memory in the next, so that only the largest counts.
      code: bytes of the program itself.
      beside: what the device holds while the program runs that is none of its arguments.
    """

    always: tuple[Term, ...]
    moments: dict[str, tuple[Term, ...]] = field(default_factory=dict)
    code: int = 0
    beside: tuple[Term, ...] = ()

    @cached_property
    def moment(self) -> str:
        """The moment that holds most."""
        return max(self.moments, key=lambda name: total(self.moments[name]), default="")

    @property
    def at_most(self) -> tuple[Term, ...]:
        """The terms at the highest, largest first."""
        held = (*self.always, *self.moments.get(self.moment, ()))
        return tuple(sorted((t for t in held if t.bytes), key=lambda term: -term.bytes))

    @property
    def argument_bytes(self) -> int:
        """What the program is given."""
        return total([term for term in self.always if term.argument])

    @property
    def temporary_bytes(self) -> int:
        """What it makes for itself, at its highest."""
        return total(self.at_most) - self.argument_bytes

    @property
    def total_bytes(self) -> int:
        """Arguments, temporaries and code: what the compiler counts of the program."""
        return total(self.at_most) + self.code

    @property
    def held(self) -> dict[str, int]:
        """All that a device must have room for, by term: the program, and what lies beside it."""
        found = {"program": self.code}
        for term in (*self.at_most, *self.beside):
            found[term.name] = found.get(term.name, 0) + term.bytes
        return found

    @property
    def held_bytes(self) -> int:
        """The sum of `held`."""
        return self.total_bytes + total(self.beside)


def total(terms: Sequence[Term]) -> int:
    """Bytes of the terms together."""
    return sum(term.bytes for term in terms)


def shard(shape: Sequence[int], axes: Sequence[str | None], profile: Profile) -> tuple[int, ...]:
    """What one device holds of an array with these logical axes."""
    shards = (prod(profile.mesh[name] for name in profile.rules.mesh_axes(axis)) for axis in axes)
    return tuple(size // n for size, n in zip(shape, shards, strict=True))


def local(spec: TensorSpec, profile: Profile) -> tuple[int, ...]:
    """What one device holds of a tensor."""
    return shard(spec.shape, spec.axes, profile)


def array(name: str, dtype: str, shape: Sequence[int], owner: str, copies: int = 1) -> Term:
    """The term of `copies` arrays [shape] on a device, padded to tiles."""
    bits = {"float32": 32, "int32": 32, "bfloat16": 16, "bool": 8}[dtype]
    text = f"{dtype}[{','.join(map(str, shape))}]"
    count = f"{copies} x " if copies > 1 else ""
    return Term(name, copies * padded_bytes(shape, bits), count + text, owner)


def axes_text(axes: Sequence[str | None], profile: Profile) -> str:
    """The mesh axes that split an array with these logical axes, as in "fsdp=16, tensor=4"."""
    names = dict.fromkeys(name for axis in axes for name in profile.rules.mesh_axes(axis))
    return ", ".join(f"{n}={profile.mesh[n]}" for n in names if profile.mesh[n] > 1) or "unsplit"
