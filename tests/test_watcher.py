import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import pytest
import tiny

from perennial import bundle, events
from perennial.contract import Contract
from perennial.drift import detectors, light, segments
from perennial.drift.windows import Served
from perennial.errors import BadInput
from perennial.records import Event
from perennial.serving import watcher as watchers
from perennial.serving.service import InvalidOutput
from perennial.serving.transformer import Transformer, event_time
from perennial.serving.wire import Ask, Refused, Tensor

NOW = datetime(2026, 1, 1, tzinfo=UTC)
WINDOW = tiny.WINDOW_ROWS * tiny.STEP


class Heard:
    """An announcer that keeps what it was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def start(self) -> None:
        pass

    def put(self, event: Event) -> None:
        self.events.append(event)

    def finish(self) -> None:
        pass


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> bundle.Parts:
    folder = tmp_path_factory.mktemp("watch") / "tiny"
    tiny.bundle(folder)
    return bundle.parts(folder)


@pytest.fixture
def contract(parts: bundle.Parts) -> Contract:
    return Contract.from_plain(parts.contract)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def watcher(parts, contract, heard, tmp_path) -> watchers.Watcher:
    writer = segments.Writer.new(tmp_path / "segments", "v1", contract.names)
    watch = detectors.watch(parts, "scipy")
    return watchers.Watcher(parts.project, watch, writer, heard, lambda: NOW)


def served(contract: Contract, window: int, rows: int = 50, shift: float = 0.0) -> Served:
    matrix = contract.encode(tiny.rows(rows, seed=window, shift=shift))
    return Served(tiny.START + window * WINDOW, f"w{window}", matrix, np.full(rows, 0.5))


def run(watcher: watchers.Watcher, *requests: Served) -> None:
    for request in requests:
        watcher.offer(request)
    watcher.start()
    watcher.finish()
    assert not watcher.is_alive()


def test_a_drifted_window_is_announced_and_the_unfinished_one_is_not(
    watcher, heard, contract, tmp_path
):
    run(watcher, served(contract, 0, shift=2.0), served(contract, 1, shift=2.0))

    (event,) = heard.events
    assert events.hint(event).window_start == tiny.START
    assert event.time == NOW
    assert segments.starts(tmp_path / "segments") == [tiny.START, tiny.START + WINDOW]


def test_a_full_queue_drops_and_counts_and_never_waits(watcher, contract, monkeypatch):
    one = served(contract, 0, rows=1)
    before = watchers.DROPPED._value.get()

    for _ in range(watchers.QUEUE + 3):
        watcher.offer(one)

    assert watchers.DROPPED._value.get() - before == 3


def test_a_window_that_cannot_be_written_does_not_end_the_watch(
    watcher, heard, contract, tmp_path, caplog
):
    folder = tmp_path / "segments"
    folder.mkdir()
    (folder / tiny.START.strftime("%Y%m%dT%H%M%SZ")).write_text("in the way")

    run(
        watcher,
        served(contract, 0, shift=2.0),
        served(contract, 1, shift=2.0),
        served(contract, 2),
    )

    assert [events.hint(e).window_start for e in heard.events] == [tiny.START + WINDOW]
    assert "watch failed" in caplog.text


def test_many_rows_are_written_before_their_window_ends(watcher, contract, tmp_path, monkeypatch):
    monkeypatch.setattr(watchers, "SPILL_ROWS", 100)

    run(watcher, *[served(contract, 0) for _ in range(4)], served(contract, 1))

    (report,) = segments.reports(tmp_path / "segments", tiny.START)
    parts = list((tmp_path / "segments").glob("20200101T000000Z/*.parquet"))
    assert (report.rows, len(parts)) == (200, 2)


def asked(contract: Contract, **parameters: object) -> Ask:
    body = contract.to_request(tiny.rows(2), "r")
    tensors = [
        Tensor(i["name"], i["datatype"], tuple(i["shape"]), i["data"]) for i in body["inputs"]
    ]
    return Ask("r", tuple(tensors), parameters)


class Offered:
    def __init__(self) -> None:
        self.requests: list[Served] = []

    def offer(self, request: Served) -> None:
        self.requests.append(request)


def answered(contract: Contract, predictor, offered: Offered):
    """What the transformer makes of a predictor's answer."""

    async def once():
        transport = httpx.MockTransport(predictor)
        async with httpx.AsyncClient(transport=transport, base_url="http://predictor") as client:
            service = Transformer("tiny", contract, client, offered, {}, lambda: NOW)
            return await service.answer(service.read(asked(contract)), {"x-request-id": "7"})

    return asyncio.run(once())


