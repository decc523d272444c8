"""Which requests reach the model over HTTP, and what do the others hear?"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import orjson

from perennial.errors import BadInput
from perennial.serving import wire
from perennial.serving.service import InvalidOutput, count
from perennial.serving.wire import Answer, Ask, Refused

log = logging.getLogger("perennial.serving")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Handler = Callable[[Ask, Mapping[str, str]], Awaitable[Answer]]

# Above this, reading a body would keep the loop from answering a liveness probe.
_LARGE = 256 << 10


class Door:
    """Answers inference itself and lets KServe's app answer health, metadata and metrics."""

    def __init__(self, app: App, name: str, infer: Handler) -> None:
        self._app = app
        self._name = name
        self._infer = infer
        self._path = f"/v2/models/{name}/infer"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "http" and scope["path"] == self._path and scope["method"] == "POST":
            await self._answer(scope, receive, send)
        elif scope["type"] == "http" and (refusal := self._refusal(scope)):
            await _send(send, refusal.status, {}, _error(str(refusal)))
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refused | None:
        path, method = scope["path"], scope["method"]
        if path == self._path:
            return Refused(405, f"{method} is not allowed here, send POST")
        if method in ("GET", "HEAD") and "/versions/" not in path:
            return None
        # Loading and unloading over the data port would let any client stop the model.
        return Refused(404, f"nothing answers {method} there, wanted POST {self._path}")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        status, extra, body = await self._outcome(headers, receive)
        await _send(send, status, extra, body)

    async def _outcome(
        self, headers: Mapping[str, str], receive: Receive
    ) -> tuple[int, Mapping[str, str], bytes]:
        began = time.perf_counter()
        try:
            body = await _body(headers, receive)
            ask = await _read(headers, body)
            answer = await self._infer(ask, headers)
        except Exception as exc:
            status, sentence = verdict(self._name, exc, began)
            return status, {}, _error(sentence)
        count(self._name, "ok", time.perf_counter() - began)
        return 200, *wire.write_rest(answer, binary=ask.binary)


def verdict(name: str, exc: Exception, began: float) -> tuple[int, str]:
    """Status and sentence of a failed request; counts who caused it, logs what is ours."""
    cause, status, sentence = _judge(exc)
    count(name, cause, time.perf_counter() - began)
    if cause == "platform":
        log.error("request failed model=%s status=%d", name, status, exc_info=exc)
    return status, sentence


def _judge(exc: Exception) -> tuple[str, int, str]:
    if isinstance(exc, BadInput):
        return "client", 400, str(exc)
    if isinstance(exc, Refused):
        return "client" if exc.status < 500 else "platform", exc.status, str(exc)
    if isinstance(exc, InvalidOutput):
        return "model", 500, str(exc)
    return "platform", 500, "the server failed to answer; its log says why"


async def _body(headers: Mapping[str, str], receive: Receive) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadInput("the client left before its body was complete")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > wire.MAX_BODY:
            raise Refused(413, f"the body is larger than {wire.MAX_BODY} bytes, send fewer rows")
        more = message.get("more_body", False)
    return b"".join(parts)


async def _read(headers: Mapping[str, str], body: bytes) -> Ask:
    if len(body) <= _LARGE:
        return wire.read_rest(headers, body)
    return await asyncio.to_thread(wire.read_rest, headers, body)


def _error(sentence: str) -> bytes:
    return orjson.dumps({"error": sentence})


async def _send(send: Send, status: int, headers: Mapping[str, str], body: bytes) -> None:
    told = {"content-type": "application/json", **headers, "content-length": str(len(body))}
    encoded = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in told.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
