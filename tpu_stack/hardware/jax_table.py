"""What jax's own chip table says, converted from one TensorCore to one chip.

jax is imported inside the functions: it takes seconds, and `--help` needs none of it. Nothing here
initialises a JAX backend.

>>> jax_facts("8i")["vmem_bytes"].value == 2 * 192 * 2**20
True
"""

from functools import cache
from typing import Any

from tpu_stack.hardware.fact import Fact

# Our name -> the name in jax's ChipVersion enum.
CHIP_VERSIONS = {
    "v4": "TPU_V4",
    "v5e": "TPU_V5E",
    "v5p": "TPU_V5P",
    "v6e": "TPU_V6E",
    "7x": "TPU_7X",
    "8t": "TPU_8T",
    "8i": "TPU_8I",
}

# Our field -> (field of jax's TpuInfo, unit). Each is per TensorCore there.
_PER_CORE = {
    "vmem_bytes": ("vmem_capacity_bytes", "bytes"),
    "smem_bytes": ("smem_capacity_bytes", "bytes"),
    "cmem_bytes": ("cmem_capacity_bytes", "bytes"),
    "hbm_bytes": ("hbm_capacity_bytes", "bytes"),
    "hbm_bytes_per_s": ("mem_bw_bytes_per_second", "bytes/s"),
    "bf16_flops_per_s": ("bf16_ops_per_second", "FLOP/s"),
    "fp8_flops_per_s": ("fp8_ops_per_second", "FLOP/s"),
    "int8_ops_per_s": ("int8_ops_per_second", "OP/s"),
    "int4_ops_per_s": ("int4_ops_per_second", "OP/s"),
}

# Sizes within one TensorCore, so not multiplied by the number of cores.
_SAME_PER_CORE = {
    "sublanes": "num_sublanes",
    "lanes": "num_lanes",
    "mxus_per_core": "num_mxus",
    "mxu_columns": "mxu_column_size",
}


def _version(name: str) -> Any:
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.ChipVersion[CHIP_VERSIONS[name]]


@cache
def tensor_core_info(name: str) -> Any:
    """jax's `TpuInfo` of one TensorCore of chip `name`. Raises KeyError where jax has none."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.get_tpu_info_for_chip(_version(name), 1)


@cache
def jax_facts(name: str) -> dict[str, Fact]:
    """Facts per chip from jax's table, by the field names of `Chip`; empty where jax has none."""
    if name not in CHIP_VERSIONS:
        return {}
    version, info = _version(name), tensor_core_info(name)
    cores = version.num_physical_tensor_cores_per_chip
    megacore = version.supports_megacore
    facts = {
        "tensor_cores": Fact(value=cores, unit="cores", source="JX"),
        "devices_per_chip": Fact(
            value=1 if megacore else cores,
            unit="devices",
            source="JX",
            note="megacore: two TensorCores are one device" if megacore else "",
        ),
    }
    for field, theirs in _SAME_PER_CORE.items():
        facts[field] = Fact(value=getattr(info, theirs), unit="count", source="JX")
    for field, (theirs, unit) in _PER_CORE.items():
        value = cores * getattr(info, theirs)
        not_available = value == 0 and unit in ("FLOP/s", "OP/s")
        note = "jax: Not Available" if not_available else f"{cores} cores" * (cores > 1)
        facts[field] = Fact(value=value, unit=unit, source="JX", note=note)
    return facts


@cache
def matmul_is_native(name: str, lhs: str, rhs: str) -> bool:
    """Whether the chip's matrix unit takes lhs x rhs without a cast; False where jax has no table.

    `lhs` and `rhs` are dtype names as `ml_dtypes` spells them. Source: jax's
    `TpuInfo.is_matmul_supported`.
    """
    if name not in CHIP_VERSIONS:
        return False
    import jax.numpy as jnp

    info = tensor_core_info(name)
    return bool(info.is_matmul_supported(jnp.dtype(lhs), jnp.dtype(rhs)))
