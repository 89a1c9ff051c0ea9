"""Saving and restoring training state with Orbax: asynchronous, resharding, checksummed.

A run folder holds `checkpoints/STEP/`: one folder for each item that was saved, which is any tree
of arrays, and `meta`. The meta item carries all else that a step needs to stand alone (a run's
model config, tokenizer and position in its data) and one checksum per tensor, which every restore
verifies.

>>> with CheckpointStore(Path("runs/a")) as store:
...     store.save(20, {"params": params}, {"model": config.to_dict()})
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import blake3
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from tpu_stack.checkpoint.checksums import damaged, leaf_names, tree_checksums
from tpu_stack.errors import UserError

# What Orbax and its coroutines meet in a damaged checkpoint is raised too, as one line.
absl_logging.set_verbosity(absl_logging.FATAL)
for _noisy in ("orbax", "asyncio"):
    logging.getLogger(_noisy).setLevel(logging.CRITICAL)


ORIGINAL_FILES = "huggingface"
"""Folder in a run folder with the small files of the Hugging Face folder it came from."""

META = "meta"
"""The item with what JSON can say; no tree may take its name."""


class CheckpointStore:
    """The checkpoints of one run folder. Use as a context manager: leaving waits for writes.

    Without `in_background`, a save ends when it is on disk and copies nothing first: in the
    background Orbax writes a copy on the host, and its OCDBT format gathers all it compresses, so
    that memory holds the state about twice.
    """

    def __init__(
        self, run: Path, *, keep: int = 2, read_only: bool = False, in_background: bool = True
    ):
        self.run = run
        self.folder = (run / "checkpoints").resolve()
        if read_only and not self.folder.is_dir():
            raise UserError(
                f"{run} holds no checkpoints; give the --out folder of `tpu-stack train`"
            )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            read_only=read_only,
            create=not read_only,
            enable_async_checkpointing=not read_only and in_background,
        )
        arrays: Any = {"use_ocdbt": in_background}
        self._trees = ocp.StandardCheckpointHandler(**arrays)
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for kind in (ocp.args.StandardSave, ocp.args.StandardRestore):
            registry.add(None, kind, self._trees)  # items of any name
        for kind in (ocp.args.JsonSave, ocp.args.JsonRestore):
            registry.add(META, kind, ocp.JsonCheckpointHandler())
        try:
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, handler_registry=registry
            )
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {run}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()

    def wait(self) -> None:
        """Blocks until every started save is on disk. Raises UserError when one failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as failure:  # Orbax re-raises whatever its writer thread met
            raise self._not_written(failure) from failure

    def _not_written(self, failure: Exception) -> UserError:
        """Removes what a failed save left, and says why it failed."""
        for partial in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)
        return UserError(f"checkpoint in {self.folder} not written: {_reason(failure)}")

    @property
    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint of `step`; training may go on and donate the arrays.

        Args:
          items: name -> tree of arrays (elements of 1, 2 or 4 bytes, or PRNG keys).
          meta: JSON-ready.

        Raises UserError when this or an earlier write failed, and for an item that cannot be saved.
        """
        if META in items:
            raise UserError(
                f"an item cannot be called {META!r}; that is the name of what meta says"
            )
        checksums = {name: tree_checksums(tree) for name, tree in items.items()}
        body = dict(meta, step=step, checksums=checksums)
        args: dict[str, Any] = {
            # Orbax refuses a tree without leaves; its checksums, none, say all of it.
            name: ocp.args.StandardSave(tree)
            for name, tree in items.items()
            if checksums[name]
        }
        args[META] = ocp.args.JsonSave(dict(body, digest=_json_digest(body)))
        try:
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        except Exception as failure:  # an earlier asynchronous write surfaces here
            raise self._not_written(failure) from failure

    def latest(self) -> int:
        """The newest complete step. Raises UserError when there is none."""
        if not self.steps:
            raise UserError(f"{self.run} holds no complete checkpoint")
        return self.steps[-1]

    def meta(self, step: int) -> dict[str, Any]:
        """The meta item of `step`. Raises UserError when it was changed since it was saved."""
        body = self._read(step, META, ocp.args.JsonRestore())
        if body.pop("digest", None) != _json_digest(body):
            raise UserError(f"checkpoint {self._name(step)} is damaged: meta")
        return body

    def items(self, step: int) -> list[str]:
        """Names of the trees that `step` holds, sorted."""
        return sorted(self.meta(step)["checksums"])

    def restore(self, step: int, item: str, abstract: Any) -> Any:
        """The tree `item` of `step` in the layout of `abstract`.

        `abstract` is a tree of ShapeDtypeStructs with shardings, of any mesh. Raises UserError
        naming the tensors whose checksum differs, or saying what cannot be read.
        """
        checksums = self.meta(step)["checksums"]
        if item not in checksums:
            raise UserError(
                f"checkpoint {self._name(step)} holds no {item!r}; it holds {sorted(checksums)}"
            )
        expected = checksums[item]
        missing = sorted(set(leaf_names(abstract)) ^ set(expected))
        if missing:
            raise UserError(
                f"checkpoint {self._name(step)}: {item} differ from the model: {missing[:3]}"
            )
        if not expected:
            return abstract
        tree = self._read(step, item, ocp.args.StandardRestore(abstract))
        wrong = damaged(tree, expected)
        if wrong:
            raise UserError(f"checkpoint {self._name(step)} is damaged: {item} {', '.join(wrong)}")
        return tree

    def restore_tensor(self, step: int, item: str, name: str, abstract: Any) -> jax.Array:
        """One tensor of the tree `item`, for callers that have no room for the whole tree.

        Args:
          name: its dotted path. abstract: a ShapeDtypeStruct with a sharding.

        Raises UserError when it is missing, damaged, or cannot be read.
        """
        expected = self.meta(step)["checksums"].get(item, {}).get(name)
        if expected is None:
            raise UserError(f"checkpoint {self._name(step)}: {item} holds no tensor {name}")
        tree: Any = abstract
        for key in reversed(name.split(".")):
            tree = {key: tree}
        args = ocp.args.PyTreeRestore(
            item=tree,
            restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
            partial_restore=True,
        )
        with self._reading(step, item):
            handler = ocp.PyTreeCheckpointHandler()
            found = handler.restore(epath.Path(self._name(step)) / item, args=args)
        if damaged({name: jax.tree.leaves(found)[0]}, {name: expected}):
            raise UserError(f"checkpoint {self._name(step)} is damaged: {item} {name}")
        return jax.tree.leaves(found)[0]

    def digest(self, step: int) -> str:
        """One BLAKE3 hash over names, dtypes, shapes and bytes of every item's tensors.

        Raises UserError when the checkpoint is damaged.
        """
        digest = blake3.blake3()
        # Backwards: `params` before `optimizer`, as ever, so that published digests stay valid.
        for item in reversed(self.items(step)):
            tree = self.restore(step, item, self._abstract(step, item))
            named = sorted(
                zip(leaf_names(tree), jax.tree.leaves(tree), strict=True), key=lambda x: x[0]
            )
            for name, leaf in named:
                array = np.asarray(jax.device_get(leaf))
                digest.update(f"{item}.{name} {array.dtype} {array.shape}\n".encode())
                digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def _abstract(self, step: int, item: str) -> Any:
        """The tree `item` as shapes and dtypes on one device, as Orbax noted them."""
        if not self.meta(step)["checksums"][item]:
            return {}
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        with self._reading(step, item):
            noted: Any = self._trees.metadata(epath.Path(self._name(step)) / item).tree
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), noted
        )

    def _name(self, step: int) -> str:
        return f"{self.folder}/{step}"

    def _read(self, step: int, item: str, args: Any) -> Any:
        with self._reading(step, item):
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]

    @contextmanager
    def _reading(self, step: int, item: str) -> Iterator[None]:
        """Turns what Orbax and TensorStore raise, of many types on damaged files, into one line."""
        if step not in self.steps:
            raise UserError(f"{self.run} has no checkpoint of step {step}; it has {self.steps}")
        try:
            yield
        except Exception as failure:
            raise UserError(
                f"checkpoint {self._name(step)} cannot be read ({item}): {_reason(failure)}"
            ) from failure


def _json_digest(body: dict[str, Any]) -> str:
    """The same before and after a trip through a JSON file."""
    return blake3.blake3(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _reason(failure: BaseException) -> str:
    """The first line of the innermost cause, which is what a user can act on."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    return lines[0][:300]
