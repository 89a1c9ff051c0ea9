"""The examples of docstrings: every `>>>` runs, and the functions that other code names exist.

An example sees its module's names and those of `FIXTURES` that it mentions, so that it stays a line
long. What needs a TPU compiler, a server or minutes is an indented line without `>>>`: it is not
run, but the functions that it calls must exist and take the arguments that it gives.
"""

import ast
import doctest
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def sources() -> list[str]:
    """Dotted names of all modules that have a docstring with an example of either kind."""
    found = []
    for folder in ("tpu_stack", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] != ("tpu_stack", "kernels") and parts[-1] != "__main__":
                parts = parts if parts[0] == "tpu_stack" else ("tpu_stack", *parts)
                found.append(".".join(part for part in parts if part != "__init__"))
    return found


def path_of(module: str) -> Path:
    """The file of a module of the package; kernels by their own folder, not by its link."""
    parts = module.split(".")
    parts = parts[1:] if parts[1:2] == ["kernels"] else parts
    path = ROOT.joinpath(*parts)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def docstrings(module: str) -> list[str]:
    """The docstrings of the module, its classes and its functions, as source has them."""
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for node in nodes if (text := ast.get_docstring(node))]


def sketches(text: str) -> list[ast.Module]:
    """A docstring's paragraphs that are Python with a call in it, parsed: indented lines, under
    "Example:" where they would be all of the docstring but its summary."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        try:
            tree = ast.parse(textwrap.dedent(block.removeprefix("Example:\n")))
        except SyntaxError:
            continue  # prose, a command line, a table, a formula
        if any(isinstance(node, ast.Call) for node in ast.walk(tree)):
            found.append(tree)
    return found


FIXTURES: dict[str, Callable[[], Any]] = {}


def fixture(make: Callable[[], Any]) -> Callable[[], Any]:
    """Enters a value that examples may mention by the function's name; made once, when needed."""
    FIXTURES[make.__name__] = functools.cache(make)
    return FIXTURES[make.__name__]


@fixture
def config() -> Any:
    from tpu_stack.models.presets import get_preset

    return get_preset("nano").replace(n_layers=1, vocab_size=64, d_ff=128)


@fixture
def spec() -> Any:
    from tpu_stack.models.abstract import tensor_specs

    return next(spec for spec in tensor_specs(config()) if spec.name.endswith("wq"))


@fixture
def profile() -> Any:
    from tpu_stack.sharding.profiles import get_profile

    return get_profile("8i").with_mesh("data=1,tensor=1")


@fixture
def mesh() -> Any:
    from tpu_stack.sharding.mesh import make_mesh

    return make_mesh(profile().mesh)


@fixture
def params() -> Any:
    import numpy as np

    from tpu_stack.models.abstract import map_specs

    return map_specs(config(), lambda spec: np.full(spec.shape, 0.02, np.float32))


@fixture
def tokens_BT() -> Any:
    import numpy as np

    return np.arange(6, dtype=np.int32).reshape(1, 6)


@fixture
def x() -> Any:
    import jax.numpy as jnp

    return jnp.ones((4, 256), jnp.bfloat16)


@fixture
def w() -> Any:
    import numpy as np

    return np.random.default_rng(0).standard_normal((256, 128), np.float32)


@fixture
def q_int4() -> Any:
    from tpu_stack.quant import quantize

    return quantize(w(), "int4", name="w")


@fixture
def q_int8() -> Any:
    from tpu_stack.quant import quantize

    return quantize(w(), "int8", name="w")


@fixture
def documents() -> Any:
    from tpu_stack.data.sources import Document

    return [Document(f"Document {i} is short. " * 8, f"{i}.txt") for i in range(20)]


@fixture
def corpus() -> Any:
    from tpu_stack.data.pipeline import DataConfig, load_corpus

    Path("plays.txt").write_text("To be, or not to be. " * 500)
    return load_corpus(DataConfig(paths=("plays.txt",), tokenizer="chars", seq_len=64))


@fixture
def tokenizer() -> Any:
    from tpu_stack.data.tokenizer import build_tokenizer

    return build_tokenizer("chars", documents())


