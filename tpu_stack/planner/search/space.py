"""All that can be chosen: every mesh that the sharding rules divide, every batch, format and remat.

Example:
    [profile.mesh for profile in legal_meshes(get_profile("v6e:64"), tensor_specs(config))]
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from itertools import product
from math import prod

from tpu_stack.errors import UserError
from tpu_stack.planner.aot.spec import REMAT
from tpu_stack.planner.search.ask import Question
from tpu_stack.planner.tensors import shard_count
from tpu_stack.sharding.axes import BATCH, TensorSpec
from tpu_stack.sharding.profiles import Profile

MAX_TOKENS = 2**22
"""Tokens of a train step unless batches are given: what Llama 3 began with (arXiv 2407.21783, 3.4);
a larger batch is hardly faster."""
TRAIN_ROWS = (1, 2, 4, 8, 16, 32, 64)
PREFILL_ROWS = (1, 2, 4, 8, 16, 32, 64)
DECODE_ROWS = tuple(sorted(n for power in range(11) for n in (2**power, 3 * 2**power) if n <= 1024))
"""Rows per shard of the batch axes that are tried."""


def meshes(profile: Profile) -> list[Profile]:
    """The profile on every mesh of its devices, legal or not."""
    n = profile.devices
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    shapes = [
        (*head, n // prod(head))
        for head in product(divisors, repeat=len(profile.mesh) - 1)
        if n % prod(head) == 0
    ]
    return [
        dataclasses.replace(profile, mesh=dict(zip(profile.mesh, shape, strict=True)))
        for shape in shapes
    ]


def legal_meshes(profile: Profile, specs: Iterable[TensorSpec]) -> list[Profile]:
    """Those of `meshes` that divide every tensor; copies of the model alone always do."""
    specs, found = tuple(specs), []
    for candidate in meshes(profile):
        with contextlib.suppress(UserError):
            candidate.check(specs)
            found.append(candidate)
    return found


def batches(question: Question, profile: Profile) -> Iterator[int]:
    """Batches to try on a mesh: those given that it divides, else the ladder."""
    split = shard_count(profile, BATCH)
    if question.ask.batches:
        yield from (batch for batch in question.ask.batches if batch % split == 0)
        return
    training = question.program == "train"
    rows = {"train": TRAIN_ROWS, "prefill": PREFILL_ROWS, "decode": DECODE_ROWS}[question.program]
    for count in rows:
        if training and count > 1 and count * split * question.length > MAX_TOKENS:
            return
        yield count * split


def training_choices(profile: Profile, batch: int) -> Iterator[tuple[Profile, int]]:
    """(profile with its remat, micro-batches) for a batch: powers of two that divide its rows."""
    rows = batch // shard_count(profile, BATCH)
    for remat in REMAT:
        chosen, parts = dataclasses.replace(profile, remat=remat), 1
        while rows % parts == 0:
            yield chosen, parts
            parts *= 2
