"""Check requests, hand them to the predictor beside, and watch what was served for drift."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from perennial import bundle, signing
from perennial.bundle import Parts
from perennial.contract import Contract, Tensor
from perennial.drift import detectors
from perennial.drift.segments import Writer
from perennial.drift.windows import Served
from perennial.errors import BadInput
from perennial.project import parse_moment
from perennial.serving import lookup, options, wire
from perennial.serving.lookup import Lookup
from perennial.serving.outbox import Announcer, Outbox, Silence
from perennial.serving.service import INVALID_OUTPUT, InvalidOutput, Question, probabilities
from perennial.serving.watcher import Watcher
from perennial.serving.wire import Answer, Ask, Refused

EVENT_TIME = "event_time"
_YEARS = (1970, 2199)
_AHEAD = timedelta(minutes=5)
_FORWARDED = ("x-request-id", "traceparent")
_CONNECTIONS = 64
_LOOKUP_S = 2.0
_START_S = 120.0  # of a feature server beside this one


class Transformer:
    """The predictor as a service, with its traffic watched."""

    def __init__(
        self,
        name: str,
        contract: Contract,
        client: httpx.AsyncClient,
        watcher: Watcher,
        told: Mapping[str, str],
        now: Callable[[], datetime],
        lookup: Lookup | None = None,
    ) -> None:
        self.name = name
        self._contract = contract
        self._client = client
        self._watcher = watcher
        self._told = told
        self._now = now
        self._lookup = lookup

    def metadata(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Inputs and outputs, from the contract."""
        return self._contract.metadata()

    def read(self, ask: Ask) -> Question:
        """Check a request, its event time included, before the predictor sees it."""
        event_time(ask, self._now)
        if self._is_key(ask):
            return Question(ask, np.empty((0, len(self._contract.names))))
        return Question(ask, self._contract.decode(ask.tensors))

    async def answer(self, question: Question, headers: Mapping[str, str]) -> Answer:
        """Ask the predictor, and leave a copy of rows and scores to the watcher."""
        if self._is_key(question.ask):
            question = await self._looked_up(question.ask)
        ask = question.ask
        scores = probabilities(self.name, await self._scores(question, headers))
        moment = event_time(ask, self._now)
        self._watcher.offer(Served(moment, ask.id, question.matrix, scores))
        return Answer(ask.id, self.name, scores, self._told)

    def _is_key(self, ask: Ask) -> bool:
        """Does the request name entities only, whose features are to be looked up?"""
        names = [tensor.name for tensor in ask.tensors]
        return self._lookup is not None and names == [self._lookup.key]

    async def _looked_up(self, ask: Ask) -> Question:
        assert self._lookup is not None
        keys = lookup.keys(ask.tensors[0])
        rows = await self._lookup.rows(keys, event_time(ask, self._now))
        body = self._contract.to_request(rows, ask.id)
        tensors = tuple(
            Tensor(one["name"], one["datatype"], tuple(one["shape"]), one["data"])
            for one in body["inputs"]
        )
        filled = replace(ask, tensors=tensors)
        return Question(filled, self._contract.decode(tensors))

    async def _scores(self, question: Question, headers: Mapping[str, str]) -> Any:
        sent = {k: headers[k] for k in _FORWARDED if k in headers}
        try:
            found = await self._client.post(
                f"/v2/models/{self.name}/infer",
                content=wire.forward(question.ask),
                headers={"content-type": "application/json", **sent},
            )
        except httpx.HTTPError as exc:
            raise Refused(503, "the predictor does not answer, try again") from exc
        if found.status_code == 200:
            return wire.read_scores(found.content, len(question.matrix))
        raise _refusal(found)

    def stop(self) -> None:
        """Write the open window."""
        self._watcher.finish()


def event_time(ask: Ask, now: Callable[[], datetime]) -> datetime:
    """When a request's rows happened: its parameter ``event_time``, else now. Raises BadInput."""
    given = ask.parameters.get(EVENT_TIME)
    if given is None:
        return now()
    try:
        moment = parse_moment(given) if isinstance(given, str) else None
    except (ValueError, OverflowError):
        moment = None
    if moment is None or not _YEARS[0] <= moment.year <= _YEARS[1]:
        raise BadInput(
            f"parameters.{EVENT_TIME} is {ascii(str(given)[:64])},"
            " wanted a time such as 2011-06-01T12:00:00+00:00"
        )
    # Windows and cooldown follow this time: a far one would silence both for years.
    if moment > now() + _AHEAD:
        raise BadInput(f"parameters.{EVENT_TIME} lies in the future, wanted at most now")
    return moment


def _refusal(found: httpx.Response) -> Exception:
    if INVALID_OUTPUT in found.text:
        return InvalidOutput(INVALID_OUTPUT)
    if found.status_code == 503:
        return Refused(503, "the predictor is not ready, try again")
    if 400 <= found.status_code < 500:
        # What passed our contract must pass the predictor's: its bundle is another one.
        return RuntimeError(f"the predictor refused with {found.status_code}: {found.text[:300]}")
    return Refused(500, "the predictor failed to answer; its log says why")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(parents=[options.shared()], add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--segments", default="/tmp/segments", help="Folder for served rows, a path or a URI."
    )
    parser.add_argument(
        "--one_port",
        type=lambda text: text == "true",
        default=False,
        help="true: take gRPC on the HTTP port too, over HTTP/2.",
    )
    parser.add_argument("--sink", default="", help="URL that takes drift events; empty: nobody.")
    parser.add_argument("--key", type=Path, help="File with the key that signs events.")
    parser.add_argument(
        "--features", default="", help="URL of the feature server; empty: requests bring features."
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM."""
    return options.guarded(lambda: _serve(sys.argv[1:] if argv is None else argv))


def _serve(argv: Sequence[str]) -> int:
    given, _ = _options().parse_known_args(argv)
    with options.bundle_folder(given.bundle) as folder:
        parts = bundle.parts(folder, given.digest or None)
    key = signing.read_key(given.key) if given.key else None
    watcher = _watcher(parts, given, key)

    from perennial.serving import host

    args = host.parse("transformer", _options(), argv)
    if not args.predictor_host:
        raise BadInput("--predictor_host is missing, wanted such as 127.0.0.1:8085")
    service = Transformer(
        args.model_name,
        Contract.from_plain(parts.contract),
        _client(args),
        watcher,
        {"model_digest": parts.short, "revision": args.revision},
        _now,
        _lookup(parts, args.features),
    )
    watcher.start()
    return host.serve(service, args)


def _watcher(parts: Parts, given: argparse.Namespace, key: bytes | None) -> Watcher:
    names = [f["name"] for f in parts.contract["features"]]
    announcer: Announcer = Outbox(given.sink, key, _now) if given.sink else Silence()
    writer = Writer.new(given.segments, given.revision or "model", names)
    return Watcher(parts.project, detectors.watch(parts), writer, announcer, _now)


def _lookup(parts: Parts, url: str) -> Lookup | None:
    if not url:
        return None
    limits = httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
    client = httpx.AsyncClient(base_url=url, timeout=_LOOKUP_S, limits=limits, trust_env=False)
    return Lookup(client, parts.project, lookup.connect(url, patience_s=_START_S))


def _client(args: argparse.Namespace) -> httpx.AsyncClient:
    scheme = "https" if args.predictor_use_ssl else "http"
    limits = httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
    return httpx.AsyncClient(
        base_url=f"{scheme}://{args.predictor_host}",
        timeout=args.predictor_request_timeout_seconds,
        limits=limits,
        trust_env=False,
    )


def _now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    sys.exit(main())
