"""How do REST and gRPC share one port? HTTP/1.1 as ever, HTTP/2 by streams, calls by content type.

A Knative service has one port; named ``h2c``, everything comes there as HTTP/2 without TLS.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from hyperframe.frame import GoAwayFrame

from perennial.serving.wire import MAX_BODY

log = logging.getLogger("perennial.serving")

PREFACE = b"PRI * HTTP/2.0"
CALL = "application/grpc"
# Headers of a connection, which HTTP/2 forbids.
_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"upgrade"}

Headers = list[tuple[str, str]]
Answer = tuple[Headers, bytes, Headers]
Calls = Callable[[str, Headers, bytes], Awaitable[Answer]]


@dataclass
class _Stream:
    headers: Headers
    body: bytearray = field(default_factory=bytearray)

    def told(self, name: str) -> str:
        return next((value for key, value in self.headers if key == name), "")


class OnePort(asyncio.Protocol):
    """A connection whose first bytes say which protocol it speaks."""

    def __init__(self, plain: Callable[[], Any], streams: Callable[[], Any]) -> None:
        self._plain = plain
        self._streams = streams
        self._inner: Any = None
        self._first = b""
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._inner is not None:
            self._inner.data_received(data)
            return
        self._first += data
        if PREFACE.startswith(self._first):
            return
        self._inner = (self._streams if self._first.startswith(PREFACE) else self._plain)()
        self._inner.connection_made(self._transport)
        self._inner.data_received(self._first)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._inner is not None:
            self._inner.connection_lost(exc)

    def eof_received(self) -> None:
        if self._inner is not None:
            self._inner.eof_received()

    def pause_writing(self) -> None:
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._inner is not None:
            self._inner.resume_writing()


class Streams(asyncio.Protocol):
    """One HTTP/2 connection: calls go to ``calls``, everything else to the ASGI app."""

    def __init__(self, app: Any, calls: Calls, connections: set[Any], tasks: set[Any]) -> None:
        self._app = app
        self._calls = calls
        self._connections = connections
        self._tasks = tasks
        self._h2 = H2Connection(H2Configuration(client_side=False, header_encoding=False))
        self._open: dict[int, _Stream] = {}
        self._mine: dict[int, asyncio.Task[None]] = {}
        self._room = asyncio.Event()
        self._transport: Any = None
        self._last: int | None = None  # stream that is still answered, once this ends

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._connections.add(self)
        self._h2.initiate_connection()
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._room.set()
        for task in self._mine.values():
            task.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            for event in self._h2.receive_data(data):
                self._take(event)
        except ProtocolError:
            self._transport.close()
        self._flush()

    def eof_received(self) -> None:
        """The client has nothing more to say."""

    def pause_writing(self) -> None:
        """What is written is bounded by HTTP/2's own windows."""

    def resume_writing(self) -> None:
        """What is written is bounded by HTTP/2's own windows."""

    def shutdown(self) -> None:
        """Take no new stream, and end when those that came are answered."""
        if self._last is None:
            self._last = self._h2.highest_inbound_stream_id
            # Said by h2 itself, this would end what is not answered yet.
            self._write(GoAwayFrame(last_stream_id=self._last).serialize())
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._last is None or self._mine or self._open:
            return
        self._h2.close_connection(last_stream_id=self._last)
        self._flush()
        self._transport.close()

    def _take(self, event: Event) -> None:
        if isinstance(event, RequestReceived):
            self._accept(event)
        elif isinstance(event, DataReceived):
            self._add(event)
        elif isinstance(event, StreamEnded):
            self._begin(event.stream_id)
        elif isinstance(event, WindowUpdated | RemoteSettingsChanged):
            self._room.set()
        elif isinstance(event, StreamReset):
            self._forget(event.stream_id)
        elif isinstance(event, ConnectionTerminated):
            self._transport.close()

    def _accept(self, event: RequestReceived) -> None:
        if self._last is None:
            self._open[event.stream_id] = _Stream(_read(event.headers))
        else:
            # Sent before the client read that this is ending: it may safely ask elsewhere.
            self._h2.reset_stream(event.stream_id, ErrorCodes.REFUSED_STREAM)

    def _add(self, event: DataReceived) -> None:
        self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        stream = self._open.get(event.stream_id)
        # One byte more than allowed is kept, so that who answers sees that it is too much.
        if stream is not None and len(stream.body) <= MAX_BODY:
            stream.body += event.data

    def _begin(self, number: int) -> None:
        stream = self._open.pop(number, None)
        if stream is None:
            return
        is_call = stream.told("content-type").startswith(CALL)
        work = self._call(number, stream) if is_call else self._ask(number, stream)
        task = asyncio.get_running_loop().create_task(work)
        self._mine[number] = task
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._done(number, done))

    def _done(self, number: int, task: asyncio.Task[None]) -> None:
        self._mine.pop(number, None)
        self._tasks.discard(task)
        if not task.cancelled() and task.exception():
            log.error("stream failed", exc_info=task.exception())
            self._reset(number)
        self._end_if_idle()

    def _reset(self, number: int) -> None:
        """End one stream, which others of its connection need not notice."""
        # What is answered already, or gone with its connection, has nothing to be ended.
        with suppress(ProtocolError):
            self._h2.reset_stream(number, ErrorCodes.INTERNAL_ERROR)
        self._flush()

    def _forget(self, number: int) -> None:
        self._open.pop(number, None)
        if task := self._mine.get(number):
            task.cancel()
        self._end_if_idle()

    async def _call(self, number: int, stream: _Stream) -> None:
        answer = await self._calls(stream.told(":path"), stream.headers, bytes(stream.body))
        headers, body, trailers = answer
        self._h2.send_headers(number, [(":status", "200"), ("content-type", CALL), *headers])
        await self._send(number, body)
        self._h2.send_headers(number, trailers, end_stream=True)
        self._flush()

    async def _ask(self, number: int, stream: _Stream) -> None:
        bodies = iter([{"type": "http.request", "body": bytes(stream.body), "more_body": False}])

        async def receive() -> Any:
            return next(bodies, {"type": "http.disconnect"})

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._h2.send_headers(number, _told(message))
                return
            await self._send(number, message.get("body", b""))
            if not message.get("more_body", False):
                self._h2.end_stream(number)
                self._flush()

        await self._app(_scope(stream), receive, send)

    async def _send(self, number: int, body: bytes) -> None:
        """Write a body, no faster than the client takes it."""
        left = memoryview(body)
        while left:
            # A client that makes its windows smaller may leave less than none.
            window = max(0, self._h2.local_flow_control_window(number))
            room = min(window, self._h2.max_outbound_frame_size)
            if room:
                self._h2.send_data(number, bytes(left[:room]))
                left = left[room:]
            self._flush()
            if not room:
                self._room.clear()
                await self._room.wait()

    def _flush(self) -> None:
        self._write(self._h2.data_to_send())

    def _write(self, data: bytes) -> None:
        if data and not self._transport.is_closing():
            self._transport.write(data)


def _read(headers: Iterable[Any]) -> Headers:
    """Headers as text; each byte means one character, so that none of them is a fault."""
    return [(k.decode("latin-1"), v.decode("latin-1")) for k, v in headers]


def _told(message: Any) -> list[tuple[bytes, bytes]]:
    pairs = [(k.lower(), v) for k, v in message["headers"]]
    status = (b":status", str(message["status"]).encode())
    return [status, *((k, v) for k, v in pairs if k not in _HOP)]


def _scope(stream: _Stream) -> dict[str, Any]:
    path, _, query = stream.told(":path").partition("?")
    plain = [pair for pair in stream.headers if not pair[0].startswith(":")]
    headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in plain]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "2",
        "method": stream.told(":method"),
        "scheme": stream.told(":scheme") or "http",
        "path": path,
        "raw_path": path.encode("latin-1"),
        "query_string": query.encode("latin-1"),
        "root_path": "",
        "headers": [*headers, (b"host", stream.told(":authority").encode("latin-1"))],
        "client": None,
        "server": None,
    }
