"""Wall clock of the CPU's quantized matmul beside XLA's float32 product (rung 5, measured).

Every format is timed as a CPU server holds it, after `widen()`, in turns with the peer, so that a
busy machine slows both. Values and scales are random: the time does not depend on them.

    python -m tpu_stack.quant.bench --m 1 8 --json bench.json
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from tpu_stack.quant import FORMATS, QTensor, explain, get_format, matmul
from tpu_stack.quant.formats import Format
from tpu_stack.quant.qtensor import abstract_qtensor

SHAPE = (4096, 14336)
"""Llama-3-8B's feed-forward weight, [K, N]."""
PEER = "float32"
SUITE = [name for name, fmt in FORMATS.items() if fmt.quantized and "_g" not in name]


def random_weight(fmt: Format, shape: tuple[int, int], seed: int = 0) -> Any:
    """A weight of the format with random values, widened; an array for an unquantized format."""
    rng = np.random.default_rng(seed)
    if not fmt.quantized:
        return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(fmt.dtype)
    like = abstract_qtensor(shape, fmt.name)
    codes = rng.integers(0, 2 ** min(fmt.bits, 8), like.values.shape, dtype=np.uint8)
    if fmt.kind == "bits":
        values = rng.integers(-(2**31), 2**31, like.values.shape, dtype=np.int32)
    elif fmt.kind == "float":
        values = (codes & 0x37 if fmt.bits == 8 else codes).view(fmt.dtype)  # no NaN, no infinity
    else:
        values = codes.view(np.int8).astype(fmt.dtype)
    scales = jnp.ones(like.scales.shape, like.scales.dtype)
    level = None if like.tensor_scale is None else jnp.ones(like.tensor_scale.shape)
    q = QTensor(values, np.asarray(scales), fmt.name, tensor_scale=level).widen()
    return jax.device_put(q)


def measure(
    programs: dict[str, Callable[[], Any]], repeats: int, warm: int = 2
) -> dict[str, list[float]]:
    """Seconds of every program, taken in turns, `repeats` times after `warm` unrecorded ones."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(warm + repeats):
        for name, run in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            if turn >= warm:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def bench(formats: list[str], shape: tuple[int, int], m: int, repeats: int) -> list[dict[str, Any]]:
    """One row per format: median and least seconds, and the median as a ratio to the peer's."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((m, shape[0]), np.float32))
    product = jax.jit(matmul)
    weights = {name: random_weight(get_format(name), shape) for name in (PEER, *formats)}
    programs = {name: (lambda w=w: product(x, w)) for name, w in weights.items()}
    seconds = measure(programs, repeats)
    peer = statistics.median(seconds[PEER])
    return [
        {
            "format": name,
            "m": m,
            "shape": list(shape),
            "implementation": explain(x, weights[name]).implementation,
            "held_as": str(getattr(weights[name], "values", weights[name]).dtype),
            "median_s": statistics.median(times),
            "least_s": min(times),
            "ratio_to_float32": statistics.median(times) / peer,
        }
        for name, times in seconds.items()
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows as a table a person can read."""
    table = Table(title="CPU matmul, measured; ratio to XLA's float32 product in the same turns")
    for heading in ("format", "held as", "M", "runs", "median ms", "least ms", "ratio"):
        table.add_column(heading, justify="left" if heading in ("format", "runs") else "right")
    for row in rows:
        table.add_row(
            row["format"],
            row["held_as"],
            str(row["m"]),
            row["implementation"],
            f"{1e3 * row['median_s']:.1f}",
            f"{1e3 * row['least_s']:.1f}",
            f"{row['ratio_to_float32']:.2f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="The CPU matmul, timed in every format.")
    parser.add_argument("--formats", nargs="+", default=SUITE, choices=list(FORMATS))
    parser.add_argument("--m", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--shape", nargs=2, type=int, default=SHAPE, metavar=("K", "N"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = (options.shape[0], options.shape[1])
    formats = [name for name in options.formats if name != PEER]
    rows = [row for m in options.m for row in bench(formats, shape, m, options.repeats)]
    print_table(rows)
    if options.json:
        machine = {"cpu": platform.processor(), "cores": os.cpu_count(), "jax": jax.__version__}
        partial = options.json.with_name(options.json.name + ".partial")
        partial.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        partial.replace(options.json)


if __name__ == "__main__":
    main()
