"""Events travel as CloudEvents, are signed as a whole, and are read without trust."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from perennial import events, signing
from perennial.errors import BadInput
from perennial.records import DriftReport, Event, FeatureDrift

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
START = datetime(2011, 5, 29, tzinfo=UTC)
KEY = b"k" * 32
REPORT = DriftReport(
    window_start=START,
    window_end=START + timedelta(days=7),
    model_digest="sha256:aa",
    rows=512,
    thin=False,
    threshold=0.01,
    features=(
        FeatureDrift("recency", "ks", 0.3, 1e-9, True, 0.0),
        FeatureDrift("ordërs", "ks", 0.1, float("nan"), False, 1.0),
    ),
)
MODES = ["structured", "binary"]


@pytest.fixture
def event() -> Event:
    return events.drift_event(REPORT, "churn", "/transformer/v1", NOW)


@pytest.mark.parametrize("mode", MODES)
def test_an_event_arrives_as_it_was_sent(event: Event, mode: events.Mode):
    arrived, signature = events.from_http(*events.to_http(event, KEY, mode))

    assert replace(arrived, data={}) == replace(event, data={})
    assert arrived.data["drifted"] == ["recency"]
    assert arrived.data["p_values"] == {"recency": 1e-9, "ordërs": None}
    assert signing.verify(KEY, events.message(arrived), signature)


@pytest.mark.parametrize("mode", MODES)
def test_an_event_without_a_key_has_no_signature(event: Event, mode: events.Mode):
    _, signature = events.from_http(*events.to_http(event, None, mode))

    assert signature == ""


def test_what_a_broker_may_route_on_stands_in_the_attributes(event: Event):
    headers, _ = events.to_http(event, KEY, "binary")

    assert headers["ce-project"] == "churn"
    assert headers["ce-modeldigest"] == "sha256:aa"
    assert headers["ce-type"] == "dev.perennial.drift.detected"


ALTERED: dict[str, Callable[[Event], Event]] = {
    "its id": lambda e: replace(e, id="other"),
    "its source": lambda e: replace(e, source="/other"),
    "its type": lambda e: replace(e, type="dev.perennial.other"),
    "its project": lambda e: replace(e, subject="bank"),
    "its time": lambda e: replace(e, time=e.time + timedelta(microseconds=1)),
    "its data": lambda e: replace(e, data={**e.data, "rows": 513}),
}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED.keys())
def test_a_signature_does_not_survive_a_change_of(event: Event, alter: Callable[[Event], Event]):
    signature = signing.sign(KEY, events.message(event))

    assert not signing.verify(KEY, events.message(alter(event)), signature)
    assert not signing.verify(b"x" * 32, events.message(event), signature)


def test_one_window_of_one_model_is_one_event_whoever_sends_it(event: Event):
    again = events.drift_event(REPORT, "churn", "/transformer/v1", NOW + timedelta(hours=1))
    others = {
        events.drift_event(report, project, "/transformer/v1", NOW).id
        for report, project in [
            (replace(REPORT, model_digest="sha256:ab"), "churn"),
            (replace(REPORT, window_start=START - timedelta(days=7)), "churn"),
            (REPORT, "bank"),
            (replace(REPORT, model_digest="nsha256:aa"), "chur"),
        ]
    }

    assert again.id == event.id
    assert len(others - {event.id}) == 4


def test_another_try_has_a_new_time_and_a_signature_that_holds(event: Event):
    later = events.restamped(event, NOW + timedelta(hours=1))

    arrived, signature = events.from_http(*events.to_http(later, KEY))

    assert (arrived.id, arrived.time) == (event.id, NOW + timedelta(hours=1))
    assert signing.verify(KEY, events.message(arrived), signature)


def structured(**changes: Any) -> tuple[dict[str, str], bytes]:
    headers, body = events.to_http(events.drift_event(REPORT, "churn", "/s", NOW), KEY)
    content = {k: v for k, v in (json.loads(body) | changes).items() if v is not ...}
    return headers, json.dumps(content).encode()


WRONG: dict[str, tuple[tuple[dict[str, str], bytes], str]] = {
    "without an id": (structured(id=...), "id is missing"),
    "with an empty source": (structured(source=""), "source is missing"),
    "with a number as subject": (structured(subject=5), "subject is missing"),
    "with a very long id": (structured(id="x" * 257), "id is missing or not 1 to 256"),
    "with a line break in its source": (structured(source="/a\nb"), "source is missing"),
    "without a version": (structured(specversion=...), "specversion is not 1.0"),
    "of another version": (structured(specversion="0.3"), "specversion is not 1.0"),
    "without a zone in its time": (structured(time="2026-01-02T03:04:05"), "time is not a time"),
    "from before all zones": (structured(time="0001-01-01T00:00:00+14:00"), "time is not a time"),
    "for two projects": (structured(project="bank"), "project is not the subject"),
    "without data": (structured(data=...), "data is not a JSON object"),
    "with a list as data": (structured(data=[1]), "data is not a JSON object"),
    "with half a character": (structured(data={"a": "\ud800"}), "not Unicode"),
    "whose body is a list": ((structured()[0], b"[]"), "it is not a JSON object"),
    "whose body is no JSON": ((structured()[0], b"{"), "the body is not JSON"),
    "whose body is empty": ((structured()[0], b""), "the body is not JSON"),
    "whose body is no UTF-8": ((structured()[0], b'{"id": "\xff"}'), "the body is not JSON"),
    "that says a key twice": ((structured()[0], b'{"id": "a", "id": "b"}'), "no repeated keys"),
    "with NaN": ((structured()[0], b'{"id": NaN}'), "no NaN"),
    "nested without end": ((structured()[0], b"[" * 60_000), "the body is not JSON"),
    "of another content type": (({"content-type": "text/plain"}, b"{}"), "the content type"),
    "in a batch": (({"content-type": "application/cloudevents-batch+json"}, b"[]"), "content type"),
    "in binary mode without attributes": (
        ({"content-type": "application/json"}, b"{}"),
        "id is missing .* source is missing",
    ),
}


@pytest.mark.parametrize(("request_", "told"), WRONG.values(), ids=WRONG.keys())
def test_an_event_is_refused_in_one_sentence_when_it_comes(
    request_: tuple[dict[str, str], bytes], told: str
):
    with pytest.raises(BadInput, match=told) as caught:
        events.from_http(*request_)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", [400, 900, 990])
def test_deep_data_is_read_or_refused_but_never_breaks_the_reader(depth: int):
    headers, body = structured()
    deep = body.replace(b'"rows": 512', b'"rows": ' + b"[" * depth + b"]" * depth)

    try:
        events.from_http(headers, deep)
    except BadInput as exc:
        assert "nested" in str(exc) or "JSON" in str(exc) or "CloudEvent" in str(exc)


def test_a_drift_event_says_which_window_of_which_model(event: Event):
    hint = events.hint(event)

    assert hint == events.Hint(START, START + timedelta(days=7), "sha256:aa", ("recency",))


WRONG_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "no window": ({"window_start": None}, "data.window_start is not a time"),
    "no zone": ({"window_end": "2011-06-05"}, "data.window_end is not a time with a zone"),
    "an end before its start": ({"window_end": "2001-01-01T00:00:00Z"}, "not after"),
    "no model": ({"model_digest": 5}, "data.model_digest is not a digest"),
    "no feature names": ({"drifted": "recency"}, "data.drifted is not a list"),
}


@pytest.mark.parametrize(("change", "told"), WRONG_DATA.values(), ids=WRONG_DATA.keys())
def test_a_drift_event_is_refused_with(event: Event, change: dict[str, Any], told: str):
    with pytest.raises(BadInput, match=told):
        events.hint(replace(event, data={**event.data, **change}))


def test_the_event_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path):
    first = signing.event_key(tmp_path / "keys")
    second = signing.event_key(tmp_path / "keys")
    path = tmp_path / "keys" / "event.key"

    assert first == second == path.read_bytes()
    assert len(first) == 32
    assert path.stat().st_mode & 0o777 == 0o400
    assert [p.name for p in path.parent.iterdir()] == ["event.key"]


def test_a_cut_key_is_told_with_its_remedy(tmp_path: Path):
    (tmp_path / "event.key").write_bytes(b"short")

    with pytest.raises(BadInput, match=r"has 5 bytes, wanted 32; remove it and start"):
        signing.event_key(tmp_path)


def test_canonical_json_does_not_depend_on_the_order_of_keys():
    one = signing.canonical({"b": [1, 2.5], "a": {"d": NOW, "c": None}})

    assert one == b'{"a":{"c":null,"d":"2026-01-02T03:04:05.678901+00:00"},"b":[1,2.5]}'
    assert one == signing.canonical({"a": {"c": None, "d": NOW}, "b": (1, 2.5)})
