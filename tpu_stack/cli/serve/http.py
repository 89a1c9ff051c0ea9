"""`tpu-stack serve`: a bundle behind OpenAI's HTTP API, with metrics and a page."""

import importlib.util
import ipaddress
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from tpu_stack.cli.console import save_json
from tpu_stack.cli.placement import EngineWhere, Unprefixed
from tpu_stack.cli.serve.reload import catch_reloads, reload_when
from tpu_stack.errors import UserError
from tpu_stack.serving import launch
from tpu_stack.serving.engine_options import EngineOptions
from tpu_stack.serving.http.limits import Limits
from tpu_stack.serving.service import InFlight


@dataclass(frozen=True)
class Options:
    """Serve a bundle: /v1/completions, /v1/chat/completions, /v1/models, /metrics, and a page at /.

    SIGTERM or Ctrl-C finishes what is in flight and exits with 0; a second one exits at once.
    SIGUSR1 reads the bundle again, which may be a symbolic link that now points to another bundle
    of the same model: its weights take over between two steps, and memory must hold both.
    `tpu-stack serve bench` measures an engine under load.

    Example: tpu-stack serve runs/a-int4 --port 8000
    """

    bundle: Positional[Path]
    """A bundle that `tpu-stack pack` wrote."""
    host: str = "127.0.0.1"
    """Address to listen on; only this machine reaches the default."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    name: str | None = None
    """The model's name for clients; the default is that of the bundle's folder, or of the link."""
    api_key_file: Path | None = None
    """A file of API keys, one per line; requests to /v1 must then bring one of them."""
    allow_host: tuple[str, ...] = ()
    """More host names to answer to, such as a proxy's. A server that only this machine reaches
    answers to localhost, its address and these; any other to every name, unless some are given."""
    drain_s: float = 30.0
    """Seconds that requests in flight get to finish after SIGTERM."""
    in_flight: InFlight = "finish"
    """Requests in flight at SIGUSR1 finish on the weights they began with, or restart on the new
    ones."""
    json: Path | None = None
    """Also write the URL, the model and where it runs to this file, once the server is ready."""
    engine: Annotated[EngineOptions, Unprefixed] = field(default_factory=EngineOptions)
    limits: Limits = field(default_factory=Limits)
    where: Annotated[EngineWhere, Unprefixed] = field(default_factory=EngineWhere)


def run(options: Options) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    _require_extra()
    from tpu_stack.serving.http.server import address_of, bind

    options.limits.check()
    if not 0 <= options.drain_s < math.inf:
        raise UserError(f"--drain-s is {options.drain_s}; it must be at least 0 and finite")
    keys = _read_keys(options.api_key_file)
    wanted = catch_reloads()
    weights = launch.Weights.of(options.bundle)
    listener = bind(options.host, options.port)
    try:
        print(f"loading {options.bundle} ...", file=sys.stderr, flush=True)
        served = launch.start_engine(weights, options.where, options.engine)
        if not keys and not _is_loopback(options.host):
            print(f"warning: other machines may reach {options.host}, and no API key is required"
                  " (--api-key-file)", file=sys.stderr)  # fmt: skip
        said = {
            "url": address_of(listener),
            "model": options.name or Path(os.path.abspath(options.bundle)).name,
            "format": weights.format,
            "profile": served.profile.name,
            "mesh": dict(served.profile.mesh),
            "emulated": served.profile.emulated,
            "pid": os.getpid(),
        }
        reload_when(wanted, lambda: served.reload(options.in_flight))
        _serve(options, served, keys, listener, said)
    finally:
        listener.close()


def _serve(
    options: Options,
    served: launch.Served,
    keys: frozenset[str],
    listener: Any,
    said: dict[str, Any],
) -> None:
    from tpu_stack.serving.http.host import Host
    from tpu_stack.serving.http.model import Model
    from tpu_stack.serving.http.server import Server

    service, bundle = served.service, served.weights.bundle
    assert bundle is not None
    try:
        model = Model(said["model"], service, bundle.tokenizer, bundle.chat)
        _ = model.template  # refuses a bundle whose template cannot be read
        server = Server(Host(model, options.limits, keys, _names(options)), options.drain_s)
        mesh = ", ".join(f"{axis}={size}" for axis, size in said["mesh"].items())
        where = f"{said['profile']} emulated on CPU" if said["emulated"] else said["profile"]
        if (prefill := service.describe().get("prefill_profile")) is not None:
            where += f", prefill on {prefill}"
        what = f"{said['model']} ({said['format']})"
        print(f"serving {what} at {said['url']}: {where}, mesh {mesh}", flush=True)
        save_json(options.json, said)
        server.run(sockets=[listener])
    finally:
        service.close(0.0)


def _require_extra() -> None:
    missing = [
        name
        for name in ("starlette", "uvicorn", "prometheus_client")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}; pip install 'tpu-stack[serve]'")


def _read_keys(path: Path | None) -> frozenset[str]:
    """The keys of a file, one per line, without blank lines and `#` comments."""
    if path is None:
        return frozenset()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--api-key-file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--api-key-file {path} is not UTF-8 text") from error
    lines = (line.strip() for line in text.splitlines())
    keys = frozenset(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UserError(f"--api-key-file {path} holds no key; write one per line")
    return keys


def _names(options: Options) -> frozenset[str] | None:
    """The host names that the server answers to; None for any."""
    from tpu_stack.serving.http.host_names import LOOPBACK

    given = {name.lower() for name in options.allow_host}
    if not given and not _is_loopback(options.host):
        return None
    own = f"[{options.host}]" if ":" in options.host else options.host
    return LOOPBACK | {own.lower()} | given


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
