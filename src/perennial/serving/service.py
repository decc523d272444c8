"""What does a server ask of the model behind it, whatever protocol a request came by?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from prometheus_client import Counter, Histogram

from perennial.contract import Matrix
from perennial.errors import PerennialError
from perennial.records import LATENCY_BOUNDS_MS
from perennial.serving.wire import Answer, Ask

REQUESTS = Counter(
    "perennial_requests",
    "Inference requests by who caused their outcome: ok, client, model, platform.",
    ["model_name", "cause"],
)
SECONDS = Histogram(
    "perennial_request_seconds",
    "Seconds to answer an inference request; one that a client got wrong is left out.",
    ["model_name"],
    buckets=[bound / 1000 for bound in LATENCY_BOUNDS_MS],
)
INVALID = Counter(
    "perennial_invalid_outputs",
    "Answers held back: the model's output was NaN, infinite or outside [0, 1].",
    ["model_name"],
)
INVALID_OUTPUT = "model output invalid"
CAUSES = ("ok", "client", "model", "platform")


class InvalidOutput(PerennialError):
    """The model answered what is no probability."""


@dataclass(frozen=True)
class Question:
    """A request whose rows keep the contract."""

    ask: Ask
    matrix: Matrix


class Service(Protocol):
    """A model that can be served."""

    @property
    def name(self) -> str:
        """Name in ``/v2/models/NAME``."""
        ...

    def metadata(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Inputs and outputs as V2 model metadata tells them."""
        ...

    def read(self, ask: Ask) -> Question:
        """Check a request against the contract. Raises BadInput."""
        ...

    async def answer(self, question: Question, headers: Mapping[str, str]) -> Answer:
        """Score the rows of a question. Raises InvalidOutput or Refused."""
        ...

    def stop(self) -> None:
        """Finish what was begun, because no more requests will come."""
        ...


def declare(name: str) -> None:
    """Make the counters of a model visible at 0, so that their absence is no evidence."""
    INVALID.labels(name)
    SECONDS.labels(name)
    for cause in CAUSES:
        REQUESTS.labels(name, cause)


def count(name: str, cause: str, seconds: float) -> None:
    """Count one answered request by who caused its outcome."""
    REQUESTS.labels(name, cause).inc()
    if cause != "client":
        SECONDS.labels(name).observe(seconds)


def probabilities(name: str, scores: Matrix) -> Matrix:
    """The scores, if each is a probability. Raises InvalidOutput and counts it."""
    # A comparison with NaN is false, so this refuses NaN as well.
    if not np.all((scores >= 0.0) & (scores <= 1.0)):
        INVALID.labels(name).inc()
        raise InvalidOutput(INVALID_OUTPUT)
    return scores
