"""Renews sections of `experiments/RESULTS.md`: each is a command, and what the command prints.

Hardware: any CPU; rung 3 needs libtpu (Linux x86-64). Cost: seconds to half an hour a section.
A section not asked for stays as it is; its first line says when and on what it was measured.

    python experiments/results.py
    python experiments/results.py demo compare
"""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tyro

from tpu_stack.errors import UserError
from tpu_stack.files import write_text

PAGE = Path(__file__).parent / "RESULTS.md"
BENCH = "python -m tpu_stack.kernels.quantized_matmul.bench"


@dataclass(frozen=True)
class Section:
    """What stands under one heading: how far it is proven, and the commands that print it.

    "tpu-stack" and "python" stand for this interpreter's; `$NAME` for a variable of the environment
    that says where the reader's own data or peer is.
    """

    rung: str
    commands: tuple[str, ...]


SECTIONS = {
    "demo": Section(
        "5 measured on this CPU; perplexities 0 reference", ("tpu-stack demo --out runs/results",)
    ),
    "compare": Section(
        "programs compiled by XLA:CPU for an emulated mesh; times 4 projected",
        ("tpu-stack compare --model llama3_70b --train 8t:4x4x4 --serve 8i:8",),
    ),
    "compile": Section(
        "3 compiled; times 4 projected",
        (
            "tpu-stack plan compile --model llama3_8b --profile v5p:4x4x4 --program train",
            "tpu-stack plan compile --model llama3_8b --profile v6e:2x2 --program decode",
        ),
    ),
    "memory": Section("4 projected, beside 3 compiled", ("tpu-stack plan memory --cases",)),
    "backtest": Section(
        "4 projected, against published results", ("tpu-stack plan backtest $PUBLISHED_CSV",)
    ),
    "search": Section(
        "4 projected",
        ("tpu-stack plan search --model llama3_8b --chips v6e:64 --goal train-throughput",),
    ),
    "rollout": Section(
        "5 measured on this CPU; differences of log-probabilities 0 reference",
        ("python experiments/rollout.py",),
    ),
    "memory-of-verbs": Section(
        "5 measured on this CPU", ("python experiments/memory_of_verbs.py",)
    ),
    "kernels": Section("3 compiled", (f"{BENCH} --chips v5e v6e", f"{BENCH} --chips v5p 7x")),
    "products-on-cpu": Section("5 measured on this CPU", ("python -m tpu_stack.quant.bench",)),
    "characters": Section(
        "5 measured on this CPU",
        ("python experiments/shakespeare_char.py --data $TINYSHAKESPEARE",),
    ),
    "serving": Section(
        "5 measured on this CPU",
        (
            "tpu-stack serve bench --model qwen3_0_6b --max-length 256 --requests 8 --repeats 5"
            " --lengths 64:24 --format float32 --dtype float32",
            "tpu-stack serve bench --model smollm2_135m --max-length 256 --lengths 32:32"
            " --host-overhead",
        ),
    ),
}


@dataclass(frozen=True)
class Options:
    """Run the commands of the named sections and write what they print into RESULTS.md."""

    sections: tyro.conf.Positional[tuple[str, ...]] = ()
    """Which; without any, they are listed with their commands."""


def main(options: Options) -> None:
    """Renews what is asked for. Raises UserError for an unknown section or a command that fails."""
    if not options.sections:
        for name, section in SECTIONS.items():
            print(name, *section.commands, sep="\n    ")
        return
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        raise UserError(f"no section is called {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    for name in options.sections:
        text = section_text(name, SECTIONS[name], date.today().isoformat())
        write_text(PAGE, replaced(PAGE.read_text(encoding="utf-8"), name, text))
        print(f"{PAGE.name}: {name} renewed", flush=True)


def section_text(name: str, section: Section, day: str) -> str:
    """The section in Markdown, its commands run now."""
    head = f"## {name}\n{day}, {_machine()}, {_versions()}. Rung: {section.rung}.\n"
    blocks = [f"\n```\n$ {command}\n{_printed(command)}\n```\n" for command in section.commands]
    return head + "".join(blocks)


def _printed(command: str) -> str:
    words: list[str] = []
    for word in command.split():
        if word.startswith("$") and word[1:] not in os.environ:
            raise UserError(f"`{command}` needs the environment variable {word[1:]}")
        words.append(os.environ[word[1:]] if word.startswith("$") else word)
    modules = ["-m", "tpu_stack.cli.main"] if words[0] == "tpu-stack" else []
    done = subprocess.run(
        [sys.executable, *modules, *words[1:]], check=False, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise UserError(f"`{command}` ended with exit code {done.returncode}")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return "\n".join(lines).strip("\n")


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.machine()


def _versions() -> str:
    found = []
    for name in ("jax", "libtpu"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def replaced(page: str, name: str, text: str) -> str:
    """`page` with its section `## name`, up to the next `## `, replaced by `text`, or appended."""
    before, heading, rest = page.partition(f"## {name}\n")
    if not heading:
        return f"{page.rstrip()}\n\n{text}"
    _, following, after = rest.partition("\n## ")
    return before + text + (f"\n## {after}" if following else "")


def _run(arguments: Sequence[str] | None = None) -> int:
    try:
        main(tyro.cli(Options, args=arguments))
    except UserError as error:
        print(f"results.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_run())
