"""The shape of the source tree: imports go down only, never in a circle; files stay small; nothing
is a junk drawer.

Read with `ast`, so imports inside functions and under TYPE_CHECKING count too. The first run all
the same, later, and hide a circle rather than break it. The second do not run, but two modules that
need each other's types are no easier to read apart; a `Protocol` or a module of its own for the
type breaks the circle in a few lines, so there is no exception for them to learn.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOT_MODULE = "tpu_stack.__init__"
# Top to bottom; names on one line are siblings and do not import each other.
ORDER = [
    ["cli"],
    ["api"],  # what `import tpu_stack` offers; its root loads it lazily
    ["agents"],
    ["planner"],
    ["learning"],
    ["retrieval"],
    ["serving", "training"],
    ["reliability"],
    ["data", "checkpoint"],
    ["models"],
    ["quant"],
    ["sharding"],
    ["kernels", "compiler"],
    ["hardware"],
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
BANNED = {"utils", "common", "misc", "helpers"}
MAX_LINES = 500
# Modules of the package's root, open to all: they know nothing of the rooms.
# All that kernels and the compiler's driver may know of hardware: its table of devices.
DEVICES = "tpu_stack.hardware.devices"
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
        if module == ROOT_MODULE and rest[0] == "api":
            continue
        if rest[0] not in RANK:
            wrong.append(f"{module} imports {name}, which is in no known room")
        elif room in ("kernels", "compiler") and rest[0] == "hardware":
            if not f"{name}.".startswith(f"{DEVICES}."):
                wrong.append(f"{module} imports {name}: of hardware it may know {DEVICES} alone")
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
        ("tpu_stack.kernels.x.y", "from tpu_stack.hardware.devices import DEVICES", False),
        ("tpu_stack.compiler.x", "from tpu_stack.hardware import devices", False),
        ("tpu_stack.compiler.x", "from tpu_stack.hardware.devices_more import f", True),
        ("tpu_stack.compiler.x", "from tpu_stack.kernels import quantized_matmul", True),
        ("tpu_stack.planner.x", "from tpu_stack.compiler import driver", False),
        ("tpu_stack.__init__", "def __getattr__(name):\n import tpu_stack.api", False),
        ("tpu_stack.__init__", "from tpu_stack.training import run", True),
        ("tpu_stack.cli.x", "from tpu_stack.api import train", False),
        ("tpu_stack.api", "from tpu_stack.planner import compare", False),
        ("tpu_stack.planner.x", "from tpu_stack import api", True),
        ("tpu_stack.planner.x", "from tpu_stack import train", True),
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


def modules_imported(source: str, module: str, modules: set[str]) -> set[str]:
    """Of `modules`, those that `source` imports by name; a package is its `__init__`.

    That a module's own package runs before it is no edge: else every package whose `__init__`
    offers its modules' names would be a circle.
    """
    found = set()
    for name in imported(source, module):
        for candidate in (name, name.rpartition(".")[0]):
            if (hit := candidate) in modules or (hit := f"{candidate}.__init__") in modules:
                found.add(hit)
                break
    return found - {module}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected sets of more than one module (Tarjan, SIAM J. Comput. 1(2), 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            ring = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(ring) > 1:
                found.append(sorted(ring))

    for name in graph:
        if name not in order:
            visit(name)
    return found


def graph_of(sources_of: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of `sources_of` that it imports. The root's lazy names are no edge."""
    modules = set(sources_of) - {ROOT_MODULE}
    return {name: modules_imported(sources_of[name], name, modules) for name in sorted(modules)}


def test_no_module_imports_itself_through_others():
    found = circles(graph_of({module_of(p): p.read_text(encoding="utf-8") for p in PACKAGE}))
    assert not found, "import cycles: " + "; ".join(" <-> ".join(ring) for ring in found)


@pytest.mark.parametrize(
    ("imports", "rings"),
    [
        ({"a": "", "b": "import tpu_stack.q.a", "c": "from tpu_stack.q import a, b"}, []),
        ({"a": "from tpu_stack.q.b import f", "b": "from .a import g"}, ["a b"]),
        ({"a": "def f():\n from . import b", "b": "from tpu_stack.q import a"}, ["a b"]),
        ({"a": "if TYPE_CHECKING:\n from .b import B", "b": "from . import a"}, ["a b"]),
        ({"a": "from . import b", "b": "from . import c", "c": "from . import a"}, ["a b c"]),
        ({"a": "from . import b", "b": "from . import a", "c": "from . import a"}, ["a b"]),
        ({"__init__": "from .a import f", "a": "from .b import f", "b": ""}, []),
        ({"__init__": "from .a import f", "a": "from tpu_stack.q import g"}, ["__init__ a"]),
    ],
)
def test_the_check_for_circles(imports, rings):
    found = circles(graph_of({f"tpu_stack.q.{name}": text for name, text in imports.items()}))
    assert found == [[f"tpu_stack.q.{name}" for name in ring.split()] for ring in rings]


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
