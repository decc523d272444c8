"""Which InferenceService was a rollout given: filled in once, then said again word for word."""

import json
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine

from perennial.records import Phase, RolloutState
from perennial.rollout import manifest
from perennial.rollout.manifest import Document, Place, Scale
from perennial.store import fence, rollouts


class Manifests:
    """The InferenceServices of all rollouts; what came to serve once is never filled in anew.

    So a rollback runs what had earned its traffic, whatever image or sink are in use by now. How
    many copies of it run is no part of that: it is today's settings that know the load.
    """

    def __init__(
        self,
        engine: Engine,
        root: Path,
        place: Callable[[str], Place],
        scale: Scale = manifest.AS_IN_FILE,
        guard: fence.Guard = fence.free,
    ) -> None:
        self._engine = engine
        self._root = root
        self._place = place
        self._scale = scale
        self._guard = guard

    def of(self, state: RolloutState) -> Document:
        """What runs for a rollout. Raises BadInput, or Unavailable while the sink is unknown."""
        text = self._earned(state) or rollouts.manifest(self._engine, state.id)
        return manifest.scaled(json.loads(text or self._pin(state)), self._scale)

    def pinned(self, rollout_id: int) -> Document | None:
        """What runs for a rollout by its number, None when it was given nothing yet."""
        text = rollouts.manifest(self._engine, rollout_id)
        return dict(json.loads(text)) if text else None

    def _earned(self, state: RolloutState) -> str:
        history = rollouts.history(self._engine, state.project)
        same = [r for r in history if r.digest == state.digest and r.phase is Phase.PROMOTED]
        texts = (rollouts.manifest(self._engine, r.id) for r in reversed(same))
        return next((text for text in texts if text), "")

    def _pin(self, state: RolloutState) -> str:
        template = manifest.load(self._root, state.project)
        made = manifest.render(template, state, self._place(state.project))
        text = json.dumps(made, sort_keys=True)
        return rollouts.pin_manifest(self._engine, state.id, text, self._guard)
