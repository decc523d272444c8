"""REST and gRPC on one port, as they come through Knative's ingress."""

import asyncio
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import servers
import tiny
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, Event, StreamEnded, StreamReset
from h2.settings import SettingCodes
from hyperframe.frame import Frame, GoAwayFrame, RstStreamFrame
from test_serving import GRPC, contract, loaded, made, one, predictor  # noqa: F401

from perennial.serving.oneport import Streams


@pytest.fixture(scope="module")
def front(made, predictor) -> Iterator[servers.Server]:  # noqa: F811
    python = servers.runtime_python()
    if subprocess.run([str(python), "-c", "import h2"], capture_output=True).returncode:
        pytest.skip("the runtime environment has no h2; run 'make env'")
    server = servers.Server(
        "transformer",
        made.parent / "front.log",
        python,
        bundle=made,
        predictor_host=predictor.address,
        segments=made.parent / "front",
        revision="v1",
        one_port="true",
    )
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture
def streams(front) -> Iterator[httpx.Client]:
    """A client that speaks HTTP/2 from its first byte."""
    with httpx.Client(
        base_url=f"http://{front.address}", http1=False, http2=True, timeout=30
    ) as client:
        yield client


def test_rest_is_answered_over_both_versions_of_http(front, streams, contract):  # noqa: F811
    body = one(contract)

    plain = front.infer(body)[1]["outputs"][0]["data"]
    answer = streams.post("/v2/models/tiny/infer", json=body)

    assert (answer.status_code, answer.http_version) == (200, "HTTP/2")
    assert answer.json()["outputs"][0]["data"] == plain
    assert streams.get("/v2/models/tiny/ready").status_code == 200
    assert streams.get("/metrics").status_code == 200
    assert streams.post("/v2/models/tiny/infer", json={}).status_code == 400


