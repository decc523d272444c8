"""What a rollout needs of its surroundings, which a machine and a cluster give each in its way."""

from collections.abc import Mapping
from datetime import datetime
from typing import Protocol

from perennial.records import Evidence, RolloutState


class Clock(Protocol):
    """Lengths of time by the monotonic clock, moments by the wall's."""

    def monotonic(self) -> float: ...

    def now(self) -> datetime: ...


class Traffic(Protocol):
    """Who gets which share of the requests; revisions without a share are left out."""

    def weights(self) -> Mapping[str, int]:
        """Percent of each revision, as last applied."""
        ...

    def set_weights(self, weights: Mapping[str, int]) -> None:
        """Apply percentages that sum to 100, return when they hold; raises Unavailable."""
        ...


class EvidenceSource(Protocol):
    """What revisions did, counted since the first look at a step."""

    def look(self, step: str, canary: str, stable: str) -> Evidence:
        """Numbers since the first look with this ``step``; the first one begins to count."""
        ...


class Revisions(Protocol):
    """Running copies of a model server, by name such as ``v7``."""

    def names(self) -> tuple[str, ...]:
        """Revisions that were started and not stopped."""
        ...

    def start(self, state: RolloutState) -> None:
        """Bring up the revision of a rollout; raises a PerennialError when it cannot be."""
        ...

    def ready(self, name: str) -> bool:
        """Would a request be answered now?"""
        ...

    def died(self, name: str) -> str:
        """Why a started revision cannot become ready any more; empty while it can."""
        ...

    def stop(self, name: str) -> None:
        """End a revision; nothing happens when it is not up."""
        ...
