"""Load on a running server: many streams, some of them dropped midway; is anything lost or leaked?

    tpu-stack serve runs/a-int4 --port 8000 &
    python experiments/serve_load.py http://127.0.0.1:8000 --requests 1000 --streams 200

Hardware: any; CPU emulation takes about a minute for the demo's model. Cost: none. Expected result:
every request is answered or was dropped by us, slots and pages in use are back to 0, and nothing
was compiled: the program exits with 1 otherwise.
"""

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import tyro

from tpu_stack.cli.console import print_table, save_json


@dataclass(frozen=True)
class Options:
    """What to send."""

    url: tyro.conf.Positional[str]
    """Where the server is."""
    requests: int = 1000
    """Requests in all; 0 for as many as fit in --seconds."""
    streams: int = 200
    """Requests in flight at once (a closed loop)."""
    dropped: float = 1 / 3
    """Share of requests whose connection is dropped after some tokens."""
    prompt_words: tuple[int, int] = (1, 60)
    """Shortest and longest prompt, in words."""
    max_tokens: tuple[int, int] = (4, 64)
    """Fewest and most tokens asked for."""
    seconds: float = 600
    """Begin no request after this."""
    pid: int | None = None
    """The server's process, whose memory is then watched (Linux)."""
    seed: int = 0
    """Which lengths, words and drops."""
    json: Path | None = None
    """Also write the result to this file."""


@dataclass
class Seen:
    """What the requests came to; times in seconds."""

    answered: int = 0
    dropped: int = 0
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)


TEXT = "def class return import self for in range if else None True 0 1 x y ( ) : = + print"


async def one(client: httpx.AsyncClient, options: Options, number: int, seen: Seen) -> None:
    """One streamed completion, read to its end or dropped on the way."""
    rng = random.Random(f"{options.seed}/{number}")
    wanted = rng.randint(*options.max_tokens)
    body = {
        "model": MODEL[0],
        "prompt": " ".join(rng.choices(TEXT.split(), k=rng.randint(*options.prompt_words))),
        "max_tokens": wanted,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    drop_after = rng.randint(1, max(1, wanted // 2)) if rng.random() < options.dropped else None
    started, first, pieces, usage = time.perf_counter(), None, 0, None
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            seen.wrong.append(f"{response.status_code}: {response.text[:200]}")
            return
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                seen.wrong.append(str(event["error"]))
                return
            usage = event.get("usage") or usage
            pieces += bool(event["choices"])
            first = first or time.perf_counter() - started
            if drop_after is not None and pieces >= drop_after:
                seen.dropped += 1
                return
    took = time.perf_counter() - started
    if usage is None or first is None:
        seen.wrong.append(f"request {number} ended without its usage")
        return
    seen.answered += 1
    seen.tokens += usage["completion_tokens"]
    seen.first.append(first)
    if usage["completion_tokens"] > 1:
        seen.per_token.append((took - first) / (usage["completion_tokens"] - 1))


MODEL = [""]


async def load(options: Options) -> dict[str, Any]:
    """Sends everything; the result in JSON-ready fields."""
    seen = Seen()
    limits = httpx.Limits(max_connections=options.streams)
    async with httpx.AsyncClient(base_url=options.url, timeout=600, limits=limits) as client:
        MODEL[0] = (await client.get("/v1/models")).json()["data"][0]["id"]
        numbers = iter(range(options.requests or 10**9))
        started = time.perf_counter()

        async def stream() -> None:
            for number in numbers:
                if time.perf_counter() - started > options.seconds:
                    return
                await one(client, options, number, seen)
                if options.pid is not None and number % 50 == 0:
                    seen.memory.append((time.perf_counter() - started, _resident(options.pid)))

        await asyncio.gather(*(stream() for _ in range(options.streams)))
        took = time.perf_counter() - started
        stats = await _quiet(client)
    return _result(options, seen, took, stats)


async def _quiet(client: httpx.AsyncClient) -> dict[str, Any]:
    """The server's own figures once it is idle, or after ten seconds as they are."""
    stats: dict[str, Any] = {}
    for _ in range(100):
        stats = (await client.get("/stats")).json()
        if not stats["running"] and not stats["waiting"]:
            break
        await asyncio.sleep(0.1)
    return stats


def _resident(pid: int) -> float:
    """MiB of memory that a process holds."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


def _result(options: Options, seen: Seen, took: float, stats: dict[str, Any]) -> dict[str, Any]:
    def quantiles(times: list[float]) -> dict[str, float]:
        if len(times) < 2:
            return {}
        cuts = statistics.quantiles(times, n=100)
        return {f"p{cut}": round(1e3 * cuts[cut - 1], 1) for cut in (50, 95, 99)}

    return {
        "answered": seen.answered,
        "dropped": seen.dropped,
        "wrong": seen.wrong[:20],
        "seconds": round(took, 1),
        "tokens_per_s": round(stats["new_tokens"] / took, 1),
        "ttft_ms": quantiles(seen.first),
        "tpot_ms": quantiles(seen.per_token),
        "memory_mib": seen.memory,
        "left_running": stats["running"] + stats["waiting"],
        "left_pages": stats["pages"] - stats["pages_free"] - stats["pages_cached"],
        "recompilations": stats["recompilations"],
        "preempted": stats["preempted"],
        "finished": stats["finished"],
    }


def main() -> None:
    """Sends the load, prints a table, and fails when anything was lost or leaked."""
    options = tyro.cli(Options)
    result = asyncio.run(load(options))
    rows = [[name, str(value)] for name, value in result.items() if name != "memory_mib"]
    if len(memory := [m for _, m in result["memory_mib"]]) > 3:
        middle = memory[len(memory) // 3 :]
        growth = statistics.mean(middle[-3:]) / statistics.mean(middle[:3]) - 1
        rows.append(
            ["memory, last against first two thirds", f"{growth:+.1%} of {middle[0]:.0f} MiB"]
        )
    print_table("load (measured)", ["what", "value"], rows)
    save_json(options.json, result)
    leaked = result["left_running"] or result["left_pages"] or result["recompilations"]
    raise SystemExit(1 if result["wrong"] or leaked else 0)


if __name__ == "__main__":
    main()
