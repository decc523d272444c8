"""What did each revision do at this step: counters of Envoy and of the servers, since it began."""

import math
import operator
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import httpx

from perennial.errors import Unavailable
from perennial.records import ArmTraffic, Evidence
from perennial.rollout import edge

INVALID_OUTPUTS = "perennial_invalid_outputs_total"
TIMEOUT_S = 2.0
# Envoy's latencies become readable a flush after its counters; under load some always lag.
FLUSH_S = 0.15
MEASURED_SHARE = 0.8
# Codes of gRPC that no client can cause: unknown, deadline, internal, unavailable, data loss.
GRPC_FAULTS = ("2", "4", "13", "14", "15")
_NUMBER = r"([0-9.eE+]+)"


@dataclass(frozen=True)
class Counters:
    """Everything counted of one revision since it came up; numbers only ever grow."""

    good: int
    server_errors: int
    unreachable: int
    invalid_outputs: int
    latency: tuple[int, ...]  # answers up to each of the edge's bounds

    def plus(self, other: "Counters") -> "Counters":
        return Counters(*_each(operator.add, self, other))

    def minus(self, other: "Counters") -> "Counters":
        return Counters(*_each(operator.sub, self, other))

    @property
    def is_possible(self) -> bool:
        """A difference below zero means that a process began to count anew."""
        added = self.good, self.server_errors, self.unreachable, self.invalid_outputs
        return min(*added, *self.latency) >= 0

    @property
    def requests(self) -> int:
        """Requests that say something of the server; what a client did wrong does not count."""
        return self.good + self.server_errors + self.unreachable

    @property
    def p95_ms(self) -> float | None:
        """95th percentile between the bounds, None while most latencies lag behind the counters."""
        if self.latency[-1] < max(MEASURED_SHARE * self.good, 1):
            return None
        rank = 0.95 * self.latency[-1]
        upper = next(i for i, count in enumerate(self.latency) if count >= rank)
        below = self.latency[upper - 1] if upper else 0
        low = edge.LATENCY_BOUNDS_MS[upper - 1] if upper else 0
        width = edge.LATENCY_BOUNDS_MS[upper] - low
        return low + width * (rank - below) / (self.latency[upper] - below)

    def arm(self, revision: str) -> ArmTraffic:
        errors = self.server_errors + self.unreachable
        return ArmTraffic(revision, self.requests, errors, self.p95_ms, self.invalid_outputs)


def _each(
    of: Callable[[int, int], int], one: Counters, other: Counters
) -> tuple[int, int, int, int, tuple[int, ...]]:
    latency = tuple(map(of, one.latency, other.latency))
    return (
        of(one.good, other.good),
        of(one.server_errors, other.server_errors),
        of(one.unreachable, other.unreachable),
        of(one.invalid_outputs, other.invalid_outputs),
        latency,
    )


NOTHING = Counters(0, 0, 0, 0, tuple(0 for _ in edge.LATENCY_BOUNDS_MS))
Places = Callable[[], Mapping[str, str]]
Pages = Callable[[str], Mapping[str, str]]