def scored(*values: float | None) -> httpx.Response:
    return httpx.Response(200, json={"outputs": [{"name": "probability", "data": list(values)}]})


def test_the_transformer_passes_scores_and_request_id_on_and_offers_them(contract):
    offered, seen = Offered(), []

    def predictor(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["x-request-id"])
        return scored(0.25, 0.5)

    answer = answered(contract, predictor, offered)

    assert list(answer.scores) == [0.25, 0.5]
    assert seen == ["7"]
    assert [(s.event_time, len(s.scores)) for s in offered.requests] == [(NOW, 2)]


def down(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")


@pytest.mark.parametrize(
    ("predictor", "error", "status"),
    [
        pytest.param(down, Refused, 503, id="does not answer"),
        pytest.param(lambda r: httpx.Response(503), Refused, 503, id="is not ready"),
        pytest.param(lambda r: httpx.Response(500), Refused, 500, id="fails"),
        pytest.param(lambda r: httpx.Response(400), RuntimeError, None, id="disagrees"),
        pytest.param(lambda r: scored(0.5), ValueError, None, id="scores other rows"),
        pytest.param(lambda r: scored(0.5, None), InvalidOutput, None, id="answers NaN"),
        pytest.param(lambda r: scored(0.5, 1.5), InvalidOutput, None, id="answers above 1"),
    ],
)
def test_nothing_is_watched_when_the_predictor(predictor, error, status, contract):
    offered = Offered()

    with pytest.raises(error) as failed:
        answered(contract, predictor, offered)

    assert getattr(failed.value, "status", None) == status
    assert offered.requests == []


@pytest.mark.parametrize(
    ("given", "moment"),
    [
        ("2011-06-01T12:00:00Z", datetime(2011, 6, 1, 12, tzinfo=UTC)),
        ("2011-06-01T12:00:00+02:00", datetime(2011, 6, 1, 10, tzinfo=UTC)),
        ("2011-06-01", datetime(2011, 6, 1, tzinfo=UTC)),
        (None, NOW),
    ],
)
def test_event_time_is_read_as_utc_and_is_now_without_one(given, moment, contract):
    parameters = {} if given is None else {"event_time": given}

    assert event_time(asked(contract, **parameters), lambda: NOW) == moment


def test_an_event_time_that_is_none_is_refused_by_name(contract):
    with pytest.raises(BadInput, match=r"parameters.event_time is 'soon'"):
        event_time(asked(contract, event_time="soon"), lambda: NOW)


def test_an_event_time_in_the_future_is_refused_because_windows_and_cooldown_follow_it(contract):
    with pytest.raises(BadInput, match=r"parameters.event_time lies in the future"):
        event_time(asked(contract, event_time="2190-01-15"), lambda: NOW)


def test_a_bare_package_gives_its_modules_without_its_init(tmp_path: Path, monkeypatch):
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").write_text("raise RuntimeError('slow')")
    (tmp_path / "heavy" / "part.py").write_text("ANSWER = 42")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        light.package("heavy")
        from heavy.part import ANSWER  # type: ignore[import-not-found]
    finally:
        for name in ("heavy", "heavy.part"):
            sys.modules.pop(name, None)

    assert ANSWER == 42
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        light.package("nowhere")
