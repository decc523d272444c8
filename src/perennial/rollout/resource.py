"""How does a rollout look as a ModelRollout, and what does one that a person wrote wish?"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from perennial.ledger import Entry
from perennial.project import Rollout
from perennial.records import Phase, RolloutState
from perennial.rollout import manifest, plan

Document = dict[str, Any]

API, KIND = "perennial.dev/v1alpha1", "ModelRollout"
BY_RESOURCE = "resource "
REFUSED = "Refused"
_PHASES = {phase: str(phase).title().replace(" ", "") for phase in Phase}
_MOVING = {Phase.PROMOTED: "Promoting", Phase.ROLLED_BACK: "RollingBack"}
_ANALYSIS = {
    "min_requests": "minRequests",
    "interval_s": "intervalSeconds",
    "max_error_rate": "maxErrorRate",
    "max_p95_ms": "maxP95Ms",
    "max_p95_ratio": "maxP95Ratio",
    "max_invalid_rate": "maxInvalidRate",
}
_DEADLINES = {"ready_s": "readySeconds", "deadline_s": "stepSeconds"}


@dataclass(frozen=True)
class Wish:
    """What somebody asks for by a ModelRollout of their own."""

    name: str
    project: str
    version: int
    digest: str
    bundle_uri: str  # empty: where the registry keeps it
    run_id: str
    limits: Document  # what they said of project.Rollout


@dataclass(frozen=True)
class Look:
    """What is told of one rollout besides its own row."""

    steps: Sequence[Entry]  # the ledger's, of this rollout
    revision: str  # what the platform calls it
    waits: str  # what the controller waits for, empty when it goes on
    edits: Sequence[str]  # what somebody else changed of what runs
    is_moving: bool = False  # it is decided, and traffic is on its way to where that sends it


def name(state: RolloutState, history: Sequence[RolloutState]) -> str:
    """What the resource of a rollout is called: ``retail-v7``, and other when that is taken."""
    if is_by_resource(state):
        return state.run_id.removeprefix(BY_RESOURCE).partition("/")[0]
    first = f"{state.project}-{plan.name(state)}"
    taken = any(r.version == state.version and r.id < state.id for r in history)
    return f"{first}-r{state.id}" if taken else first


def document(state: RolloutState, called: str, limits: Rollout) -> Document:
    """The wish as an object, without its status."""
    return {
        "apiVersion": API,
        "kind": KIND,
        "metadata": {
            "name": called,
            "labels": {
                "app.kubernetes.io/part-of": "perennial",
                manifest.PROJECT: state.project,
                manifest.ROLLOUT: str(state.id),
            },
        },
        "spec": {
            "project": state.project,
            "version": state.version,
            "digest": state.digest,
            "bundleUri": state.bundle_uri,
            "runId": state.run_id,
            "strategy": "Canary",
            "steps": list(limits.steps),
            "analysis": {k: getattr(limits, field) for field, k in _ANALYSIS.items()},
            "deadlines": {k: getattr(limits, field) for field, k in _DEADLINES.items()},
        },
    }


def is_by_resource(state: RolloutState) -> bool:
    """Did a person wish it, by an object of their own?"""
    return state.run_id.startswith(BY_RESOURCE)


def is_ours(found: Document) -> bool:
    """Was it made by the operator?"""
    return manifest.ROLLOUT in (found.get("metadata", {}).get("labels") or {})


def is_unanswered(found: Document) -> bool:
    """Is it a person's, and may it still become a wish? A refusal is final, as the words are.

    Otherwise it would begin by itself when the version that it names comes to be, weeks later.
    """
    return not is_ours(found) and (found.get("status") or {}).get("phase") != REFUSED


def wish(found: Document) -> Wish:
    """What a ModelRollout of a person asks for; its uid makes asking twice one rollout."""
    spec, meta = found["spec"], found["metadata"]
    said = {**spec.get("analysis", {}), **spec.get("deadlines", {})}
    names = {**_ANALYSIS, **_DEADLINES}
    limits = {field: said[key] for field, key in names.items() if key in said}
    return Wish(
        name=meta["name"],
        project=spec["project"],
        version=int(spec["version"]),
        digest=spec["digest"],
        bundle_uri=spec.get("bundleUri", ""),
        run_id=f"{BY_RESOURCE}{meta['name']}/{meta['uid']}",
        limits=limits | ({"steps": spec["steps"]} if "steps" in spec else {}),
    )


def status(
    state: RolloutState, limits: Rollout, look: Look, before: Document, now: datetime
) -> Document:
    """How far a rollout is; ``before`` is the status that stands there, for its times."""
    count = len(limits.steps)
    at = count if state.phase is Phase.PROMOTED else state.step + 1
    told: Document = {
        "observedGeneration": 1,
        "rollout": state.id,
        "phase": _phase(state, look),
        "step": f"{at}/{count}",
        "weight": state.weight,
        "verdict": str(look.steps[-1].body["verdict"]) if look.steps else "",
        "reason": state.reason,
        "revision": look.revision or before.get("revision", ""),
        "history": [_step(entry) for entry in look.steps],
    }
    return told | {"conditions": _conditions(state, look, before, now)}


def refusal(why: str, before: Document, now: datetime) -> Document:
    """The status of a wish that cannot be one."""
    accepted = ("Accepted", False, "Refused", why)
    conditions = [_condition(*accepted, before=before, now=now)]
    return {"phase": REFUSED, "reason": why, "observedGeneration": 1, "conditions": conditions}


def _phase(state: RolloutState, look: Look) -> str:
    return (look.is_moving and _MOVING.get(state.phase)) or _PHASES[state.phase]


def _step(entry: Entry) -> Document:
    body = entry.body
    told = {
        "at": entry.at.isoformat(),
        "weight": body["weight"],
        "verdict": body["verdict"],
        "reason": body["reason"],
        "requests": body.get("canary_requests", 0),
    }
    return told | ({"revision": body["revision"]} if body.get("revision") else {})


def _conditions(state: RolloutState, look: Look, before: Document, now: datetime) -> list[Document]:
    edits = "; ".join(look.edits)
    over, phase = state.phase.over and not look.is_moving, _phase(state, look)
    going = "Waiting" if look.waits else phase
    told = [
        ("Accepted", True, "Wished", "the store holds this wish"),
        ("Progressing", not over, going, look.waits or state.reason),
        ("Complete", over, phase, state.reason),
        ("AsApplied", not edits, "EditedOutside" if edits else "AsApplied", edits),
    ]
    return [_condition(*one, before=before, now=now) for one in told]


def _condition(
    kind: str, holds: bool, reason: str, message: str, *, before: Document, now: datetime
) -> Document:
    """One condition; its time is when it last turned."""
    value = "True" if holds else "False"
    old = next((c for c in before.get("conditions", ()) if c["type"] == kind), None)
    turned = old is None or old["status"] != value
    since = now.isoformat() if old is None or turned else old["lastTransitionTime"]
    return {
        "type": kind,
        "status": value,
        "reason": reason,
        "message": message[:1024],
        "lastTransitionTime": since,
    }