class EnvoyEvidence:
    """Evidence from each edge's statistics and from each metrics page of a revision's servers.

    Both are URLs under a key that changes when a process starts anew. What vanished, began anew
    or counts backwards is missing: that arm has no numbers then, and is counted from there.
    """

    def __init__(self, model: str, edges: Places, pages: Pages) -> None:
        # Plain HTTP: the authorities of TLS are not loaded, which take half a megabyte a client.
        self._http = httpx.Client(timeout=TIMEOUT_S, trust_env=False, verify=False)
        self._model = model
        self._edges = edges
        self._pages = pages
        self._step = ""
        self._start: dict[str, dict[str, Counters]] = {}
        self._last: dict[str, dict[str, Counters]] = {}
        self._read_at = -math.inf

    def look(self, step: str, canary: str, stable: str) -> Evidence:
        """Numbers since the first look with this ``step``; the first one begins to count."""
        if step != self._step:
            self._step, self._start, self._last = step, {}, {}
        arms = self._arm(canary), self._arm(stable)
        if any(arm and arm.requests and arm.p95_ms is None for arm in arms):
            time.sleep(FLUSH_S)
            arms = self._arm(canary), self._arm(stable)
        if None not in arms:
            self._read_at = time.monotonic()
        return Evidence(*arms, age_s=time.monotonic() - self._read_at)

    def close(self) -> None:
        self._http.close()

    def _arm(self, revision: str) -> ArmTraffic | None:
        found = self._counters(revision)
        if found is None:
            return None
        last = self._last.get(revision, found)
        self._last[revision] = found
        # Against the last look and not the first: a counter may fall and outgrow its start again.
        if any(
            key not in found or not found[key].minus(then).is_possible for key, then in last.items()
        ):
            self._start[revision] = found
            return None
        # What came up since the step began is counted from the first look at it.
        start = found | self._start.get(revision, {})
        self._start[revision] = start
        added = [counters.minus(start[key]) for key, counters in found.items()]
        return reduce(Counters.plus, added).arm(revision)

    def _counters(self, revision: str) -> dict[str, Counters] | None:
        """Counters of all who saw a revision, None when one is silent or does not know it."""
        try:
            edges = {key: self._seen(url, revision) for key, url in self._edges().items()}
            pages = {key: self._told(url) for key, url in self._pages(revision).items()}
        except (httpx.HTTPError, Unavailable, ValueError, KeyError):
            return None
        found = {key: counters for key, counters in (edges | pages).items() if counters}
        complete = edges and pages and len(found) == len(edges) + len(pages)
        return found if complete else None

    def _seen(self, url: str, revision: str) -> Counters | None:
        return _counters(self._stats(url, revision), self._model, revision)

    def _told(self, url: str) -> Counters | None:
        """What a server counts itself."""
        invalid = _invalid_outputs(self._http.get(url).raise_for_status().text)
        return None if invalid is None else replace(NOTHING, invalid_outputs=invalid)

    def _stats(self, url: str, revision: str) -> dict[str, Any]:
        name = re.escape(f"{self._model}-{revision}")
        counters = r"upstream_rq_(2xx|5xx|time|pending_overflow)|upstream_cx_connect_fail|grpc\..*"
        query = {
            "format": "json",
            "histogram_buckets": "cumulative",
            "filter": rf"^cluster\.{name}(-grpc)?\.({counters})$",
        }
        answer = self._http.get(f"{url}/stats", params=query).raise_for_status()
        return _by_name(answer.json()["stats"])


def _by_name(stats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {s["name"]: s["value"] for s in stats if "name" in s}
    histograms = [h for s in stats for h in s.get("histograms", ())]
    return found | {h["name"]: [b["cumulative"] for b in h["buckets"]] for h in histograms}


def _counters(stats: dict[str, Any], model: str, revision: str) -> Counters | None:
    names = [f"cluster.{edge.cluster_name(model, revision, grpc=grpc)}" for grpc in (False, True)]
    # This one is there as soon as the cluster is; the others appear with their first request.
    if not all(f"{name}.upstream_cx_connect_fail" in stats for name in names):
        return None
    rest, grpc = names
    method = f"{grpc}.grpc.{edge.GRPC_SERVICE}.ModelInfer"

    def count(name: str) -> int:
        return int(stats.get(name, 0))

    # An overflow is the edge's own 503 to a flood: no fault of a model.
    refused = sum(count(f"{name}.upstream_rq_pending_overflow") for name in names)
    errors = sum(count(f"{name}.upstream_rq_5xx") for name in names)
    return Counters(
        good=count(f"{rest}.upstream_rq_2xx") + count(f"{method}.0"),
        server_errors=errors - refused + sum(count(f"{method}.{code}") for code in GRPC_FAULTS),
        unreachable=sum(count(f"{name}.upstream_cx_connect_fail") for name in names),
        invalid_outputs=0,
        latency=_summed([stats.get(f"{name}.upstream_rq_time") for name in names]),
    )


def _summed(histograms: Sequence[list[int] | None]) -> tuple[int, ...]:
    empty = [0] * len(edge.LATENCY_BOUNDS_MS)
    return tuple(sum(counts) for counts in zip(*[h or empty for h in histograms], strict=True))


def _invalid_outputs(page: str) -> int | None:
    """Sum over all label values; None when the page is not of a server that counts them."""
    if INVALID_OUTPUTS not in page:
        return None
    lines = re.findall(rf"^{INVALID_OUTPUTS}(?:{{[^}}]*}})? {_NUMBER}", page, re.MULTILINE)
    return int(sum(float(number) for number in lines))
