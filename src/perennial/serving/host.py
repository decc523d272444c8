"""How does KServe's ModelServer host one of our models, on one address, with strict requests?"""

import argparse
import asyncio
import logging
import signal
import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from grpc import StatusCode, aio  # type: ignore[import-untyped]

from perennial.contract import OUTPUT
from perennial.drift import light
from perennial.errors import Unavailable
from perennial.serving import wire
from perennial.serving.door import Door, verdict
from perennial.serving.service import Service, count, declare
from perennial.serving.wire import Answer, Ask, Refused

# KServe's package imports a client of the Kubernetes API, which no server uses: over a second.
light.package("kserve")

from kserve import model_server  # noqa: E402
from kserve.errors import (  # noqa: E402
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    ServerNotLive,
    ServerNotReady,
)
from kserve.model import Model  # noqa: E402
from kserve.predictor_config import PredictorConfig  # noqa: E402
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb  # noqa: E402
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as rpc  # noqa: E402
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor  # noqa: E402
from kserve.protocol.grpc.servicer import InferenceServicer  # noqa: E402
from kserve.protocol.rest.server import RESTServer  # noqa: E402

log = logging.getLogger("perennial.serving")

GRACE_S = 2

_CODES = {
    400: StatusCode.INVALID_ARGUMENT,
    404: StatusCode.NOT_FOUND,
    413: StatusCode.RESOURCE_EXHAUSTED,
    415: StatusCode.INVALID_ARGUMENT,
    503: StatusCode.UNAVAILABLE,
}


_ERRORS: dict[type, StatusCode] = {
    InvalidInput: StatusCode.INVALID_ARGUMENT,
    ModelNotFound: StatusCode.NOT_FOUND,
    **dict.fromkeys((ModelNotReady, ServerNotReady, ServerNotLive), StatusCode.UNAVAILABLE),
}


class HostedModel(Model):
    """A service in the shape that KServe's server and its histograms know."""

    def __init__(self, service: Service) -> None:
        super().__init__(service.name)
        self._service = service
        self.ready = True

    def get_input_types(self) -> list[dict[str, Any]]:
        return self._service.metadata()[0]

    def get_output_types(self) -> list[dict[str, Any]]:
        return self._service.metadata()[1]

    def validate(self, payload: Any) -> Any:
        return payload

    async def preprocess(self, payload: Any, headers: Any = None) -> Any:
        """Check a request against the contract."""
        if not isinstance(payload, Ask):
            raise InvalidInput(  # type: ignore[no-untyped-call]
                f"wanted a V2 request: POST /v2/models/{self.name}/infer"
            )
        return self._service.read(payload)

    async def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
        return await self._service.answer(payload, headers or {})

    async def infer(self, ask: Ask, headers: Mapping[str, str]) -> Answer:
        """One inference, with KServe's latency histograms around its steps."""
        call: Any = self
        answer: Answer = (await call(ask, headers=dict(headers)))[0]
        return answer


class Servicer(InferenceServicer):
    """KServe's gRPC service with our own inference, and with a repository nobody can change."""

    def __init__(self, server: "Server") -> None:
        super().__init__(server.dataplane, server.model_repository_extension)
        self._model = server.model

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """Answer one inference; the status code says whose fault a failure is."""
        began = time.perf_counter()
        try:
            answer = await self._infer(request, context)
        except Exception as exc:
            status, sentence = verdict(self._model.name, exc, began)
            await context.abort(_CODES.get(status, StatusCode.INTERNAL), sentence)
        count(self._model.name, "ok", time.perf_counter() - began)
        return answer

    async def _infer(self, request: Any, context: Any) -> Any:
        if request.model_name != self._model.name:
            raise Refused(404, f"no such model here, wanted {self._model.name}")
        ask = wire.read_grpc(request)
        headers = {k: v for k, v in context.invocation_metadata() or () if isinstance(v, str)}
        return _message(await self._model.infer(ask, headers), binary=ask.binary)

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        await _refuse(context)

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        await _refuse(context)


