"""What crosses borders inside perennial: frozen facts, units in their names."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


@dataclass(frozen=True)
class FeatureDrift:
    """One feature of one window against the reference rows."""

    feature: str
    test: str  # "ks" for numbers, "chi2" for categories
    statistic: float
    p_value: float
    drifted: bool  # p_value below the Bonferroni threshold
    missing_share: float


@dataclass(frozen=True)
class DriftReport:
    """What a detector says of one closed window of served rows."""

    window_start: datetime
    window_end: datetime
    model_digest: str
    rows: int
    thin: bool  # fewer rows than the project's minimum: nothing was tested
    threshold: float
    features: tuple[FeatureDrift, ...]

    @property
    def drifted(self) -> tuple[str, ...]:
        """Names of the features that drifted."""
        return tuple(f.feature for f in self.features if f.drifted)

    @property
    def is_drift(self) -> bool:
        return bool(self.drifted)


@dataclass(frozen=True)
class Event:
    """A CloudEvent in our own words. ``time`` is wall time, event time is in ``data``."""

    id: str
    source: str
    type: str
    subject: str  # the project
    time: datetime
    data: dict[str, Any] = field(default_factory=dict)


class Action(StrEnum):
    """What the retraining policy may decide."""

    RETRAIN = "retrain"
    WAIT = "wait"
    DECLINE = "decline"


@dataclass(frozen=True)
class Decision:
    """A policy's verdict with its sentence."""

    action: Action
    reason: str


@dataclass(frozen=True)
class GateResult:
    """One limit: what was measured, on how many rows, against what."""

    name: str
    measured: float | None
    limit: float | None
    rows: int
    passed: bool
    reason: str


@dataclass(frozen=True)
class GateRecord:
    """All limits of one candidate against one champion; replaying it gives the same decision."""

    candidate: str  # model digest
    champion: str  # model digest, "" when nothing serves yet
    as_of: datetime
    window_start: datetime  # first moment of the rows that judged
    window_end: datetime
    results: tuple[GateResult, ...]

    @property
    def passed(self) -> bool:
        return bool(self.results) and all(r.passed for r in self.results)

    @property
    def reason(self) -> str:
        """Why it was refused, or that every limit was kept."""
        broken = [r.reason for r in self.results if not r.passed]
        return "; ".join(broken) if broken else f"all {len(self.results)} limits kept"


@dataclass(frozen=True)
class Lineage:
    """The five pins of a model: enough to make it again."""

    data_digest: str
    code_commit: str
    code_dirty: bool
    parameters: dict[str, Any]
    lock_digest: str
    seed: int
    as_of: datetime


@dataclass(frozen=True)
class Version:
    """A registered model: what people call ``v7``."""

    number: int
    digest: str
    run_id: str
    as_of: datetime

    @property
    def label(self) -> str:
        return f"v{self.number}"

    @property
    def short(self) -> str:
        return self.digest.removeprefix("sha256:")[:8]

    @property
    def name(self) -> str:
        """``v7 (1f0c92aa)``: how every table and report calls it."""
        return f"{self.label} ({self.short})"


# Fine enough that a p95 between two bounds is off by a few percent only.
LATENCY_BOUNDS_MS = (
    *(1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 18, 22, 27, 33, 40, 50, 60, 75, 90, 110, 135, 165, 200),
    *(250, 300, 370, 450, 550, 670, 820, 1000, 1500, 2000, 3000, 5000, 10000),
)


@dataclass(frozen=True)
class ArmTraffic:
    """What one revision did over one look-back (wall clock), from Envoy and the servers."""

    revision: str
    requests: int
    server_errors: int  # 5xx that the client did not cause
    p95_ms: float | None  # None: too few requests to say
    invalid_outputs: int  # NaN, infinite or outside [0, 1]


@dataclass(frozen=True)
class Evidence:
    """Both arms over the same time; ``age_s`` (monotonic) since the sources were read."""

    canary: ArmTraffic | None  # None: the source did not answer
    stable: ArmTraffic | None
    age_s: float


class Verdict(StrEnum):
    """What the judge may say of a canary step."""

    ADVANCE = "advance"
    HOLD = "hold"
    ROLL_BACK = "roll back"


@dataclass(frozen=True)
class Judgement:
    """A verdict with its sentence."""

    verdict: Verdict
    reason: str


class Phase(StrEnum):
    """Where a rollout stands."""

    WISHED = "wished"
    STARTING = "starting"  # revision comes up at 0 %
    CANARY = "canary"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled back"
    SUPERSEDED = "superseded"

    @property
    def over(self) -> bool:
        return self in (Phase.PROMOTED, Phase.ROLLED_BACK, Phase.SUPERSEDED)


# How the run of a rollout is called that a person asked for by ``perennial rollback``.
BY_HAND = "rollback by hand "


@dataclass(frozen=True)
class RolloutState:
    """A ModelRollout: what is wished (spec) and how far it is (status)."""

    id: int
    project: str
    version: int
    digest: str
    bundle_uri: str
    run_id: str
    phase: Phase
    step: int  # index into the project's steps, -1 before the first
    weight: int  # percent of traffic
    reason: str
    limits: str = "{}"  # JSON of project.Rollout, pinned when it was wished; {} is the project's


def some(names: Sequence[str], most: int = 4) -> str:
    """The first of some names, and how many more there are: what fits into a sentence."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def plain(record: Any) -> dict[str, Any]:
    """A record as JSON-ready dict: moments as ISO 8601, enums as their values, tuples as lists."""
    return {key: _plain(value) for key, value in asdict(record).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
