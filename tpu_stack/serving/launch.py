"""A running engine from a bundle, from trainable parameters or from random weights, on the meshes
that are there.

Example:
    served = start_engine(Weights.of(Path("bundle")), Where(), EngineOptions())
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpu_stack.errors import UserError
from tpu_stack.serving.engine_options import EngineOptions
from tpu_stack.sharding.placement import PlacementOptions, place, place_two

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from tpu_stack.data.chat_format import ChatFormat
    from tpu_stack.data.tokenizer import Tokenizer
    from tpu_stack.serving.bundle import Bundle
    from tpu_stack.serving.service import InFlight, Service
    from tpu_stack.sharding.profiles import Profile

DRAFT_GUESSES = 4
"""Tokens that a draft guesses where --guesses is not given."""


@dataclass(frozen=True)
class Where:
    """Where an engine runs, and what guesses for it."""

    profile: str = "8i"
    """Serving profile, NAME[:TOPOLOGY]; counts chips. Without a topology, a mesh or a number of
    devices, a CPU emulates one device."""
    prefill: str | None = None
    """Prefill on its own devices, NAME:CHIPS such as 8t:4; needs --decode."""
    decode: str | None = None
    """Decode on its own devices, NAME:CHIPS such as 8i:4; needs --prefill."""
    draft: Path | None = None
    """Bundle of a small model with the same tokenizer, which guesses --guesses tokens (default 4)
    per step; the output stays the same."""
    place: PlacementOptions = field(default_factory=PlacementOptions)


@dataclass(frozen=True)
class Weights:
    """What to serve, before it is on any device: a bundle, or what `loader` gives, or else random
    weights.

    Attributes:
      format, rotation: of the weights, as `pack` was asked.
      loader: gives an engine's weights on a mesh.
      tokenizer, chat: None where there is no text.
    """

    config: Any
    format: str
    bundle: "Bundle | None" = None
    loader: "Callable[[Profile, Any], Any] | None" = None
    tokenizer: "Tokenizer | None" = None
    chat: "ChatFormat | None" = None
    rotation: int = 0

    def load(self, profile: "Profile", mesh: Any) -> Any:
        """The weights on a mesh, as an engine holds them."""
        if self.bundle is not None:
            return self.bundle.load(profile, mesh, split=True)
        if self.loader is not None:
            return self.loader(profile, mesh)
        from tpu_stack.serving.bench.random_weights import random_params

        return random_params(self.config, self.format, profile, mesh)

    @property
    def specs(self) -> Any:
        """The tensors, with units that a mesh must not cut."""
        from tpu_stack.serving.layout import with_groups

        return with_groups(self.config, "bf16" if self.format == "float32" else self.format)

    @classmethod
    def of(cls, path: Path) -> "Weights":
        """A bundle's. Raises UserError when it is none."""
        from tpu_stack.serving.bundle import Bundle

        bundle = Bundle.open(path)
        return cls(
            bundle.config,
            bundle.manifest.format,
            bundle,
            tokenizer=bundle.tokenizer,
            chat=bundle.chat,
            rotation=bundle.manifest.rotation,
        )

    @classmethod
    def of_params(
        cls,
        config: Any,
        params: Any,
        format: str,
        tokenizer: "Tokenizer | None" = None,
        rotation: int = 0,
    ) -> "Weights":
        """Trainable parameters, float32 on any mesh, packed to `format` when they are loaded."""

        def load(profile: "Profile", mesh: Any) -> Any:
            from tpu_stack.serving.weights import engine_weights

            return engine_weights(config, params, format, profile, mesh, rotation)

        return cls(config, format, loader=load, tokenizer=tokenizer, rotation=rotation)

    @classmethod
    def of_run(cls, path: Path, format: str, rotation: int = 0) -> "Weights":
        """The newest checkpoint of a run folder, packed to `format` a tensor at a time when it is
        loaded. Raises UserError when there is none."""
        from tpu_stack.checkpoint.store import CheckpointStore
        from tpu_stack.data.chat_format import ChatFormat
        from tpu_stack.data.tokenizer import Tokenizer
        from tpu_stack.models.config import ModelConfig
        from tpu_stack.serving.pack import restore_tensor
        from tpu_stack.serving.weights import engine_weights

        with CheckpointStore(path, read_only=True) as store:
            step = store.latest()
            meta = store.meta(step)
        config = ModelConfig.from_dict(meta["model"])

        def load(profile: "Profile", mesh: Any) -> Any:
            with CheckpointStore(path, read_only=True) as store:
                return engine_weights(
                    config,
                    lambda spec: restore_tensor(store, step, spec, profile, mesh),
                    format,
                    profile,
                    mesh,
                    rotation,
                )

        tokenizer = Tokenizer.from_json(meta["tokenizer"], where=f"the tokenizer of {path}")
        chat = ChatFormat.read(path)
        return cls(config, format, loader=load, tokenizer=tokenizer, chat=chat, rotation=rotation)