NEIGHBOURS = {
    "get_chip": "tpu_stack.hardware",
    "get_preset": "tpu_stack.models.presets",
    "get_profile": "tpu_stack.sharding.profiles",
    "tensor_specs": "tpu_stack.models.abstract",
    "write_text": "tpu_stack.files",
    "make_optimizer": "tpu_stack.training.optimizer",
    "make_train_step": "tpu_stack.training.step",
    "Calibration": "tpu_stack.planner.backtest.calibration",
    "eval_batches": "tpu_stack.data.pipeline",
    "CheckpointHook": "tpu_stack.training.hooks",
    "Model": "tpu_stack.serving.http.model",
    "train_step": "tpu_stack.planner.simulate.train",
    "start_engine": "tpu_stack.serving.launch",
    "Engine": "tpu_stack.serving.engine.engine",
    "Token": "tpu_stack.serving.requests",
    "start_service": "tpu_stack.serving.engine.build",
    "parse_body": "tpu_stack.serving.http.fields",
    "arrival_times": "tpu_stack.serving.bench.workload",
    "make_request": "tpu_stack.planner.request",
    "summarize": "tpu_stack.planner.hlo_collective",
    "parse": "tpu_stack.planner.hlo_text",
    "predict": "tpu_stack.planner.memory.predict",
    "compare": "tpu_stack.planner.compare",
    "two_by_two": "tpu_stack.planner.compare.crossing",
    "compile_all": "tpu_stack.planner.programs",
    "read_rows": "tpu_stack.planner.backtest.table",
    "compile_target": "tpu_stack.planner.kernels.targets",
    "get_case": "tpu_stack.planner.kernels.case_registry",
    "find_cases": "tpu_stack.planner.kernels.case_registry",
    "verify_cases": "tpu_stack.planner.kernels",
    "main": "tpu_stack.cli.main",
}
"""Functions of other modules that an example need not import, and their homes."""


@functools.cache
def extras() -> dict[str, Any]:
    """What an example need not import: libraries, and `NEIGHBOURS`."""
    import json

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec

    libraries = {"jax": jax, "jnp": jnp, "np": np, "json": json, "P": PartitionSpec, "Path": Path}
    named = {
        name: getattr(importlib.import_module(home), name) for name, home in NEIGHBOURS.items()
    }
    return libraries | named


def names_in(code: str) -> set[str]:
    """Names that the code mentions."""
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


def run_examples(module: ModuleType) -> list[str]:
    """What the examples of the module's docstrings got wrong, as doctest tells it."""
    wrong: list[str] = []
    for test in doctest.DocTestFinder().find(module, module.__name__):
        mentioned = names_in("".join(example.source for example in test.examples))
        made = {
            name: FIXTURES[name]() for name in mentioned & FIXTURES.keys() - vars(module).keys()
        }
        test.globs = extras() | vars(module) | made
        doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=wrong.append)
    return wrong


def wrong_calls(tree: ast.Module, namespace: dict[str, Any]) -> list[str]:
    """Calls of the tree whose function does not exist or does not take these arguments.

    Methods of values that the code would make are not looked up.
    """
    assigned = {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    imports: list[ast.stmt] = [
        node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    exec(compile(ast.Module(imports, []), "docstring", "exec"), namespace)
    wrong = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        text = ast.unparse(call)
        root = call.func
        while isinstance(root, ast.Attribute):
            root = root.value
        if not isinstance(root, ast.Name) or root.id in assigned:
            continue
        if root.id not in namespace:
            wrong += [f"{text}: no {root.id} here"] if root is call.func else []
            continue
        try:
            function = eval(ast.unparse(call.func), dict(namespace))
            signature = inspect.signature(function)
        except AttributeError as error:
            wrong.append(f"{text}: {error}")
            continue
        except ValueError:
            continue  # a builtin without a signature
        open_ended = any(isinstance(a, ast.Starred) or ast.unparse(a) == "..." for a in call.args)
        keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
        if open_ended or len(keywords) < len(call.keywords):
            continue
        try:
            signature.bind(*call.args, **keywords)
        except TypeError as error:
            wrong.append(f"{text}: {error}")
    return wrong


MODULES = {name: docstrings(name) for name in sources()}


@pytest.mark.parametrize(
    "name", [name for name, texts in MODULES.items() if any(">>>" in text for text in texts)]
)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = run_examples(importlib.import_module(name))
    assert not wrong, "".join(wrong)


@pytest.mark.parametrize(
    "name", [name for name, texts in MODULES.items() if any(map(sketches, texts))]
)
def test_code_that_is_not_run_calls_what_exists(name):
    module = importlib.import_module(name)
    namespace = vars(__import__("builtins")) | extras() | vars(module)
    trees = [tree for text in MODULES[name] for tree in sketches(text)]
    assert not [line for tree in trees for line in wrong_calls(tree, namespace)]
