"""Which method does a gRPC message mean, and how is it answered without a server of its own?"""

import struct
from collections.abc import Mapping
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from google.protobuf.message_factory import GetMessageClass  # type: ignore[import-untyped]
from grpc import StatusCode  # type: ignore[import-untyped]

from perennial.serving.oneport import Answer, Headers

_HEAD = struct.Struct(">BI")


class Aborted(Exception):
    """A call that ends with another status than OK."""

    def __init__(self, code: Any, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


class Context:
    """What KServe's servicer asks of a call."""

    def __init__(self, headers: Headers) -> None:
        self._headers = headers

    def invocation_metadata(self) -> Headers:
        return [(k, v) for k, v in self._headers if not k.startswith(":")]

    async def abort(self, code: Any, details: str = "") -> None:
        raise Aborted(code, details)


class Calls:
    """The unary methods of one service."""

    def __init__(self, servicer: Any, service: Any, codes: Mapping[type, Any]) -> None:
        self._servicer = servicer
        self._service = service
        self._codes = codes

    async def __call__(self, path: str, headers: Headers, body: bytes) -> Answer:
        """Answer one call; its status stands in the trailers."""
        try:
            answer = await self._answer(path, headers, body)
        except Aborted as exc:
            return [], b"", _status(exc.code, exc.details)
        except Exception as exc:
            code = next((c for kind, c in self._codes.items() if isinstance(exc, kind)), None)
            if code is None:
                raise
            return [], b"", _status(code, str(exc))
        text = answer.SerializeToString()
        return [], _HEAD.pack(0, len(text)) + text, _status(StatusCode.OK, "")

    async def _answer(self, path: str, headers: Headers, body: bytes) -> Any:
        service, _, name = path.strip("/").partition("/")
        method = self._service.methods_by_name.get(name)
        if service != self._service.full_name or method is None or method.server_streaming:
            raise Aborted(StatusCode.UNIMPLEMENTED, f"no such method here: {path[:100]}")
        request = _message(GetMessageClass(method.input_type), body)
        return await getattr(self._servicer, name)(request, Context(headers))


def _message(kind: Any, body: bytes) -> Any:
    if len(body) < _HEAD.size:
        raise Aborted(StatusCode.INVALID_ARGUMENT, "the message is cut off")
    compressed, length = _HEAD.unpack_from(body)
    if compressed:
        raise Aborted(StatusCode.UNIMPLEMENTED, "compressed messages are not supported")
    if length != len(body) - _HEAD.size:
        raise Aborted(StatusCode.INVALID_ARGUMENT, "wanted one whole message")
    try:
        return kind.FromString(body[_HEAD.size :])
    except DecodeError as exc:
        raise Aborted(StatusCode.INVALID_ARGUMENT, "the message cannot be read") from exc


def _status(code: Any, details: str) -> Headers:
    told = [("grpc-status", str(code.value[0]))]
    return told + ([("grpc-message", _quoted(details))] if details else [])


def _quoted(text: str) -> str:
    """Percent-encoded, as a header of ASCII wants it."""
    plain = (chr(b) if 32 <= b < 127 and b != 37 else f"%{b:02X}" for b in text.encode()[:2000])
    return "".join(plain)
