"""`tpu-stack serve bench`: load on an engine, in a closed or an open loop, beside transformers."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from tyro.conf import Positional

from tpu_stack.cli.console import print_table, save_json
from tpu_stack.cli.placement import EngineWhere, Unprefixed
from tpu_stack.errors import UserError
from tpu_stack.serving.engine_options import EngineOptions
from tpu_stack.serving.launch import Weights, start_engine


@dataclass(frozen=True)
class Options:
    """Measure an engine under load: throughput, TTFT and TPOT at p50, p95 and p99.

    Without --rate the loop is closed: --streams requests are open at any time. With it, requests
    arrive in a Poisson process. Prompts are random tokens; every answer has its full length.

    Example: tpu-stack serve bench runs/a-int4 --lengths 64:24x3,512:64 --rate 4
    """

    bundle: Positional[Path | None] = None
    """A bundle that `tpu-stack pack` wrote; or name a --model."""
    model: str | None = None
    """Preset to fill with random weights, instead of a bundle."""
    format: str = "int8"
    """Weight format of --model: float32, bf16, int8, int4 and the others of `tpu-stack pack`."""
    lengths: str = "64:24"
    """Mix of lengths in tokens, PROMPT:NEW[xWEIGHT],...; each a number or LEAST-MOST."""
    text: Path | None = None
    """UTF-8 text to cut prompts from, instead of random tokens; it needs a bundle, whose tokenizer
    encodes it."""
    requests: int = 64
    """Requests in all."""
    rate: float | None = None
    """Requests per second, for an open loop."""
    streams: int = 8
    """Requests open at once, in the closed loop."""
    repeats: int = 1
    """Runs, with the same lengths and other prompts; the table shows that of median throughput."""
    host_overhead: bool = False
    """Also measure, with every slot full, how much longer a decode step of the engine takes than
    its compiled program alone."""
    peer_python: Path | None = None
    """A Python with torch and transformers: after each of the --repeats it runs the same requests,
    in batches of --streams, through a model of the same shape with random weights."""
    peer_dtype: str = "float32"
    """The peer's dtype: float32 or bfloat16."""
    seed: int = 0
    """Chooses the lengths, prompts and arrivals."""
    json: Path | None = None
    """Also write the results to this file."""
    engine: Annotated[EngineOptions, Unprefixed] = field(default_factory=EngineOptions)
    where: Annotated[EngineWhere, Unprefixed] = field(default_factory=EngineWhere)


def run(options: Options) -> None:
    """Measures and prints a table."""
    from tpu_stack.serving.bench.workload import LengthMix, arrival_times

    _check(options)
    mix = LengthMix.parse(options.lengths)
    if options.rate is not None:
        arrival_times(count=1, rate=options.rate, seed=0)
    result = measure(options, mix)
    rows = _rows(result)
    what, where = f"{result['model']} ({result['format']})", result["profile"]
    where = f"{where} emulated on CPU" if result["emulated"] else where
    print_table(f"{what}, {where}: {result['load']} (measured)", ["what", "value"], rows)
    save_json(options.json, result)


def _check(options: Options) -> None:
    if (options.bundle is None) == (options.model is None):
        raise UserError("name a bundle, or a --model for random weights, and not both")
    for name in ("requests", "streams", "repeats"):
        if (value := getattr(options, name)) < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if options.peer_dtype not in ("float32", "bfloat16"):
        raise UserError(f"--peer-dtype is {options.peer_dtype}; it is float32 or bfloat16")


