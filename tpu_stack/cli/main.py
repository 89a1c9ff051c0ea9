"""The `tpu-stack` command: finds the verb's module, parses its options, turns errors into one line.

Each verb is a module of this folder with a frozen dataclass `Options` (its docstring is the help
text and ends in an example) and a function `run(options)`; or a package with `ACTIONS`, each such a
module, and perhaps a `DEFAULT`, the action where the next word names none. A verb's module is
imported only when the verb runs, so `tpu-stack --help` needs no JAX.

    main(["chips", "8i"])
"""

import contextlib
import difflib
import importlib
import io
import itertools
import os
import re
import signal
import sys
import traceback
from typing import Any, NoReturn

from tpu_stack.errors import UserError
from tpu_stack.interrupts import catch_ctrl_c

VERBS = {
    "demo": "the main job, end to end: train, pack, generate, evaluate, compare",
    "train": "train a model under a training profile",
    "checkpoint": "inspect a checkpoint: digest, show",
    "import": "a Hugging Face folder as a checkpoint",
    "export": "a checkpoint as a Hugging Face folder",
    "logits": "logits of a bundle or checkpoint for given tokens",
    "pack": "freeze a checkpoint into a packed bundle for serving",
    "generate": "write text with a bundle under a serving profile",
    "serve": "serve a bundle over HTTP: the API of OpenAI's clients, metrics and a page",
    "eval": "validation loss, perplexity and bits per byte of a bundle or checkpoint",
    "compare": "one model, the training and the serving profile side by side",
    "profiles": "sharding profiles, and how they lay out a model",
    "chips": "what is known of each TPU chip, with sources",
    "plan": "which chips, which mesh, will it fit: compile, memory, simulate, search, backtest",
    "kernels": "kernels without a TPU: verify, explain, profile, tune",
}

_UNKNOWN = re.compile(r"Unrecognized options: (\S+?)(?:,|$)")
_CHOICE = re.compile(r"invalid choice (.+) for argument '(\S+)'\. Expected one of \((.*?),?\)")
_KIND = re.compile(
    r"Error parsing (\S+): no type matching (\S+) could be instantiated from \[(.*)\]"
)
_NUMBER = re.compile(r"Error parsing (\S+): .* (float|int)(?:\(\) with base 10)?: (.*)")
_KINDS = {"INT": "a whole number", "FLOAT": "a number"}
"""tyro's name of a type -> our words."""
_NONE = "{None}"
_BORDER = "│|╭╮╰╯"  # the sides of tyro's boxes, in UTF-8 and in ASCII terminals


def _usage(what: str = "verb", before: str = "", words: dict[str, str] = VERBS) -> str:
    width = max(map(len, words))
    rows = "\n".join(f"  {word:<{width}}  {text}" for word, text in words.items())
    call = f"tpu-stack {before}{what.upper()}"
    return f"usage: {call} [options]\n\n{what}s:\n{rows}\n\n`{call} --help` says more."


def _check_word(what: str, word: str, words: dict[str, str]) -> None:
    """Ends the program with the nearest of `words` when `word` is none of them."""
    if word not in words:
        near = difflib.get_close_matches(word, words, n=1)
        hint = f"; perhaps you meant {near[0]}" if near else f"; one of: {', '.join(words)}"
        _fail(f"unknown {what} {word!r}{hint}")


