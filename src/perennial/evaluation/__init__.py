"""What was measured of a candidate and its champion: six dimensions, one record."""

from dataclasses import dataclass
from datetime import datetime

from pydantic import TypeAdapter

from perennial.evaluation.calibration import Calibration
from perennial.evaluation.explanation import Importance
from perennial.evaluation.fairness import Fairness
from perennial.evaluation.latency import Latency
from perennial.evaluation.performance import Gain, Performance


@dataclass(frozen=True)
class Judged:
    """One model on the judging rows."""

    digest: str
    as_of: datetime  # up to when it knew data and labels
    performance: Performance
    calibration: Calibration


@dataclass(frozen=True)
class Evaluation:
    """Candidate and champion on the same later rows; the gate needs nothing else."""

    as_of: datetime
    window_start: datetime  # first moment of the judging rows
    window_end: datetime
    table_rows: int
    early_labels: int  # rows of the table with a label that nobody could know at as_of
    candidate: Judged
    champion: Judged | None  # None when nothing serves yet
    champion_may_have_seen: bool  # it knew data later than the first judging row
    gain: Gain | None  # None without a champion or without both labels
    fairness: tuple[Fairness, ...]
    importance: tuple[Importance, ...]
    latency: Latency

    @property
    def parity_ratio(self) -> float | None:
        """The least over all sensitive columns."""
        known = [f.parity_ratio for f in self.fairness if f.parity_ratio is not None]
        return min(known, default=None)

    def to_json(self) -> str:
        """As text that ``from_json`` reads."""
        return _ADAPTER.dump_json(self, indent=1).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> "Evaluation":
        """Read what ``to_json`` wrote."""
        return _ADAPTER.validate_json(text)


_ADAPTER = TypeAdapter(Evaluation)