def measure(options: Options, mix: Any) -> dict[str, Any]:
    """Starts the engine and runs the load, in turns with the peer; the results, JSON-ready."""
    from tpu_stack.serving.bench.bandwidth import hbm_utilisation
    from tpu_stack.serving.bench.host_overhead import check_host_overhead, host_overhead

    weights = _weights(options)
    text = _text(options, weights)
    config, format = weights.config, weights.format
    served = start_engine(weights, options.where, options.engine)
    service, profile = served.service, served.profile
    try:
        if options.host_overhead:
            check_host_overhead(service)
        runs = _requests(options, mix, config.vocab_size, service.max_length, text)
        outcomes, peer = _by_turns(options, config, service, runs)
        host = asdict(host_overhead(service)) if options.host_overhead else None
        facts = service.describe()
    finally:
        service.close(0.0)
    outcomes.sort(key=lambda each: each.report()["new_tokens_per_s"])
    outcome = outcomes[len(outcomes) // 2]
    return {
        "model": options.model or str(options.bundle),
        "format": format,
        "lengths": options.lengths,
        "load": f"{options.rate:g} requests a second" if options.rate is not None
        else f"{options.streams} streams",
        **facts,
        **outcome.report(),
        "runs_new_tokens_per_s": [each.report()["new_tokens_per_s"] for each in outcomes],
        "hbm_utilisation": hbm_utilisation(outcome, config, format, profile),
        "host_overhead": host,
        "peer": peer,
    }  # fmt: skip


def _requests(
    options: Options, mix: Any, vocab_size: int, max_length: int, text: list[int] | None
) -> list[Any]:
    """The requests of every run."""
    from tpu_stack.serving.bench.workload import make_requests

    return [
        make_requests(
            mix,
            count=options.requests,
            vocab_size=vocab_size,
            max_length=max_length,
            seed=options.seed,
            text=text,
            run=run,
        )
        for run in range(options.repeats)
    ]


def _by_turns(
    options: Options, config: Any, service: Any, runs: list[Any]
) -> tuple[list[Any], dict[str, Any] | None]:
    """Every run's outcome and, with a peer, its throughput right after each run."""
    from tpu_stack.serving.bench.peer import TransformersPeer

    if options.peer_python is None:
        return [_once(options, service, requests) for requests in runs], None
    print("warming up the peer ...", file=sys.stderr, flush=True)
    outcomes, rates = [], []
    asked = (options.peer_python, config, runs[0], options.streams, options.peer_dtype)
    with TransformersPeer(*asked) as peer:
        for requests in runs:
            outcomes.append(_once(options, service, requests))
            rates.append(peer.run())
    ours = [outcome.report()["new_tokens_per_s"] for outcome in outcomes]
    ratios = [own / rate for own, rate in zip(ours, rates, strict=True)]
    return outcomes, {
        **peer.facts,
        "new_tokens_per_s": median(rates),
        "runs_new_tokens_per_s": rates,
        "ratio": median(ratios),
        "ratios": ratios,
    }


def _weights(options: Options) -> Weights:
    from tpu_stack.models.presets import get_preset

    if options.bundle is not None:
        return Weights.of(options.bundle)
    assert options.model is not None
    return Weights(get_preset(options.model), options.format)


def _text(options: Options, weights: Weights) -> list[int] | None:
    """The tokens of --text."""
    if options.text is None:
        return None
    if weights.bundle is None:
        raise UserError("--text needs a bundle, whose tokenizer encodes it; --model has none")
    try:
        text = options.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--text {options.text} is not UTF-8 text") from error
    return weights.bundle.tokenizer.encode(text)


def _once(options: Options, service: Any, requests: Any) -> Any:
    from tpu_stack.serving.bench.measure import closed_loop, open_loop
    from tpu_stack.serving.bench.workload import arrival_times

    if options.rate is None:
        return closed_loop(service, requests, options.streams)
    times = arrival_times(count=len(requests), rate=options.rate, seed=options.seed)
    return open_loop(service, requests, times)


def _rows(result: dict[str, Any]) -> list[list[str]]:
    def cuts(name: str) -> str:
        return ", ".join(f"{value:,.1f}" for value in result[name].values()) or "-"

    used = result["hbm_utilisation"]
    rows = [
        ["requests completed", f"{result['completed']} of {result['requests']}"],
        ["seconds", f"{result['seconds']:.1f}"],
        ["new tokens/s", f"{result['new_tokens_per_s']:,.1f}"],
        ["prompt and new tokens/s", f"{result['tokens_per_s']:,.1f}"],
        ["requests/s", f"{result['requests_per_s']:.2f}"],
        ["TTFT ms, p50, p95, p99", cuts("ttft_ms")],
        ["TPOT ms, p50, p95, p99", cuts("tpot_ms")],
        ["latency ms, p50, p95, p99", cuts("latency_ms")],
        ["rows per decode step", f"{result['rows_per_decode_step']:.1f} of {result['slots']}"],
        ["HBM bandwidth used", "- (emulated)" if result["emulated"] else "-"
         if used is None else f"{used:.0%}"],
    ]  # fmt: skip
    if result["refused"] or result["preempted"]:
        rows.append(["refused, preempted", f"{result['refused']}, {result['preempted']}"])
    if result["drafted"]:
        share = result["accepted"] / result["drafted"]
        rows.append(
            ["guesses accepted", f"{result['accepted']} of {result['drafted']} ({share:.0%})"]
        )
    if (host := result["host_overhead"]) is not None:
        steps = f"{host['step_ms']:.1f} ms, its program {host['program_ms']:.1f} ms"
        rows.append([f"engine's step of {host['rows']} rows", steps])
        spread = f"quartiles {host['low']:.1%} to {host['high']:.1%} of {host['windows']} windows"
        rows.append(["host overhead of a step", f"{host['share']:.1%} ({spread})"])
    if (peer := result["peer"]) is not None:
        rows.append(
            [f"peer: {peer['name']}, {peer['dtype']}", f"{peer['new_tokens_per_s']:,.1f} tokens/s"]
        )
        least, most = min(peer["ratios"]), max(peer["ratios"])
        spread = f" ({least:.2f}x to {most:.2f}x)" if least < most else ""
        rows.append(["ratio to the peer, run by run", f"{peer['ratio']:.2f}x{spread}"])
    return rows