def test_grpc_is_answered_on_the_same_port(front):
    done = subprocess.run(
        [servers.runtime_python(), "-c", GRPC, front.address],
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    separate = subprocess.run(
        [servers.runtime_python(), "-c", GRPC, f"127.0.0.1:{front.grpc_port}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == separate.stdout


def test_many_streams_of_one_connection_are_answered_side_by_side(front, contract):  # noqa: F811
    body = one(contract)

    async def ask() -> list[httpx.Response]:
        # Of httpx's clients only this one keeps the streams of a connection apart.
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(
            base_url=f"http://{front.address}", http1=False, http2=True, timeout=60, limits=limits
        ) as client:
            asked = (client.post("/v2/models/tiny/infer", json=body) for _ in range(200))
            return await asyncio.gather(*asked)

    assert {answer.status_code for answer in asyncio.run(ask())} == {200}


def test_a_body_larger_than_a_window_goes_through(streams, contract):  # noqa: F811
    body = contract.to_request(tiny.rows(5000), "many")

    answer = streams.post("/v2/models/tiny/infer", json=body)

    assert len(answer.json()["outputs"][0]["data"]) == 5000


def test_what_is_no_http_ends_its_connection_only(front, streams):
    import socket

    with socket.create_connection(("127.0.0.1", front.port)) as strange:
        strange.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64)
        assert strange.recv(1 << 16)

    assert streams.get("/v2/health/live").status_code == 200


def test_nothing_of_http2_is_imported_unless_it_is_asked_for():
    source = (Path(__file__).parents[1] / "src/perennial/serving/host.py").read_text()

    head = source.split("class HostedModel")[0]
    assert "oneport" not in head and "h2" not in head


class Wire:
    """A client of one connection, whose bytes go nowhere but to the server beside it."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding=False))
        self.h2.initiate_connection()
        self.is_closed = False
        self.written = b""
        self.streams = Streams(app, self.call, set(), set())
        self.streams.connection_made(self)

    async def call(self, path: str, headers: Any, body: bytes) -> Any:
        raise RuntimeError("no call is expected")

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def ask(self, path: str, *headers: tuple[bytes, bytes], is_whole: bool = True) -> int:
        """Begin a request, and end it unless its body is to come."""
        number = self.h2.get_next_available_stream_id()
        told = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"a")]
        self.h2.send_headers(
            number, [*told, (b":path", path.encode()), *headers], end_stream=is_whole
        )
        self.streams.data_received(self.h2.data_to_send())
        return number

    def finish(self, number: int) -> None:
        """Send what is left of a body."""
        self.h2.send_data(number, b"rest", end_stream=True)
        self.streams.data_received(self.h2.data_to_send())

    def take(self, window: int) -> None:
        """Say how much of each answer is taken before more is asked for."""
        self.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.streams.data_received(self.h2.data_to_send())

    def frames(self) -> list[Frame]:
        """Everything that came back, one by one."""
        found, left = [], memoryview(self.written)
        while left:
            frame, length = Frame.parse_frame_header(left[:9])
            frame.parse_body(left[9 : 9 + length])
            found.append(frame)
            left = left[9 + length :]
        return found

    async def seen(self) -> list[Event]:
        """What came back when nothing is left to do."""
        events: list[Event] = []
        for _ in range(10):
            await asyncio.sleep(0)
            data, self.written = self.written, b""
            events += self.h2.receive_data(data)
            self.streams.data_received(self.h2.data_to_send())
        return events


def of(kind: type, events: list[Event]) -> list[int]:
    return [event.stream_id for event in events if isinstance(event, kind)]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An app that answers with a header of the request, unless it is to fail."""
    if scope["path"] == "/fail":
        raise RuntimeError("broken")
    told = dict(scope["headers"]).get(b"x-told", b"")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-told", told)]})
    await send({"type": "http.response.body", "body": told})


def test_a_stream_that_fails_is_reset_and_its_neighbours_are_answered():
    async def both() -> tuple[Wire, list[Event], int, int]:
        wire = Wire(echo)
        failing, well = wire.ask("/fail"), wire.ask("/well")
        return wire, await wire.seen(), failing, well

    wire, events, failing, well = asyncio.run(both())

    assert of(StreamReset, events) == [failing]
    assert of(StreamEnded, events) == [well]
    assert not wire.is_closed


def test_a_header_that_is_no_utf_8_reaches_the_app_byte_for_byte():
    async def asked() -> list[Event]:
        wire = Wire(echo)
        wire.ask("/well", (b"x-told", b"caf\xe9"))
        return await wire.seen()

    events = asyncio.run(asked())

    bodies = [event.data for event in events if isinstance(event, DataReceived)]
    assert b"".join(bodies) == b"caf\xe9"


def test_an_ending_connection_says_so_answers_what_came_and_refuses_what_comes():
    async def drained() -> tuple[Wire, int, int]:
        wire = Wire(echo)
        half = wire.ask("/well", is_whole=False)
        wire.streams.shutdown()
        late = wire.ask("/well")
        wire.finish(half)
        for _ in range(10):
            await asyncio.sleep(0)
        return wire, half, late

    wire, half, late = asyncio.run(drained())

    found = wire.frames()
    resets = [(f.stream_id, f.error_code) for f in found if isinstance(f, RstStreamFrame)]
    assert {f.last_stream_id for f in found if isinstance(f, GoAwayFrame)} == {half}
    assert resets == [(late, ErrorCodes.REFUSED_STREAM)]
    assert [f.stream_id for f in found if "END_STREAM" in f.flags] == [half]
    assert wire.is_closed


def test_an_ending_connection_does_not_wait_for_a_stream_that_its_client_gave_up():
    async def drained() -> Wire:
        wire = Wire(echo)
        half = wire.ask("/well", is_whole=False)
        wire.streams.shutdown()
        wire.h2.reset_stream(half)
        wire.streams.data_received(wire.h2.data_to_send())
        return wire

    assert asyncio.run(drained()).is_closed


def test_an_answer_goes_on_when_settings_alone_enlarge_its_window():
    async def asked() -> list[Event]:
        wire = Wire(echo)
        wire.take(2)
        wire.ask("/well", (b"x-told", b"much more"))
        events = await wire.seen()
        for window in (1, 100):
            wire.take(window)
            events += await wire.seen()
        return events

    events = asyncio.run(asked())

    bodies = [event.data for event in events if isinstance(event, DataReceived)]
    assert b"".join(bodies) == b"much more"
    assert of(StreamEnded, events) == [1]
