"""KServe's Knative mode as the place where revisions run, and as the traffic between them.

One InferenceService a project; its pod template is the newest revision, ``canaryTrafficPercent``
its share. A rejected revision stays Knative's latest ready one, so the template and a share above
0 are never changed together: what is new comes up at 0 %, and only what is ready is raised.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from lightkube import Client
from lightkube.generic_resource import create_namespaced_resource

from perennial import kube
from perennial.errors import BadInput, Unavailable
from perennial.records import RolloutState
from perennial.rollout import conditions, manifest, plan, pods
from perennial.rollout.manifest import Document

log = logging.getLogger(__name__)

KnativeServing = create_namespaced_resource("serving.knative.dev", "v1", "Service", "services")
KnativeRevision = create_namespaced_resource("serving.knative.dev", "v1", "Revision", "revisions")

HOLD_S = 3.0
_POLL_S = 0.1
_UNKNOWN = -1
_REFUSALS = (kube.Conflict, kube.Forbidden, kube.Missing, BadInput)


@dataclass(frozen=True)
class Seen:
    """One look at an InferenceService, and at what Knative made of it."""

    live: Document
    knative: Document  # empty while there is none

    @property
    def top(self) -> str:
        """Whose pods the template describes."""
        return manifest.revision(self.live)

    @property
    def percent(self) -> int | None:
        return manifest.percent(self.live)

    @property
    def kserve(self) -> Document:
        """What KServe says of the predictor."""
        components = self.live.get("status", {}).get("components", {})
        return dict(components.get("predictor", {}))

    @property
    def status(self) -> Document:
        return dict(self.knative.get("status", {}))

    @property
    def shares(self) -> dict[str, int]:
        """Percent of each of Knative's revisions."""
        return _shares(self.status)

    @property
    def is_noted(self) -> bool:
        """Has KServe seen the split that Knative made?"""
        return _shares(self.kserve) == self.shares

    @property
    def is_carried(self) -> bool:
        """Has Knative acted on the spec that stands in the InferenceService now?"""
        spec = self.knative.get("spec", {})
        labels = spec.get("template", {}).get("metadata", {}).get("labels", {})
        ours = self.live["spec"]["predictor"].get("labels", {})
        same = all(labels.get(k) == ours.get(k) for k in (manifest.REVISION, manifest.ROLLOUT))
        generation = self.knative.get("metadata", {}).get("generation")
        acted = self.status.get("observedGeneration") == generation
        return bool(same and acted and spec.get("traffic", [{}])[0].get("percent") == self._latest)

    @property
    def _latest(self) -> int:
        # KServe ignores the percent until a first revision had all traffic.
        given = self.percent if self.kserve.get("latestRolledoutRevision") else None
        return 100 if given is None else given

    @property
    def refusal(self) -> str:
        """Why KServe cannot make of the spec what it should; empty while it can."""
        found = conditions.of(self.live, "PredictorReady")
        failed = found.get("reason") == "ReconcileFailed"
        return str(found.get("message", "")) if failed else ""


