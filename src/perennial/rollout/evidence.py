"""What did each revision do at this step: counters of Envoy and of the servers, since it began."""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import httpx

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

    def since(self, earlier: "Counters") -> "Counters | None":
        """What was added, None when a counter fell: its process began to count anew."""
        latency = tuple(now - then for now, then in zip(self.latency, earlier.latency, strict=True))
        names = [f.name for f in fields(self) if f.name != "latency"]
        added = {name: getattr(self, name) - getattr(earlier, name) for name in names}
        if min(*added.values(), *latency) < 0:
            return None
        return Counters(**added, latency=latency)

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


class EnvoyEvidence:
    """Evidence from the edge's admin port and from each revision's own metrics page."""

    def __init__(self, admin_url: str, model: str, metrics_url: Callable[[str], str]) -> None:
        self._http = httpx.Client(timeout=TIMEOUT_S, trust_env=False)
        self._admin_url = admin_url
        self._model = model
        self._metrics_url = metrics_url
        self._step = ""
        self._start: dict[str, Counters] = {}
        self._read_at = -math.inf

    def look(self, step: str, canary: str, stable: str) -> Evidence:
        """Numbers since the first look with this ``step``; the first one begins to count."""
        if step != self._step:
            self._step, self._start = step, {}
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
        added = found.since(self._start.setdefault(revision, found))
        if added is None:
            self._start[revision] = found
            return None
        return added.arm(revision)

    def _counters(self, revision: str) -> Counters | None:
        """All counters of a revision, None when one source is silent or does not know it."""
        try:
            stats = self._stats(revision)
            page = self._http.get(self._metrics_url(revision)).raise_for_status().text
        except (httpx.HTTPError, ValueError, KeyError):
            return None
        invalid = _invalid_outputs(page)
        if invalid is None:
            return None
        return _counters(stats, self._model, revision, invalid)

    def _stats(self, revision: str) -> dict[str, Any]:
        name = re.escape(f"{self._model}-{revision}")
        counters = r"upstream_rq_(2xx|5xx|time|pending_overflow)|upstream_cx_connect_fail|grpc\..*"
        query = {
            "format": "json",
            "histogram_buckets": "cumulative",
            "filter": rf"^cluster\.{name}(-grpc)?\.({counters})$",
        }
        answer = self._http.get(f"{self._admin_url}/stats", params=query).raise_for_status()
        return _by_name(answer.json()["stats"])


def _by_name(stats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {s["name"]: s["value"] for s in stats if "name" in s}
    histograms = [h for s in stats for h in s.get("histograms", ())]
    return found | {h["name"]: [b["cumulative"] for b in h["buckets"]] for h in histograms}


def _counters(stats: dict[str, Any], model: str, revision: str, invalid: int) -> Counters | None:
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
        invalid_outputs=invalid,
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
