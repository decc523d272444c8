"""How do our events travel: as signed CloudEvents, structured or binary, read without trust."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from cloudevents.conversion import to_binary, to_structured
from cloudevents.exceptions import GenericException
from cloudevents.http import CloudEvent
from cloudevents.http import from_http as parse

from perennial import signing
from perennial.errors import BadInput, many
from perennial.records import DriftReport, Event

DRIFT = "dev.perennial.drift.detected"
SCHEDULE = "dev.perennial.schedule"
STRUCTURED = "application/cloudevents+json"
_REQUIRED = ("id", "source", "type", "subject", "time")
_PRINTABLE = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,254}[\x21-\x7e])?")

Mode = Literal["structured", "binary"]


@dataclass(frozen=True)
class Hint:
    """What a drift event claims: this window of this model's traffic drifted."""

    window_start: datetime
    window_end: datetime
    model_digest: str
    drifted: tuple[str, ...]


def drift_event(report: DriftReport, project: str, source: str, now: datetime) -> Event:
    """The event of a drifted window. One window of one model has one id, whoever sends it."""
    start = report.window_start.astimezone(UTC).isoformat()
    data = {
        "window_start": start,
        "window_end": report.window_end.astimezone(UTC).isoformat(),
        "rows": report.rows,
        "drifted": list(report.drifted),
        "model_digest": report.model_digest,
        "p_values": {f.feature: f.p_value for f in report.features},
    }
    name = _name(project, report.model_digest, start)
    return Event(id=name, source=source, type=DRIFT, subject=project, time=now, data=data)


def schedule_event(project: str, now: datetime) -> Event:
    """It is time to look again at what was decided; the same moment has the same id."""
    return Event(
        id=now.astimezone(UTC).isoformat(timespec="seconds"),
        source=f"schedule/{project}",
        type=SCHEDULE,
        subject=project,
        time=now,
    )


def restamped(event: Event, now: datetime) -> Event:
    """The same event for another try: receivers refuse old times, and know the id anyway."""
    return replace(event, time=now)


def message(event: Event) -> bytes:
    """The bytes that a signature covers: every field that has a meaning."""
    return signing.canonical(
        {
            "specversion": "1.0",
            "id": event.id,
            "source": event.source,
            "type": event.type,
            "subject": event.subject,
            "time": event.time.astimezone(UTC).isoformat(),
            "data": hashlib.sha256(signing.canonical(event.data)).hexdigest(),
        }
    )


def to_http(
    event: Event, key: bytes | None, mode: Mode = "structured"
) -> tuple[dict[str, str], bytes]:
    """Headers and body that carry an event, signed when there is a key."""
    attributes = {
        "specversion": "1.0",
        "id": event.id,
        "source": event.source,
        "type": event.type,
        "subject": event.subject,
        "time": event.time.astimezone(UTC).isoformat(),
        "datacontenttype": "application/json",
        "project": event.subject,
    }
    if "model_digest" in event.data:
        attributes["modeldigest"] = event.data["model_digest"]
    if key is not None:
        attributes["signature"] = signing.sign(key, message(event))
    data = json.loads(signing.canonical(event.data))
    envelope = CloudEvent(attributes, data)
    headers, body = to_structured(envelope) if mode == "structured" else to_binary(envelope)
    return dict(headers), bytes(body)


def mode_of(headers: Mapping[str, str]) -> Mode | None:
    """How a request carries its event, None when its content type is none of ours."""
    given = {key.lower(): value for key, value in headers.items()}.get("content-type", "")
    kind = given.split(";")[0].strip().lower()
    modes: dict[str, Mode] = {STRUCTURED: "structured", "application/json": "binary"}
    return modes.get(kind)


def from_http(headers: Mapping[str, str], body: bytes) -> tuple[Event, str]:
    """An event and its signature ("" without one). Raises BadInput that names every fault."""
    mode = mode_of(headers)
    if mode is None:
        raise BadInput(f"the content type is not {STRUCTURED} or application/json")
    content = _strict_json(body)
    attributes = content if mode == "structured" else _ce_headers(headers)
    faults = _faults(attributes)
    if not faults:
        faults = _data_faults(attributes.get("data") if mode == "structured" else content)
    if faults:
        raise many("the event is wrong", faults)
    return _read(mode, attributes, body)


def hint(event: Event) -> Hint:
    """What a drift event claims. Raises BadInput that names every wrong field of its data."""
    data, faults = event.data, []
    moments = {name: _moment(data.get(name)) for name in ("window_start", "window_end")}
    faults = [f"data.{n} is not a time with a zone" for n, moment in moments.items() if not moment]
    start, end = moments.values()
    if start and end and end <= start:
        faults.append("data.window_end is not after data.window_start")
    if not _is_text(data.get("model_digest")):
        faults.append("data.model_digest is not a digest")
    names = data.get("drifted")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        faults.append("data.drifted is not a list of feature names")
    if faults or not start or not end:
        raise many("the drift event is wrong", faults)
    return Hint(start, end, str(data["model_digest"]), tuple(data["drifted"]))


def _read(mode: Mode, attributes: Mapping[str, Any], body: bytes) -> tuple[Event, str]:
    headers = {"content-type": STRUCTURED}
    if mode == "binary":
        named = {f"ce-{name}": value for name, value in attributes.items()}
        headers = {"content-type": "application/json", **named}
    try:
        envelope = parse(headers, body)
    except (GenericException, ValueError, TypeError, AttributeError, RecursionError) as exc:
        raise BadInput("the event is not a CloudEvent of version 1.0") from exc
    event = Event(
        id=envelope["id"],
        source=envelope["source"],
        type=envelope["type"],
        subject=envelope["subject"],
        time=datetime.fromisoformat(envelope["time"]).astimezone(UTC),
        data=envelope.get_data() or {},
    )
    return event, str(envelope.get("signature", ""))


def _faults(attributes: Any) -> list[str]:
    if not isinstance(attributes, Mapping):
        return ["it is not a JSON object"]
    faults = [
        f"{name} is missing or not 1 to 256 printable characters"
        for name in _REQUIRED
        if not _is_text(attributes.get(name))
    ]
    if attributes.get("specversion") != "1.0":
        faults.append("specversion is not 1.0")
    if _moment(attributes.get("time")) is None:
        faults.append("time is not a time with a zone")
    project = attributes.get("project", attributes.get("subject"))
    if project != attributes.get("subject"):
        faults.append("project is not the subject")
    return faults


def _data_faults(data: Any) -> list[str]:
    if not isinstance(data, dict):
        return ["data is not a JSON object"]
    try:
        signing.canonical(data)
    except (UnicodeEncodeError, RecursionError):
        return ["data is nested too deeply or holds text that is not Unicode"]
    return []


def _ce_headers(headers: Mapping[str, str]) -> dict[str, str]:
    lower = {key.lower(): value for key, value in headers.items()}
    return {key.removeprefix("ce-"): value for key, value in lower.items() if key[:3] == "ce-"}


def _strict_json(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:
        raise BadInput("the body is not JSON (UTF-8, no repeated keys, no NaN)") from exc


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(_PRINTABLE.fullmatch(value))


def _moment(value: object) -> datetime | None:
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
        return moment.astimezone(UTC) if moment.tzinfo else None
    except (ValueError, OverflowError):
        return None


def _name(*parts: str) -> str:
    # Lengths in between keep ("a", "bc") and ("ab", "c") apart.
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part.encode()).to_bytes(4, "big") + part.encode())
    return digest.hexdigest()