@dataclass(frozen=True)
class Served:
    """A running engine, and what it was built from.

    Attributes:
      service: the engine behind its thread. profile: the one that it decodes under.
      weights, draft: where its parameters came from. places: its one or two profiles and meshes.
    """

    service: "Service"
    profile: "Profile"
    weights: Weights
    draft: Weights | None = None
    places: "tuple[tuple[Profile, Any], ...]" = ()

    def load(
        self, weights: Weights, in_flight: "InFlight", draft: Weights | None = None
    ) -> "Future[int]":
        """Has the engine take these weights between two steps; needs room for both. The future
        gives the generation that is then live.

        Raises UserError for another model, format, rotation or tokenizer than the running one's.
        """
        _check_same_model(self.weights, weights)
        sides = [_loaded(weights, draft, *each) for each in self.places]
        return self.service.load(sides[0] if len(sides) == 1 else tuple(sides), in_flight)

    def reload(self, in_flight: "InFlight") -> Path:
        """Opens the bundles again, checks that the running programs fit them, and has the engine
        take their weights between two steps; see `load`. Returns the folder that was read.

        Raises UserError when they are no longer bundles, or of another model.
        """
        weights = _opened_again(self.weights)
        draft = None if self.draft is None else _opened_again(self.draft)
        self.load(weights, in_flight, draft)
        assert weights.bundle is not None
        return weights.bundle.path


def _check_same_model(running: Weights, new: Weights) -> None:
    for part in ("config", "format", "rotation"):
        if getattr(running, part) != getattr(new, part):
            have, want = getattr(new, part), getattr(running, part)
            said = "" if part == "config" else f" ({have}, not {want})"
            raise UserError(
                f"the new weights have another {part} than the running model{said}; start an engine"
                " of its own"
            )
    tokenizers = {each.tokenizer.digest() for each in (running, new) if each.tokenizer}
    if len(tokenizers) > 1:
        raise UserError(
            "the new weights have another tokenizer than the running model; start an engine of its"
            " own"
        )


def _opened_again(weights: Weights) -> Weights:
    """What the path holds now: a link may point to another folder, which then is read as one."""
    assert weights.bundle is not None
    path = weights.bundle.path
    again = Weights.of(path.resolve())
    assert again.bundle is not None
    old, new = weights.bundle.manifest, again.bundle.manifest
    for part in ("config", "format", "rotation", "tokenizer_digest", "chat_digest"):
        if getattr(old, part) != getattr(new, part):
            what = part.replace("_digest", "")
            raise UserError(
                f"{path} now has another {what} than the running model; start a server of its own"
            )
    return again


def start_engine(
    weights: Weights, where: Where, engine: EngineOptions, *, warm_up: bool = True
) -> Served:
    """The engine, running, and with `warm_up` compiled; see `start_service`."""
    from tpu_stack.serving.engine.build import Side, start_service

    draft = None if where.draft is None else _draft(where.draft, weights)
    if draft is not None and not engine.guesses:
        engine = dataclasses.replace(engine, guesses=DRAFT_GUESSES)
    specs = (*weights.specs, *(draft.specs if draft is not None else ()))
    places = tuple(_places(where, specs))
    sides = [Side(_loaded(weights, draft, *each), *each) for each in places]
    decode = sides[-1]
    service = start_service(
        weights.config,
        decode.params,
        decode.profile,
        decode.mesh,
        engine,
        {"format": weights.format},
        draft=None if draft is None else draft.config,
        prefill=sides[0] if len(sides) == 2 else None,
        warm_up=warm_up,
    )
    return Served(service, engine.applied(decode.profile), weights, draft, places)


def _loaded(weights: Weights, draft: Weights | None, profile: "Profile", mesh: Any) -> Any:
    params = weights.load(profile, mesh)
    return params if draft is None else (params, draft.load(profile, mesh))


def _places(where: Where, specs: Any) -> "list[tuple[Profile, Any]]":
    """One mesh, or that of prefill and that of decode."""
    if (where.prefill is None) != (where.decode is None):
        raise UserError("prefill and decode go together: two groups of devices")
    if where.prefill is None or where.decode is None:
        return [place(where.profile, "serve", where.place, specs)]
    if where.place != PlacementOptions() or where.profile != Where.profile:
        raise UserError("prefill and decode take the place of profile, mesh and devices")
    return list(place_two(where.prefill, where.decode, specs))


def _draft(path: Path, weights: Weights) -> Weights:
    draft = Weights.of(path)
    if weights.bundle is not None and draft.bundle is not None:
        ours, theirs = weights.bundle.manifest, draft.bundle.manifest
        if ours.tokenizer_digest != theirs.tokenizer_digest:
            raise UserError(
                f"draft {path} has another tokenizer than the model's; it must be the same"
            )
    return draft
