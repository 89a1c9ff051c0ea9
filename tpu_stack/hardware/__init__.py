"""Chips as facts with sources, and the roofline arithmetic over them. No model code.

>>> from tpu_stack.hardware import get_chip
>>> get_chip("8i").matmul_is_native("bfloat16", "int4")
True
"""

from tpu_stack.hardware.chips import CHIP_NAMES, CHIPS, Chip, chip_of_device_kind, get_chip
from tpu_stack.hardware.collectives import AxisLinks, axis_links
from tpu_stack.hardware.fact import SOURCES, Fact
from tpu_stack.hardware.matmul import MatmulRate
from tpu_stack.hardware.roofline import Roofline, Work, decode_ridge_batch, roofline
from tpu_stack.hardware.slices import SLICES, SliceRule, shape_of_count, wraps
from tpu_stack.hardware.table import Row, chip_as_json, chip_rows
from tpu_stack.hardware.topology import Topology, parse_topology

__all__ = [
    "CHIPS",
    "CHIP_NAMES",
    "SLICES",
    "SOURCES",
    "AxisLinks",
    "Chip",
    "Fact",
    "MatmulRate",
    "Roofline",
    "Row",
    "SliceRule",
    "Topology",
    "Work",
    "axis_links",
    "chip_as_json",
    "chip_of_device_kind",
    "chip_rows",
    "decode_ridge_batch",
    "get_chip",
    "parse_topology",
    "roofline",
    "shape_of_count",
    "wraps",
]
