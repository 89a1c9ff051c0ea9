"""What documents say about each chip, as data: everything that jax's chip table does not carry.

Facts beside jax's for the same field are second opinions, kept so that a conflict stays visible.
A fact that is arithmetic on a document's figure says "derived" in its note. No figure found means
no entry: there are no machine types, prices, labels or power figures for TPU 8 here.

>>> PUBLISHED["v5p"]["hbm_bytes_per_s"][0].source
'GD'
"""

from tpu_stack.hardware.fact import Fact
from tpu_stack.hardware.published_links import LINKS

MIB, GIB = 2**20, 2**30
GB, TERA = 10**9, 10**12

Facts = tuple[Fact, ...]


def _bytes(value: int, source: str, note: str = "") -> Fact:
    return Fact(value=value, unit="bytes", source=source, note=note)


def _bandwidth(gigabytes_per_s: int, source: str, note: str = "") -> Fact:
    return Fact(value=gigabytes_per_s * GB, unit="bytes/s", source=source, note=note)


def _flops(tera: int, source: str = "GD", note: str = "") -> Fact:
    return Fact(value=tera * TERA, unit="FLOP/s", source=source, note=note)


def _ops(tera: int, source: str = "GD", note: str = "") -> Fact:
    return Fact(value=tera * TERA, unit="OP/s", source=source, note=note)


def _price(dollars: float) -> Facts:
    return (Fact(value=dollars, unit="USD/hour", source="XX", note="on demand, per chip-hour"),)


def _text(value: str, source: str = "GD") -> Facts:
    return (Fact(value=value, unit="text", source=source),)


def _against_ironwood(value: float, note: str) -> Facts:
    return (Fact(value=value, unit="ratio", source="DD", note=note),)


_V4: dict[str, Facts] = {
    "bf16_flops_per_s": (_flops(275),),
    "int8_ops_per_s": (_ops(275), _ops(275, "SB")),
    "hbm_bytes": (_bytes(32 * GIB, "GD"),),
    "hbm_bytes_per_s": (_bandwidth(1200, "GD"),),
    "power_watts": (Fact(value=170, unit="W", source="GD", note="mean; 90 minimum, 192 maximum"),),
    "price_usd_per_hour": _price(3.22),
    "gke_accelerator": _text("tpu-v4-podslice"),
    "gke_machine": _text("ct4p-hightpu-4t"),
}

_V5E: dict[str, Facts] = {
    "bf16_flops_per_s": (_flops(197),),
    "int8_ops_per_s": (_ops(393),),
    "hbm_bytes": (_bytes(16 * GB, "GD"),),
    "hbm_bytes_per_s": (_bandwidth(819, "GD"), _bandwidth(810, "SB")),
    "price_usd_per_hour": _price(1.20),
    "gke_accelerator": _text("tpu-v5-lite-podslice"),
    "gke_machine": _text("ct5lp-hightpu-{1,4,8}t"),
}

_V5P: dict[str, Facts] = {
    "bf16_flops_per_s": (_flops(459),),
    "fp8_flops_per_s": (_flops(459),),
    "hbm_bytes": (_bytes(95 * GIB, "GD"), _bytes(96 * GB, "SB")),
    "hbm_bytes_per_s": (
        _bandwidth(2765, "GD", "SB's 2.8e12 is nearer to this than jax's 2.46e12 is"),
        _bandwidth(2800, "SB"),
    ),
    "price_usd_per_hour": _price(4.20),
    "gke_accelerator": _text("tpu-v5p-slice"),
    "gke_machine": _text("ct5p-hightpu-4t"),
}

_V6E: dict[str, Facts] = {
    "bf16_flops_per_s": (_flops(918),),
    "fp8_flops_per_s": (_flops(918),),
    "int8_ops_per_s": (_ops(1836),),
    "hbm_bytes": (_bytes(32 * GB, "GD"),),
    "hbm_bytes_per_s": (_bandwidth(1640, "GD"),),
    "price_usd_per_hour": _price(2.70),
    "gke_accelerator": _text("tpu-v6e-slice"),
    "gke_machine": _text("ct6e-standard-{1,4,8}t"),
}

_7X: dict[str, Facts] = {
    "bf16_flops_per_s": (_flops(2307),),
    "fp8_flops_per_s": (_flops(4614),),
    "hbm_bytes": (_bytes(192 * GIB, "GD"),),
    "hbm_bytes_per_s": (_bandwidth(7380, "GD"),),
    "price_usd_per_hour": _price(12.00),
    "gke_accelerator": _text("tpu7x"),
    "gke_machine": _text("tpu7x-standard-{1,4}t"),
}

_8T: dict[str, Facts] = {
    "fp4_flops_per_s": (
        _flops(12_600, "DD", "native by DD, but jax lists fp4 operands on no chip: never used"),
    ),
    "vmem_bytes": (_bytes(128 * MIB, "DD"),),
    "hbm_bytes": (_bytes(216 * GB, "DD", "216 GiB would be 231.9e9, jax's figure: likely meant"),),
    "hbm_bytes_per_s": (_bandwidth(6528, "DD"),),
    "collective_engine": _text("SparseCore", "DD"),
    "host": _text("Arm Axion", "DD"),
    "perf_per_watt_vs_7x": _against_ironwood(2.0, "up to"),
    "perf_per_dollar_vs_7x": _against_ironwood(2.7, "up to, training"),
}

_8I: dict[str, Facts] = {
    "fp4_flops_per_s": (_flops(10_100, "DD", "jax lists fp4 operands on no chip: never used"),),
    "fp8_flops_per_s": (_flops(10_100, "BL", "derived from the pod's figure"),),
    "vmem_bytes": (_bytes(384 * MIB, "DD"),),
    "hbm_bytes": (_bytes(288 * GB, "DD", "288 GiB would be 309.2e9, jax's figure: likely meant"),),
    "hbm_bytes_per_s": (_bandwidth(8601, "DD"),),
    "collective_engine": _text("Collectives Acceleration Engine", "DD"),
    "host": _text("Arm Axion", "DD"),
    "perf_per_watt_vs_7x": _against_ironwood(2.0, "up to"),
    "perf_per_dollar_vs_7x": _against_ironwood(1.8, "up to, inference"),
}

_CPU: dict[str, Facts] = {
    "devices_per_chip": (
        Fact(value=1, unit="devices", source="TS", note="an emulated chip is one CPU device"),
    ),
}

_BY_CHIP: dict[str, dict[str, Facts]] = {
    "v4": _V4, "v5e": _V5E, "v5p": _V5P, "v6e": _V6E, "7x": _7X, "8t": _8T, "8i": _8I, "cpu": _CPU,
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Facts]] = {
    name: {**facts, **LINKS.get(name, {})} for name, facts in _BY_CHIP.items()
}