class KnativeService:
    """The revisions of one project, and who gets its requests."""

    def __init__(
        self,
        client: Client,
        project: str,
        manifest_of: Callable[[RolloutState], Document],
        serving: Callable[[], RolloutState | None],
        pinned: Callable[[int], Document | None] = lambda _: None,
        ours: Callable[[], Collection[int | None]] = lambda: range(101),
        hold_s: float = HOLD_S,
    ) -> None:
        """``ours`` gives the percents that whoever was here before may have left."""
        self._client = client
        self._project = project
        self._manifest_of = manifest_of
        self._serving = serving
        self._pinned = pinned
        self._ours = ours
        self._hold_s = hold_s
        self._labels: dict[str, str] = {}  # of Knative's revisions
        self._labelled = ""  # the Knative Service that these are of
        self._applied: int | None = _UNKNOWN

    def names(self) -> tuple[str, ...]:
        seen = self._look()
        if seen is None:
            return ()
        return tuple(dict.fromkeys([seen.top, *self._weights(seen)]))

    def start(self, state: RolloutState) -> None:
        """Make the revision the newest one, without traffic. Raises a PerennialError.

        What serves and lost everything to a candidate gets it back at once.
        """
        seen, name = self._look(), plan.name(state)
        if seen is None:
            self._refuse_alone(state)
            self._create(self._manifest_of(state))
        elif self._is_due_back(seen, name):
            self._withdraw(seen, {name: 100})
        elif seen.top != name:
            self._refuse_second(seen, name)
            self._await_rolled_out(seen, state)
            self._put(seen, manifest.with_percent(self._manifest_of(state), 0))

    def ready(self, name: str) -> bool:
        """Would a request be answered? Raises Unavailable that says what is waited for."""
        seen = self._look()
        if seen is None:
            return False
        carrying = [r for r in seen.shares if self._label(r) == name]
        if carrying or seen.top != name:
            return any(self._is_ready(revision) for revision in carrying)
        return self._is_newest_ready(seen)

    def died(self, name: str) -> str:
        """How a server of the revision ended; empty while none did."""
        return pods.died(self._client, self._project, name)

    def stop(self, name: str) -> None:
        """Take a revision out of the template, so that Knative forgets it as the latest one.

        What serves is applied again at 0 %; raises Unavailable until its copy has all traffic.
        """
        seen = self._look()
        if seen is None or seen.top != name:
            return self._tidy(seen)
        serving = self._serving()
        if serving is None:
            log.info("deleting InferenceService %s: nothing serves", self._project)
            return kube.delete(self._client, kube.InferenceService, self._project)
        if self._weights(seen).get(name):
            raise Unavailable(f"{name} has traffic still; it is taken away first")
        self._put(seen, manifest.with_percent(self._manifest_of(serving), 0))
        raise Unavailable(f"{plan.name(serving)} comes up anew in place of {name}")

    def weights(self) -> Mapping[str, int]:
        seen = self._look()
        return self._weights(seen) if seen else {}

    def set_weights(self, weights: Mapping[str, int]) -> None:
        """Drive towards these weights; raises Unavailable until they hold."""
        wanted = {name: percent for name, percent in weights.items() if percent}
        if sum(wanted.values()) != 100 or min(wanted.values()) < 0:
            raise BadInput(f"{wanted} is no split of all requests, wanted shares that sum to 100")
        seen = self._look()
        if seen is None:
            raise Unavailable(f"there is no InferenceService {self._project}")
        if seen.top not in wanted:
            self._withdraw(seen, wanted)
        elif len(wanted) == 1:
            self._give_all(seen, wanted)
        else:
            self._share(seen, wanted)
        self._hold(wanted)

    def pages(self, name: str) -> Mapping[str, str]:
        """Metrics pages of a revision's pods."""
        return pods.pages(self._client, self._project, name)

    def platform_name(self, name: str) -> str:
        """What Knative calls a revision; empty when there is none."""
        seen = self._look()
        if seen is None:
            return ""
        newest = str(seen.status.get("latestCreatedRevisionName", ""))
        known = [newest, *seen.shares]
        return next((r for r in known if r and self._label(r) == name), "")

    def edits(self, allowed: Collection[int | None]) -> list[str]:
        """What somebody else changed; ``allowed`` are the percents that may stand there."""
        seen = self._look()
        if seen is None:
            return [f"InferenceService {self._project} was deleted"]
        serving = self._serving()
        if serving is None:
            return []
        if seen.top == manifest.NOBODY:
            return [f"InferenceService {self._project} has another template"]
        faults = [] if seen.percent in allowed else [_percent_edit(seen.percent)]
        return faults + self._template_edits(seen)

    def _template_edits(self, seen: Seen) -> list[str]:
        applied = self._applied_for(seen)
        return manifest.differences(applied, seen.live) if applied else []

    def _applied_for(self, seen: Seen) -> Document | None:
        if applied := self._pinned(manifest.rollout(seen.live)):
            return applied
        serving = self._serving()
        ours = serving is not None and plan.name(serving) == seen.top
        return self._manifest_of(serving) if serving and ours else None

    def _withdraw(self, seen: Seen, wanted: Mapping[str, int]) -> None:
        """The newest revision gets nothing: KServe gives all to the one that had it before."""
        serving = self._serving()
        kept = [seen.kserve.get(f"{which}RolledoutRevision") for which in ("latest", "previous")]
        if any(r and self._label(r) in wanted for r in kept) or serving is None:
            return self._put(seen, manifest.with_percent(seen.live, 0))
        # KServe remembers one step only; what lies deeper comes up anew.
        self._put(seen, manifest.with_percent(self._manifest_of(serving), 0))
        raise Unavailable(f"{plan.name(serving)} comes up anew, KServe does not remember it")

    def _give_all(self, seen: Seen, wanted: Mapping[str, int]) -> None:
        if seen.percent is None:
            return
        if self._is_newest_up(seen):
            self._put(seen, manifest.with_percent(seen.live, None))
        elif self._weights(seen) != wanted:
            raise Unavailable(f"{seen.top} is not ready for all traffic")

    def _share(self, seen: Seen, wanted: Mapping[str, int]) -> None:
        share = wanted[seen.top]
        if fault := self._foreign(seen, share):
            raise Unavailable(f"somebody edited InferenceService {self._project}: {fault}")
        self._is_newest_ready(seen)
        self._put(seen, manifest.with_percent(seen.live, share))

    def _foreign(self, seen: Seen, share: int) -> str:
        """A percent that cannot be ours; a killed operator leaves the one before."""
        known = self._applied is not _UNKNOWN
        left = seen.percent in self._ours() and (seen.percent or 0) <= share
        ours = seen.percent == self._applied if known else left
        return "" if ours and seen.percent is not None else _percent_edit(seen.percent)

    def _hold(self, wanted: Mapping[str, int]) -> None:
        """Return when requests go where they are wanted. Raises Unavailable."""
        limit = time.monotonic() + self._hold_s
        while True:
            seen = self._look()
            if seen and self._holds(seen, wanted):
                return
            if time.monotonic() > limit:
                found = self._weights(seen) if seen else {}
                raise Unavailable(f"traffic of {self._project} is {found}, on its way to {wanted}")
            time.sleep(_POLL_S)

    def _holds(self, seen: Seen, wanted: Mapping[str, int]) -> bool:
        routed = conditions.is_true(seen.knative, "RoutesReady")
        acted = seen.is_carried and routed and self._weights(seen) == wanted
        return acted and seen.is_noted and self._is_kept(seen, wanted)

    def _is_kept(self, seen: Seen, wanted: Mapping[str, int]) -> bool:
        """Does KServe give the rest to whom it is meant for?

        It gives it to what it holds to be rolled out. After a moment at 100 % that is the newest
        revision, and all traffic goes back there once more before KServe corrects itself.
        """
        rest = [name for name in wanted if name != seen.top] or [seen.top]
        return self._label(seen.kserve.get("latestRolledoutRevision", "")) in rest

    def _tidy(self, seen: Seen | None) -> None:
        """Let what serves have all traffic by being the newest, not by having been it."""
        serving = self._serving()
        if seen is None or serving is None or seen.percent is None:
            return
        if seen.top != plan.name(serving):
            return
        if not self._is_newest_ready(seen):
            raise Unavailable(f"{seen.top} is not ready yet in its new copy")
        self._put(seen, manifest.with_percent(seen.live, None))
        self._hold({seen.top: 100})

    def _is_due_back(self, seen: Seen, name: str) -> bool:
        """Has a candidate all that this revision, which serves, is to have?"""
        serving = self._serving()
        serves = serving is not None and plan.name(serving) == name != seen.top
        return serves and seen.top != manifest.NOBODY and self._weights(seen) == {seen.top: 100}

    def _refuse_alone(self, state: RolloutState) -> None:
        """A candidate without what serves beside it would get every request, whatever its share."""
        serving, name = self._serving(), plan.name(state)
        if serving and plan.name(serving) != name and not plan.is_by_hand(state):
            raise Unavailable(
                f"{name} waits: there is no InferenceService {self._project}, and"
                f" {plan.name(serving)} serves in it first"
            )

    def _refuse_second(self, seen: Seen, name: str) -> None:
        serving = self._serving()
        in_flight = {n for n in self._weights(seen) if serving and n != plan.name(serving)}
        if in_flight:
            raise Unavailable(f"{name} waits: {sorted(in_flight)} has traffic still")

    def _await_rolled_out(self, seen: Seen, state: RolloutState) -> None:
        """Raises Unavailable until KServe itself knows whom a candidate must leave all traffic to.

        Before that it ignores a percent, or gives the rest to whoever had all traffic before.
        """
        serving, name = self._serving(), plan.name(state)
        if serving is None or plan.name(serving) == name:
            return
        known = seen.kserve.get("latestRolledoutRevision", "")
        has = self._label(known) if known else "nobody"
        # Whoever goes back to what KServe holds on to wants just that.
        wanted = {plan.name(serving), name} if plan.is_by_hand(state) else {plan.name(serving)}
        if has not in wanted:
            noted = f"{plan.name(serving)} has all traffic; so far it has noted {has}"
            raise Unavailable(f"{name} waits until KServe notes that {noted}")

    def _is_newest_up(self, seen: Seen) -> bool:
        try:
            return self._is_newest_ready(seen)
        except Unavailable:
            return False

    def _is_newest_ready(self, seen: Seen) -> bool:
        """Is the template created and ready, for Knative and for KServe?"""
        created = seen.status.get("latestCreatedRevisionName", "")
        if not seen.is_carried or not created or self._label(created) != seen.top:
            said = seen.refusal and f": {seen.refusal}"
            raise Unavailable(f"KServe and Knative have not taken {seen.top} up yet{said}")
        if seen.status.get("latestReadyRevisionName") != created:
            raise Unavailable(f"{seen.top} is not ready: {self._why(seen.top, created)}")
        told = {seen.kserve.get(f"latest{w}Revision") for w in ("Created", "Ready")}
        if told != {created}:
            raise Unavailable(f"KServe has not seen yet that {created} is ready")
        return True

    def _why(self, name: str, created: str) -> str:
        """What the pods of a revision wait for, else what Knative says of it."""
        found = kube.find(self._client, KnativeRevision, created)
        said = conditions.of(found or {}, "Ready").get("message")
        return pods.waits(self._client, self._project, name) or said or "its pods come up"

    def _is_ready(self, revision: str) -> bool:
        found = kube.find(self._client, KnativeRevision, revision)
        return conditions.is_true(found or {}, "Ready")

    def _weights(self, seen: Seen) -> dict[str, int]:
        found: dict[str, int] = {}
        for revision, percent in seen.shares.items():
            name = self._label(revision)
            found[name] = found.get(name, 0) + percent
        return found

    def _label(self, revision: str) -> str:
        """Our name of one of Knative's revisions; a stranger's keeps Knative's."""
        if revision not in self._labels:
            found = kube.find(self._client, KnativeRevision, revision)
            if found is None:
                return revision
            labels = found["metadata"].get("labels", {})
            self._labels[revision] = labels.get(manifest.REVISION, revision)
        return self._labels[revision]

    def _look(self) -> Seen | None:
        live = kube.find(self._client, kube.InferenceService, self._project)
        if live is None:
            self._applied = _UNKNOWN
            return None
        if live["metadata"].get("deletionTimestamp"):
            raise Unavailable(f"InferenceService {self._project} is being deleted")
        called = f"{self._project}-predictor"
        knative: Document = kube.find(self._client, KnativeServing, called) or {}
        # Whoever is made anew counts its revisions from 1 again.
        made = str(knative.get("metadata", {}).get("uid", ""))
        if made != self._labelled:
            self._labels, self._labelled = {}, made
        return Seen(live, knative)

    def _create(self, document: Document) -> None:
        with kube.asking(f"creating InferenceService {self._project}"):
            self._client.create(kube.InferenceService(**document))
        log.info("created InferenceService %s revision=%s", self._project, _top(document))
        self._applied = None

    def _put(self, seen: Seen, document: Document) -> None:
        """Replace the spec as it was looked at; whoever changed it meanwhile is not overwritten."""
        percent = manifest.percent(document)
        if document["spec"] == seen.live["spec"]:
            self._applied = percent
            return
        new = {**seen.live, "metadata": _merged(seen.live["metadata"], document["metadata"])}
        new["spec"] = document["spec"]
        new.pop("status", None)
        # An answer that is lost leaves open what stands there now; a refusal does not.
        before, self._applied = self._applied, _UNKNOWN
        try:
            with kube.asking(f"changing InferenceService {self._project}"):
                self._client.replace(kube.InferenceService(**new))
        except _REFUSALS:
            self._applied = before
            raise
        self._applied = percent
        log.info(
            "applied InferenceService %s revision=%s percent=%s",
            *(self._project, _top(document), manifest.percent(document)),
        )


def _shares(status: Document) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in status.get("traffic", ()):
        name = entry.get("revisionName", "")
        found[name] = found.get(name, 0) + int(entry.get("percent") or 0)
    return {name: percent for name, percent in found.items() if percent}


def _top(document: Document) -> str:
    return manifest.revision(document)


def _merged(live: Document, ours: Document) -> Document:
    both = {k: {**live.get(k, {}), **ours.get(k, {})} for k in ("labels", "annotations")}
    return {**live, **both}


def _percent_edit(percent: int | None) -> str:
    return f"canaryTrafficPercent is {'gone' if percent is None else percent}"