class Server(model_server.ModelServer):
    """KServe's ModelServer, listening on one address only."""

    def __init__(self, service: Service, args: argparse.Namespace) -> None:
        super().__init__(
            http_port=args.http_port,
            grpc_port=args.grpc_port,
            workers=1,  # several would each cut their own windows
            enable_grpc=args.enable_grpc,
            enable_latency_logging=False,
            event_loop=args.event_loop,
            timeout_keep_alive=args.timeout_keep_alive,
            grace_period=GRACE_S,
            predictor_config=_predictor_config(args),
        )
        self.model = HostedModel(service)
        self._host = args.host
        self._kwargs = vars(args)

    def start(self, models: Any = None) -> None:
        """Listen, and return after SIGTERM when what was begun is answered."""
        listening = _listen(self._host, self.http_port)
        self._register_and_check_atleast_one_model_is_ready([self.model])
        rest = self._rest()
        with asyncio.Runner(loop_factory=rest.config.get_loop_factory()) as runner:
            runner.run(self._live(rest, listening))

    def _rest(self) -> uvicorn.Server:
        rest = RESTServer(
            "kserve.model_server:app",
            self.dataplane,
            self.model_repository_extension,
            self.http_port,
            event_loop=self.event_loop,
            timeout_keep_alive=self.timeout_keep_alive,
            grace_period=GRACE_S,
        )
        rest.create_application()  # type: ignore[no-untyped-call]
        rest.config.app = Door(model_server.app, self.model.name, self.model.infer)
        if self._kwargs.get("one_port"):
            either: Any = self._either
            rest.config.http = either
        _quiet()
        return rest._server

    def _either(self, config: uvicorn.Config, server_state: Any, **more: Any) -> Any:
        """A connection by which both REST and gRPC may come."""
        from uvicorn.protocols.http import auto

        from perennial.serving.calls import Calls
        from perennial.serving.oneport import OnePort, Streams

        service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
        calls = Calls(Servicer(self), service, _ERRORS)
        app, state = config.loaded_app, server_state
        plain: Any = auto.AutoHTTPProtocol
        return OnePort(
            lambda: plain(config=config, server_state=state, **more),
            lambda: Streams(app, calls, state.connections, state.tasks),
        )

    async def _live(self, rest: uvicorn.Server, listening: socket.socket) -> None:
        grpc = await self._grpc() if self.enable_grpc else None
        # uvicorn raises a signal again when it is done with it: this must not end the process.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(rest, "should_exit", True))
        log.info("serving model=%s address=%s:%d", self.model.name, *listening.getsockname()[:2])
        await rest.serve(sockets=[listening])
        if grpc:
            await grpc.stop(GRACE_S)

    async def _grpc(self) -> aio.Server:
        sizes = ("grpc_max_send_message_length", "grpc_max_receive_message_length")
        server = aio.server(
            ThreadPoolExecutor(self.max_threads),
            interceptors=(ExceptionToStatusInterceptor(),),
            options=[(s.replace("grpc_", "grpc.", 1), self._kwargs[s]) for s in sizes],
        )
        register: Any = rpc.add_GRPCInferenceServiceServicer_to_server
        register(Servicer(self), server)
        try:
            server.add_insecure_port(f"{self._host}:{self.grpc_port}")
        except RuntimeError as exc:
            raise _taken(self._host, self.grpc_port) from exc
        await server.start()
        return server


def parse(name: str, own: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Read our options together with those of KServe, which its controller injects."""
    parser = argparse.ArgumentParser(
        prog=f"perennial.serving.{name}", parents=[model_server.parser, own], allow_abbrev=False
    )
    return parser.parse_args(argv)


def serve(service: Service, args: argparse.Namespace) -> int:
    """Host a service until SIGTERM. Raises Unavailable when a port is taken."""
    declare(service.name)
    try:
        Server(service, args).start()
    finally:
        service.stop()
    return 0


def _predictor_config(args: argparse.Namespace) -> PredictorConfig:
    return PredictorConfig(
        predictor_host=args.predictor_host,
        predictor_protocol="v2",
        predictor_use_ssl=args.predictor_use_ssl,
        predictor_request_timeout_seconds=args.predictor_request_timeout_seconds,
        predictor_request_retries=args.predictor_request_retries,
        predictor_health_check=args.enable_predictor_health_check,
    )


def _message(answer: Answer, *, binary: bool) -> Any:
    output: Any = {"name": OUTPUT, "datatype": "FP64", "shape": [len(answer.scores)]}
    raw = []
    if binary:
        raw = [answer.scores.astype("<f8").tobytes()]
    else:
        output["contents"] = {"fp64_contents": answer.scores.tolist()}
    parameters = {k: pb.InferParameter(string_param=v) for k, v in answer.parameters.items()}
    return pb.ModelInferResponse(
        model_name=answer.model_name,
        id=answer.id,
        parameters=parameters,
        outputs=[output],
        raw_output_contents=raw,
    )


async def _refuse(context: Any) -> None:
    sentence = "models are loaded by a rollout, not by a request"
    await context.abort(StatusCode.UNIMPLEMENTED, sentence)


def _quiet() -> None:
    """Keep lines that come with every request or probe out of the log."""
    access = logging.getLogger("uvicorn.access")
    access.handlers, access.propagate = [], False
    logging.getLogger("kserve.trace").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as exc:
        listening.close()
        raise _taken(host, port) from exc
    return listening


def _taken(host: str, port: int) -> Unavailable:
    return Unavailable(f"{host}:{port} cannot be listened on; give another port or end its owner")
