"""The shape of the source tree: imports go down only, files stay small, nothing is a junk drawer.

Read with `ast`, so imports inside functions count too.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Top to bottom; names on one line are siblings and do not import each other.
ORDER = [
    ["cli"],
    ["planner"],
    ["learning"],
    ["retrieval"],
    ["serving", "training"],
    ["reliability"],
    ["data", "checkpoint"],
    ["models"],
    ["quant"],
    ["sharding"],
    ["kernels", "hardware"],
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
BANNED = {"utils", "common", "misc", "helpers"}
MAX_LINES = 500
# Modules of the package's root, open to all: they know nothing of the rooms.
OPEN = {"errors", "files", "interrupts", "units", "__version__"}


def sources(*folders: str) -> list[Path]:
    """Every .py file of these folders; `kernels/` is listed once, not through its symlink too."""
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts and path.parts[len(ROOT.parts) :][:2] != LINK
    )


LINK = ("tpu_stack", "kernels")
PACKAGE = [*sources("tpu_stack"), *sources("kernels")]


def module_of(path: Path) -> str:
    """The dotted module name that a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("tpu_stack", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts)


def imported(source: str, module: str) -> set[str]:
    """Dotted names that `source` imports, relative ones resolved; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and _is_import_call(node.func):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                found.add(name.value)
            elif isinstance(name, ast.JoinedStr):
                first = name.values[0]
                found.add(first.value if isinstance(first, ast.Constant) else "?")
    return found


def _is_import_call(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def complaints(source: str, module: str) -> list[str]:
    """Imports of `module` that the order forbids."""
    room = module.split(".")[1]
    wrong = []
    for name in sorted(imported(source, module)):
        root, *rest = name.split(".")
        if root in ("kernels", "experiments", "tests"):
            wrong.append(f"{module} imports {name}: {root} is not part of the package")
        if root != "tpu_stack" or not rest or rest[0] == room or rest[0] in OPEN:
            continue
        if rest[0] not in RANK:
            wrong.append(f"{module} imports {name}, which is in no known room")
        elif room not in RANK:
            wrong.append(f"{module} imports {name}: modules of the root know no rooms")
        elif RANK[room] >= RANK[rest[0]]:
            wrong.append(f"{module} imports {name}: imports go down only")
    return wrong


@pytest.mark.parametrize("path", PACKAGE, ids=module_of)
def test_imports_go_down(path):
    assert not complaints(path.read_text(encoding="utf-8"), module_of(path))


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("tpu_stack.models.x", "import tpu_stack.quant.matmul, jax", False),
        ("tpu_stack.models.x", "from tpu_stack import errors, files", False),
        ("tpu_stack.models.x", "from tpu_stack.training.step import f", True),
        ("tpu_stack.models.x", "def f():\n from tpu_stack.training import step", True),
        ("tpu_stack.models.x", "from tpu_stack import cli", True),
        ("tpu_stack.models.x", "from ..data import packing", True),
        ("tpu_stack.models.x", "from .rope import rotate", False),
        ("tpu_stack.serving.x", "from tpu_stack.training.config import TrainConfig", True),
        ("tpu_stack.data.x", "import tpu_stack.checkpoint.store", True),
        ("tpu_stack.kernels.x.y", "from tpu_stack.hardware import chips", True),
        ("tpu_stack.kernels.x.y", "from tpu_stack.errors import UserError", False),
        (
            "tpu_stack.hardware.x",
            "import importlib\nimportlib.import_module('tpu_stack.cli')",
            True,
        ),
        ("tpu_stack.hardware.x", "importlib.import_module(f'tpu_stack.cli.{verb}')", True),
        ("tpu_stack.cli.x", "importlib.import_module(f'tpu_stack.cli.{verb}')", False),
        ("tpu_stack.quant.x", "from kernels.quantized_matmul import f", True),
        ("tpu_stack.quant.x", "from experiments import shakespeare_char", True),
        ("tpu_stack.errors", "from tpu_stack.cli import main", True),
        ("tpu_stack.quant.x", "import tpu_stack.grabbag", True),
    ],
)
def test_the_check_itself(module, source, wrong):
    assert bool(complaints(source, module)) == wrong


def test_every_room_is_in_the_order():
    rooms = {path.name for path in (ROOT / "tpu_stack").iterdir() if path.is_dir()}
    assert rooms - {"__pycache__"} <= set(RANK)


def test_kernels_are_linked_and_no_package_of_their_own():
    """A root package called `kernels` would shadow another project's; ours is tpu_stack.kernels."""
    link = ROOT / "tpu_stack" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    operations = [path for path in (ROOT / "kernels").iterdir() if path.is_dir()]
    for folder in operations:
        if folder.name != "__pycache__":
            assert (folder / "__init__.py").is_file()


def test_nobody_imports_the_root_kernels():
    for path in sources("experiments", "tests", "tpu_stack", "kernels"):
        names = imported(path.read_text(encoding="utf-8"), module_of(path))
        assert not [name for name in names if name.split(".")[0] == "kernels"], path


def test_files_are_small():
    everything = sources("tpu_stack", "kernels", "tests", "experiments")
    assert len(everything) > 100
    long = {
        str(path.relative_to(ROOT)): lines
        for path in everything
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long


def test_no_junk_drawers():
    for path in sources("tpu_stack", "kernels", "tests", "experiments"):
        assert not BANNED & set(path.relative_to(ROOT).with_suffix("").parts), path


def test_every_module_says_why_it_exists():
    """House rule 6: a module docstring, except in empty __init__ files."""
    for path in PACKAGE:
        text = path.read_text(encoding="utf-8")
        assert not text.strip() or ast.get_docstring(ast.parse(text)), path
