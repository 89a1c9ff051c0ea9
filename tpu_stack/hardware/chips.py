"""Every chip the project plans for, as facts with sources.

`get_chip` looks up a name that a user typed. `Chip.require` reads a number that a result depends
on: a missing fact raises there, so it never enters a calculation as zero.

>>> get_chip("8i").require("hbm_bytes_per_s")
8600000000000
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.hardware import jax_table, matmul
from tpu_stack.hardware.fact import Fact, choose
from tpu_stack.hardware.matmul import MatmulRate
from tpu_stack.hardware.published import PUBLISHED

CHIP_NAMES = ("v4", "v5e", "v5p", "v6e", "7x", "8t", "8i", "cpu")

# What JAX calls a device of the chip (`jax.Device.device_kind`); the first is the usual one.
_DEVICE_KINDS = {
    "v4": ("TPU v4",),
    "v5e": ("TPU v5 lite", "TPU v5e"),
    "v5p": ("TPU v5", "TPU v5p"),
    "v6e": ("TPU v6 lite", "TPU v6e"),
    "7x": ("TPU7x",),
    "8t": ("TPU8t",),
    "8i": ("TPU8i",),
    "cpu": ("cpu",),
}

_TITLES = {"7x": "TPU7x (Ironwood)", "v6e": "TPU v6e (Trillium)", "cpu": "CPU (emulation only)"}


@dataclass(frozen=True, kw_only=True)
class Chip:
    """The facts of one chip; None where no source found publishes the figure.

    Figures are for the whole chip, all TensorCores together. `sublanes`, `lanes`, `mxus_per_core`
    and `mxu_columns` are of one TensorCore.

    Invariants: a fact's unit matches its field's name; `devices_per_chip` is always there; the cpu
    chip, which only emulates, has no performance fact.
    """

    name: str
    title: str
    device_kinds: tuple[str, ...]
    is_projected: bool  # nothing was compiled for it or measured on it: label every speed

    devices_per_chip: Fact
    tensor_cores: Fact | None = None
    sublanes: Fact | None = None
    lanes: Fact | None = None
    mxus_per_core: Fact | None = None
    mxu_columns: Fact | None = None
    vmem_bytes: Fact | None = None
    smem_bytes: Fact | None = None
    cmem_bytes: Fact | None = None

    bf16_flops_per_s: Fact | None = None
    fp8_flops_per_s: Fact | None = None
    int8_ops_per_s: Fact | None = None
    int4_ops_per_s: Fact | None = None
    fp4_flops_per_s: Fact | None = None
    hbm_bytes: Fact | None = None
    hbm_bytes_per_s: Fact | None = None

    topology: Fact | None = None  # "torus2d", "torus3d" or "boardfly"
    pod_chips: Fact | None = None
    ici_ports: Fact | None = None
    ici_link_bytes_per_s_one_way: Fact | None = None
    ici_bytes_per_s_bidirectional: Fact | None = None  # every link, both ways
    ici_max_hops: Fact | None = None
    dcn_bytes_per_s: Fact | None = None
    collective_engine: Fact | None = None

    host: Fact | None = None
    power_watts: Fact | None = None
    perf_per_watt_vs_7x: Fact | None = None
    perf_per_dollar_vs_7x: Fact | None = None
    price_usd_per_hour: Fact | None = None
    gke_accelerator: Fact | None = None
    gke_machine: Fact | None = None

    def facts(self) -> dict[str, Fact | None]:
        """Every fact by field name, in the order above."""
        return {name: getattr(self, name) for name in FACT_NAMES}

    def require(self, name: str) -> int | float:
        """The number of fact `name`. Raises UserError when it is missing or 0 (not available)."""
        fact: Fact | None = getattr(self, name)
        if fact is None:
            why = "it only emulates" if self.name == "cpu" else "no source found gives it"
            raise UserError(f"chip {self.name} has no {name} ({why}), and the answer depends on it")
        if fact.value == 0:
            raise UserError(f"chip {self.name} has no {name}: {fact.source} says 0, not available")
        return fact.number

    @property
    def torus_rank(self) -> int | None:
        """2 or 3 for a torus; None for Boardfly and for cpu."""
        kind = self.topology.value if self.topology else None
        return {"torus2d": 2, "torus3d": 3}.get(str(kind))

    @property
    def vmem_bytes_per_core(self) -> int:
        """VMEM of one TensorCore. Raises UserError for a chip without it."""
        return int(self.require("vmem_bytes")) // int(self.require("tensor_cores"))

    @property
    def ici_bytes_per_s_one_way(self) -> float:
        """Bytes/s the whole chip sends while it receives as many. Raises UserError if unknown."""
        return self.require("ici_bytes_per_s_bidirectional") / 2

    def devices(self, chips: int) -> int:
        """JAX devices in `chips` chips."""
        return chips * int(self.devices_per_chip.number)

    def matmul_is_native(self, lhs_dtype: Any, rhs_dtype: Any) -> bool:
        """Whether the matrix unit takes lhs x rhs as they are. Raises UserError for other types."""
        lhs, rhs = matmul.dtype_name(lhs_dtype), matmul.dtype_name(rhs_dtype)
        return jax_table.matmul_is_native(self.name, lhs, rhs)

    def peak_flops_per_s(self, lhs_dtype: Any, rhs_dtype: Any) -> MatmulRate:
        """Peak rate per chip for lhs x rhs, labelled native or emulated. See `rate_of_matmul`."""
        return matmul.rate_of_matmul(self, lhs_dtype, rhs_dtype)


_NOT_FACTS = ("name", "title", "device_kinds", "is_projected")
FACT_NAMES = tuple(field.name for field in fields(Chip) if field.name not in _NOT_FACTS)


@cache
def _build(name: str) -> Chip:
    ours, theirs = PUBLISHED[name], jax_table.jax_facts(name)
    facts = {}
    for field in FACT_NAMES:
        from_jax = (theirs[field],) if field in theirs else ()
        facts[field] = choose((*from_jax, *ours.get(field, ())))
    return Chip(
        name=name,
        title=_TITLES.get(name, f"TPU {name}"),
        device_kinds=_DEVICE_KINDS[name],
        is_projected=name in ("8t", "8i"),
        **facts,
    )


class _Chips(Mapping[str, Chip]):
    """The chips by name, each built when first asked for, so that importing this stays cheap."""

    def __getitem__(self, name: str) -> Chip:
        if name not in CHIP_NAMES:
            raise KeyError(name)
        return _build(name)

    def __iter__(self) -> Iterator[str]:
        return iter(CHIP_NAMES)

    def __len__(self) -> int:
        return len(CHIP_NAMES)


CHIPS: Mapping[str, Chip] = _Chips()


def get_chip(name: str) -> Chip:
    """The chip called `name`. Raises UserError naming the value, the nearest name and the list."""
    if name in CHIP_NAMES:
        return CHIPS[name]
    nearest = difflib.get_close_matches(name.lower(), CHIP_NAMES, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise UserError(f"unknown chip {name!r}; {hint}known: {', '.join(CHIP_NAMES)}")


def chip_of_device_kind(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind` ("TPU v5 lite" is v5e); None for any other device."""
    for name, kinds in _DEVICE_KINDS.items():
        if device_kind in kinds:
            return CHIPS[name]
    return None
