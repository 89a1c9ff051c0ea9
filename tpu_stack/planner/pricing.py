"""Prices a compiled program on a chip: the roofline, with ICI time from its own collectives.

A program keeps its mesh on whatever chip it is priced on, so the number of JAX devices is the same
and the number of chips may not be. All matmul FLOPs are charged at the rate of one operand pair,
the activations by the weights as stored.

    price(program, cost, get_chip("8i"))["time_s"]
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.hardware.chips import Chip, get_chip
from tpu_stack.hardware.roofline import LABEL, Roofline, Work, roofline
from tpu_stack.hardware.slices import shape_of_count
from tpu_stack.hardware.topology import parse_topology
from tpu_stack.planner.hlo import summarize
from tpu_stack.planner.links import MeshLinks, collective_seconds
from tpu_stack.planner.programs import Program
from tpu_stack.sharding.profiles import Profile


@dataclass(frozen=True)
class ProgramCost:
    """What the formulas say of one program.

    Attributes:
      tokens: per step over all devices. operands: matmul types (activations, weights).
      model_flops: over all devices.
      traffic, memory: HBM bytes per device, moved in a step and held at once, by term.
    """

    tokens: int
    operands: tuple[str, str]
    model_flops: float
    traffic: Mapping[str, int]
    memory: Mapping[str, int]


def mesh_links(profile: Profile, chip: Chip) -> MeshLinks:
    """Where the profile's mesh lies on `chip`: on its own topology, else on the nearest to a cube,
    which need be no slice that can be rented: another chip is priced with as many devices.

    Raises UserError when its devices do not fill whole chips, or fill more than a pod has.
    """
    links = MeshLinks(chip, (), profile.mesh)
    sizes = parse_topology(str(links.chips), chip, rentable=False).sizes
    if chip.name == profile.chip:
        sizes = parse_topology(profile.name.partition(":")[2], chip).sizes
    if len(sizes) == 1:
        sizes = shape_of_count(chip, links.chips)
    return dataclasses.replace(links, topology=sizes)


def describe_program(program: Program, cost: ProgramCost, others: Sequence[str]) -> dict[str, Any]:
    """The program in JSON-ready fields, priced on its own chip and on `others`."""
    profile = program.profile
    chips, per_chip = profile.chips or 1, profile.chip_facts.devices(1)
    executed = program.flops.matmul_flops + program.flops.opaque_flops
    prices = {name: _price_or_reason(program, cost, name) for name in (profile.chip, *others)}
    terms = {term: per_chip * amount for term, amount in cost.traffic.items()}
    return {
        "name": program.name,
        "profile": profile.name,
        "chip": profile.chip,
        "tokens_per_step": cost.tokens,
        "flops_per_chip": executed / chips,
        "model_flops_per_chip": cost.model_flops / chips,
        "model_share_of_flops": cost.model_flops / executed,
        "flops_by_operands": {
            " x ".join(pair): flops for pair, flops in program.flops.by_operand_dtypes.items()
        },
        "hbm_bytes_per_chip": sum(terms.values()),
        "hbm_terms_per_chip": terms,
        "collectives": _collective_rows(program, list(prices)),
        "collectives_of_mesh": program.emulated_mesh,
        "collectives_of_smaller_mesh": program.shrunk,
        "roofline": prices,
    }


def _collective_rows(program: Program, chips: Sequence[str]) -> list[dict[str, Any]]:
    seconds = {}
    for name in chips:
        try:
            links = mesh_links(program.profile, get_chip(name))
            seconds[name] = collective_seconds(program.collectives, links)
        except UserError:  # the roofline entry of this chip says why
            continue
    return [
        {
            "kind": row.kind,
            "axes": None if row.axes is None else list(row.axes),
            "count": row.count,
            "bytes": row.bytes,
            "wire_bytes": row.wire_bytes,
            "sites_of_unknown_count": row.unknown_sites,
            "projected_s": {
                name: found.get((row.kind, row.axes), 0.0) for name, found in seconds.items()
            },
        }
        for row in summarize(program.collectives, as_written=True)
    ]


def _price_or_reason(program: Program, cost: ProgramCost, chip: str) -> dict[str, Any]:
    try:
        return price(program, cost, get_chip(chip))
    except UserError as error:
        if chip == program.profile.chip:
            raise
        return {"chip": chip, "label": LABEL, "unavailable": str(error)}


def price(program: Program, cost: ProgramCost, chip: Chip) -> dict[str, Any]:
    """The roofline of one step on `chip`, with what else a reader asks: rates, MFU, fit.

    Raises UserError where the chip lacks a fact or cannot hold the mesh.
    """
    links = mesh_links(program.profile, chip)
    devices = program.profile.devices
    executed = program.flops.matmul_flops + program.flops.opaque_flops
    work = Work.from_devices(
        chip,
        flops_per_device=executed / devices,
        hbm_bytes_per_device=sum(cost.traffic.values()),
        operands=cost.operands,
    )
    ici_s = sum(collective_seconds(program.collectives, links).values())
    no_hops = dataclasses.replace(links, hop_s=0.0)
    bandwidth_s = sum(collective_seconds(program.collectives, no_hops).values())
    least = roofline(work, chip, ici_s=ici_s, overlap=1.0)
    time_s = least.time_s
    peak = links.chips * least.rate.flops_per_s_per_chip
    return {
        **least.as_json(),
        "chips": links.chips,
        "devices": devices,
        "topology": list(links.topology),
        "flops_per_chip": work.flops_per_chip,
        "hbm_bytes_per_chip": work.hbm_bytes_per_chip,
        "ici_bandwidth_s": bandwidth_s,
        "bound_by_hops": least.bound == "ici" and bandwidth_s < max(least.compute_s, least.hbm_s),
        "time_no_overlap_s": roofline(work, chip, ici_s=ici_s).time_s,
        "breakdown": breakdown(least),
        "hbm_terms_s": {
            term: chip.devices(1) * amount / chip.require("hbm_bytes_per_s")
            for term, amount in cost.traffic.items()
        },
        "tokens_per_s": cost.tokens / time_s,
        "tokens_per_s_per_chip": cost.tokens / time_s / links.chips,
        "mfu": cost.model_flops / (time_s * peak),
        "memory": memory_of(program.profile, cost.memory, chip),
    }


def breakdown(least: Roofline) -> dict[str, float]:
    """Where the time of a roofline goes, seconds, everything overlapped as far as it can be.

    compute_s, memory_s (HBM beyond compute) and exposed_ici_s (the collectives beyond both)
    sum to its time_s; hidden_ici_s is the rest of the collectives.
    """
    return {
        "compute_s": least.compute_s,
        "memory_s": max(0.0, least.hbm_s - least.compute_s),
        "exposed_ici_s": least.exposed_ici_s,
        "hidden_ici_s": least.ici_s - least.exposed_ici_s,
    }


def memory_of(
    profile: Profile, terms: Mapping[str, int], chip: Chip | None = None
) -> dict[str, Any]:
    """Bytes held per chip, by term, against the HBM there is."""
    chip = chip or profile.chip_facts
    capacity = int(chip.require("hbm_bytes"))
    held = {name: chip.devices(1) * amount for name, amount in terms.items()}
    total = sum(held.values())
    return {
        "terms_per_chip": held,
        "bytes_per_chip": total,
        "hbm_bytes_per_chip": capacity,
        "share": total / capacity,
        "fits": total <= capacity,
    }