def _fail(message: str, status: int = 2) -> NoReturn:
    print(f"tpu-stack: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


def _one_line(boxed: str, flags: list[str]) -> str:
    """tyro's boxed message in one line: its first paragraph, or our own words for the errors that
    we recognise; for an unknown option, the nearest of `flags`."""
    inside = [line.strip().strip(_BORDER).strip() for line in boxed.splitlines()[1:]]
    said = itertools.dropwhile(lambda line: not line.strip("─-+"), inside)
    lines = list(itertools.takewhile(lambda line: line.strip("─-+"), said))
    text = " ".join(lines) or "the options do not parse"
    unknown = _UNKNOWN.match(text)
    if unknown:
        near = difflib.get_close_matches(unknown[1].replace("_", "-"), flags, n=1, cutoff=0.5)
        hint = f"; perhaps you meant {near[0]}" if near else "; --help lists the options"
        return f"unknown option {unknown[1]}{hint}"
    if choice := _CHOICE.match(text):
        value, flag, known = choice.groups()
        return f"{flag} is {value}; it must be one of {known.replace(chr(39), '')}"
    if kind := _KIND.match(text):
        flag, wanted, value = kind.groups()
        wanted = " or ".join(_KINDS.get(each, each) for each in wanted.split("|") if each != _NONE)
        return f"{flag} is {value}; it must be {wanted}"
    if number := _NUMBER.match(text):
        flag, wanted, value = number.groups()
        return f"{flag} is {value}; it must be {_KINDS[wanted.upper()]}"
    return " ".join(lines[:2]) if lines and lines[0].endswith(":") else text


def parse(verb: str, options_type: type, argv: list[str]) -> Any:
    """`argv` as an instance of `options_type`; bad options end the program with one line."""
    import tyro

    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(options_type, args=argv, prog=f"tpu-stack {verb}")
    except SystemExit as stop:
        if not stop.code:
            raise
        _fail(_one_line(captured.getvalue(), _flags(options_type)))


def _flags(options_type: type) -> list[str]:
    """Every flag of a verb, as its help text spells them."""
    import tyro

    captured = io.StringIO()
    with contextlib.redirect_stdout(captured), contextlib.suppress(SystemExit):
        tyro.cli(options_type, args=["--help"])
    return sorted(set(re.findall(r"--[a-z][\w.-]*", captured.getvalue())))


def _prepare_backend() -> None:
    """Without a TPU device file, tells JAX to use the CPU, so that it does not probe libtpu."""
    has_tpu = any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0"))
    if not has_tpu:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def main(argv: list[str]) -> int:
    """Runs one verb; returns its exit status.

    0 success; 1 a check of the verb failed; 128 + N stopped by signal N. Raises SystemExit, after
    one line on standard error, with 2 for bad input and 1 for an error of the operating system.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    verb, *rest = argv
    if verb == "--version":
        from tpu_stack import __version__

        print(f"tpu-stack {__version__}")
        return 0
    _check_word("verb", verb, VERBS)
    _prepare_backend()
    module = importlib.import_module(f"tpu_stack.cli.{verb}")
    actions = getattr(module, "ACTIONS", None)
    default = getattr(module, "DEFAULT", None)
    if default is not None and (not rest or rest[0] not in module.ACTIONS):
        module = importlib.import_module(f"tpu_stack.cli.{verb}.{default}")
    elif actions is not None:
        if not rest or rest[0] in ("-h", "--help", "help"):
            print(_usage("action", f"{verb} ", actions))
            return 0
        _check_word(f"{verb} action", rest[0], actions)
        module = importlib.import_module(f"tpu_stack.cli.{verb}.{rest[0]}")
        verb, rest = f"{verb} {rest[0]}", rest[1:]
    try:
        options = parse(verb, module.Options, rest)
        return module.run(options) or 0
    except UserError as error:
        if os.environ.get("TPU_STACK_TRACEBACK"):
            traceback.print_exc()
        _fail(str(error))
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        _fail(f"{error.strerror or error}{where}", status=1)


def _ignore_late_callbacks() -> None:
    """Suppresses the tracebacks of storage threads once a write has failed.

    TensorStore calls back into the event loop that Orbax closed when its first write failed; Python
    reports each call as unraisable. The failure itself is raised, and the user reads its one line.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            previous(unraisable)

    sys.unraisablehook = hook


def entry_point() -> NoReturn:
    """The console script. Ctrl-C at any moment is one line and status 130."""
    catch_ctrl_c()
    _ignore_late_callbacks()
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("tpu-stack: interrupted; nothing half-written is left", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    raise SystemExit(status)


if __name__ == "__main__":
    entry_point()
