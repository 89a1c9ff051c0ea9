"""The static profile of a compiled kernel: where its bundles go and which unit binds it.

Occupancy is the share of a unit's slots that are filled. The unit with the highest occupancy in the
loop body binds: no schedule of the same instructions is shorter than that unit needs.

    profile_schedule(compiled.schedules[0])["binding_unit"]  # 'VALU'
"""

from typing import Any

from tpu_stack.planner.kernels.bundles import Region, Schedule

UNITS = {
    "MATMUL": "matrix unit: multiply",
    "MATPUSH": "matrix unit: load weights",
    "XLU": "cross-lane unit",
    "VALU": "vector ALU",
    "VPOP": "matrix unit: pop results",
    "EUP": "transcendental unit",
    "VLOAD": "vector load",
    "VLOAD:FILL": "vector load, of which refills of spills",
    "VSTORE": "vector store",
    "VSTORE:SPILL": "vector store, of which spills",
    "SALU": "scalar ALU",
}
"""The compiler's name of a unit -> its presumed meaning; the names are undocumented."""

PARTS = {"VLOAD:FILL": "VLOAD", "VSTORE:SPILL": "VSTORE"}
"""Units that count a part of another unit's slots, and so never bind by themselves."""


def occupancy(region: Region, capacity: dict[str, int]) -> dict[str, float]:
    """Unit -> share of its slots that the region fills; empty for a region without bundles."""
    if not region.bundles:
        return {}
    return {
        unit: region.slots[unit] / (region.bundles * slots) if slots else 0.0
        for unit, slots in capacity.items()
    }


def profile_schedule(schedule: Schedule) -> dict[str, Any]:
    """JSON-ready: bundles in the loop and outside, occupancy in both, binding unit, spills.

    The body is the grid's loop, or the whole kernel where the grid is one step. "slack" is 1 less
    the binding unit's occupancy: the share of bundles that better scheduling could save at most.
    """
    looped = schedule.loop.bundles > 0
    body = schedule.loop if looped else schedule.outside
    busy = occupancy(body, schedule.capacity)
    able = {unit: share for unit, share in busy.items() if unit not in PARTS}
    binding = max(able, key=lambda unit: able[unit])
    return {
        "kernel": schedule.name,
        "grid": list(schedule.grid),
        "steps": schedule.steps,
        "bundles": schedule.bundles,
        "loop_bundles": schedule.loop.bundles,
        "outside_bundles": schedule.outside.bundles,
        "issued_bundles": schedule.executed,
        "inner_loops": schedule.inner_loops,
        "occupancy_loop": occupancy(schedule.loop, schedule.capacity),
        "occupancy_outside": occupancy(schedule.outside, schedule.capacity),
        "slots": dict(body.slots),
        "capacity": dict(schedule.capacity),
        "binding_unit": binding,
        "binding_occupancy": able[binding],
        "slack": 1.0 - able[binding],
        "spills": body.slots.get("VSTORE:SPILL", 0),
        "fills": body.slots.get("VLOAD:FILL", 0),
        "vmem_bytes": schedule.vmem_bytes,
    }
