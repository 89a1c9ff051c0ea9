"""Array annotations hold: shapes and dtypes are checked by jaxtyping and beartype, in the tests.

`install()` puts an import hook before every module of the package that imports jaxtyping. Each of
its functions with an array annotation, kernels' too, then checks its arguments and its result on
every call, traced or not: dtype, rank, and one size per letter throughout the call.

Not checked, on purpose: annotations that are of no array (duck-typed fakes stand in for much in
these tests, and pyright reads those types); constructors of dataclasses, which tree functions call
with whatever leaves they make; and whose array it is, jax's, numpy's or an abstract stand-in, since
jax.numpy takes all of them alike.
"""

import ast
import functools
import operator
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import numpy as np
from beartype import beartype

ROOT = Path(__file__).parent.parent
ANY_ARRAY = jax.Array | np.ndarray | jax.ShapeDtypeStruct


def check(function: Callable) -> Callable:
    """`function` with its annotations of arrays checked, where it has any; else as it is."""
    hints = {name: hint for name, hint in function.__annotations__.items() if _has_array(hint)}
    if function.__name__ == "__init__" or not hints:
        return function
    function.__annotations__ = {name: _any_array(hint) for name, hint in hints.items()}
    return beartype(function)


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def _has_array(hint: Any) -> bool:
    return _is_array(hint) or any(map(_has_array, typing.get_args(hint)))


def _any_array(hint: Any) -> Any:
    """The annotation, open to numpy's arrays and abstract ones where it names jax's."""
    if isinstance(hint, types.UnionType):
        return functools.reduce(operator.or_, map(_any_array, typing.get_args(hint)))
    if not _is_array(hint) or hint.array_type is not jax.Array:
        return hint
    return hint.dtype[ANY_ARRAY, hint.dim_str]


def annotated_modules() -> set[str]:
    """Every module of the package that imports jaxtyping."""
    found = set()
    for folder, prefix in ((ROOT / "tpu_stack", ""), (ROOT / "kernels", "tpu_stack.")):
        for path in folder.rglob("*.py"):
            if (ROOT / "tpu_stack" / "kernels") in path.parents or not _imports_jaxtyping(path):
                continue
            name = prefix + ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.add(name.removesuffix(".__init__"))
    return found


def _imports_jaxtyping(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return "jaxtyping" in text and any(
        isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"
        for node in ast.walk(ast.parse(text))
    )


def install() -> None:
    """Before the package is imported. A name stands for its submodules too; those without an array
    annotation are left as they are by `check`."""
    jaxtyping.install_import_hook(sorted(annotated_modules()), "array_checks.check")
