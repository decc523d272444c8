"""What did each revision do at this step: counters on the metrics pages of its pods."""

import re
from collections.abc import Callable, Mapping

import httpx

from perennial.errors import Unavailable
from perennial.records import LATENCY_BOUNDS_MS
from perennial.rollout.evidence import NOTHING, Counters, EnvoyEvidence, Pages

REQUESTS = "perennial_requests_total"
SECONDS = "perennial_request_seconds_bucket"
_LINE = re.compile(rf"^({REQUESTS}|{SECONDS}){{([^}}]*)}} ([0-9.eE+]+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_NOBODY = "nobody"


class PodEvidence(EnvoyEvidence):
    """Evidence where the splitter tells none: each pod counts what it answered itself.

    A pod that vanished or began anew makes its revision's numbers missing; only a revision
    without a share may have no pods.
    """

    def __init__(self, model: str, pages: Pages, shares: Callable[[], Mapping[str, int]]) -> None:
        super().__init__(model, dict, pages)
        self._shares = shares

    def _counters(self, revision: str) -> dict[str, Counters] | None:
        try:
            pages = self._pages(revision)
            if not pages and not self._shares().get(revision):
                return {_NOBODY: NOTHING}
            found = {key: self._told(url) for key, url in pages.items()}
        except (httpx.HTTPError, Unavailable, ValueError, KeyError):
            return None
        counted = {key: counters for key, counters in found.items() if counters}
        return counted if counted and len(counted) == len(found) else None

    def _told(self, url: str) -> Counters | None:
        return read(self._http.get(url).raise_for_status().text)


def read(page: str) -> Counters | None:
    """Everything that one server counted, None when the page is not of one of ours."""
    causes: dict[str, int] = {}
    below: dict[float, int] = {}
    for name, labels, number in _LINE.findall(page):
        told = dict(_LABEL.findall(labels))
        if name == REQUESTS:
            causes[told["cause"]] = causes.get(told["cause"], 0) + int(float(number))
        else:
            bound = float(told["le"])
            below[bound] = below.get(bound, 0) + int(float(number))
    if "ok" not in causes or not below:
        return None
    model = causes.get("model", 0)
    return Counters(
        good=causes["ok"],
        server_errors=model + causes.get("platform", 0),
        unreachable=0,
        invalid_outputs=model,
        latency=tuple(below[bound / 1000] for bound in LATENCY_BOUNDS_MS),
    )
