"""What Envoy is told: the one listener, its guard, its routes and its clusters, as plain dicts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Config = dict[str, Any]

CDS, LDS, RDS = "cds.json", "lds.json", "rds.json"
BOOTSTRAP = "bootstrap.json"
LOOPBACK = "127.0.0.1"

MAX_BODY = 1 << 20
MAX_CONNECTIONS = 500
MAX_IN_FLIGHT = 64
INFER_TIMEOUT = "5s"
PROBE_TIMEOUT = "2s"
# Shorter than the 65 s of KServe, which could else close a connection just as a request takes it.
IDLE_TIMEOUT = "30s"
# Fine enough that a p95 between two bounds is off by a few percent only.
LATENCY_BOUNDS_MS = (
    *(1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 18, 22, 27, 33, 40, 50, 60, 75, 90, 110, 135, 165, 200),
    *(250, 300, 370, 450, 550, 670, 820, 1000, 1500, 2000, 3000, 5000, 10000),
)
GRPC_SERVICE = "inference.GRPCInferenceService"
GRPC_PROBES = ("ServerLive", "ServerReady", "ModelReady", "ModelMetadata")

_TYPES = "type.googleapis.com/envoy"
_HTTP = f"{_TYPES}.extensions.filters.http"


@dataclass(frozen=True)
class Ports:
    """Where a revision listens on loopback."""

    rest: int
    grpc: int


def cluster_name(model: str, revision: str, *, grpc: bool = False, probe: bool = False) -> str:
    """Clusters are apart by protocol, and probes are apart so that they never count as evidence."""
    return f"{model}-{revision}" + ("-grpc" if grpc else "") + ("-probe" if probe else "")


def bootstrap(folder: Path, admin_port: int) -> Config:
    """Where Envoy finds the rest; all else is read from ``folder`` whenever a file is renamed."""
    return {
        "node": {"id": "edge", "cluster": "perennial"},
        "admin": {"address": _address(admin_port)},
        "dynamic_resources": {
            "cds_config": _source(folder, CDS),
            "lds_config": _source(folder, LDS),
        },
        "stats_config": {
            "histogram_bucket_settings": [
                {"match": {"suffix": "upstream_rq_time"}, "buckets": list(LATENCY_BOUNDS_MS)}
            ]
        },
        # Latencies become readable at a flush; the judge must not wait five seconds for one.
        "stats_flush_interval": "0.1s",
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": f"{_TYPES}.extensions.resource_monitors.downstream_connections.v3"
                        ".DownstreamConnectionsConfig",
                        "max_active_downstream_connections": MAX_CONNECTIONS,
                    },
                }
            ]
        },
    }


def listener(folder: Path, port: int) -> Config:
    """The only socket that a client sees."""
    manager = {
        "@type": f"{_TYPES}.extensions.filters.network.http_connection_manager.v3"
        ".HttpConnectionManager",
        "stat_prefix": "edge",
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "request_headers_timeout": "5s",
        "request_timeout": "10s",
        "stream_idle_timeout": "30s",
        "max_request_headers_kb": 16,
        "common_http_protocol_options": {
            "headers_with_underscores_action": "REJECT_REQUEST",
            "idle_timeout": "60s",
        },
        "http2_protocol_options": {"max_concurrent_streams": 100},
        "http_filters": [_grpc_stats(), _body_limit(), _router()],
        "rds": {"route_config_name": "edge", "config_source": _source(folder, RDS)},
    }
    return {
        "@type": f"{_TYPES}.config.listener.v3.Listener",
        "name": "edge",
        "address": _address(port),
        # Else a second edge could share the port, and half of the requests.
        "enable_reuse_port": False,
        "per_connection_buffer_limit_bytes": MAX_BODY,
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "envoy.filters.network.http_connection_manager",
                        "typed_config": manager,
                    }
                ]
            }
        ],
    }


def clusters(model: str, revisions: Mapping[str, Ports]) -> list[Config]:
    """Four clusters a revision: REST and gRPC, predictions and probes."""
    return [
        _cluster(cluster_name(model, revision, grpc=grpc, probe=probe), ports, grpc)
        for revision, ports in revisions.items()
        for grpc in (False, True)
        for probe in (False, True)
    ]


def routes(model: str, weights: Mapping[str, int]) -> Config:
    """What may be asked for, and who answers it; anything else is not found."""
    return {
        "@type": f"{_TYPES}.config.route.v3.RouteConfiguration",
        "name": "edge",
        # Without it a route to an unknown cluster is taken over and answers 503.
        "validate_clusters": True,
        "virtual_hosts": [
            {
                "name": "edge",
                "domains": ["*"],
                "routes": [*_allowed(model, weights), {**_prefix("/"), **_answer(404)}],
            }
        ],
    }


def _allowed(model: str, weights: Mapping[str, int]) -> list[Config]:
    infer = {"path": f"/v2/models/{model}/infer"}
    probe_paths = (f"/v2/models/{model}", f"/v2/models/{model}/ready")
    probes = [{"path": p} for p in (*probe_paths, "/v2/health/live", "/v2/health/ready")]
    calls = [{"path": f"/{GRPC_SERVICE}/{m}", "grpc": {}} for m in GRPC_PROBES]
    predict = {"path": f"/{GRPC_SERVICE}/ModelInfer", "grpc": {}}
    shares = {revision: percent for revision, percent in weights.items() if percent}
    if not shares:
        matches = [infer, *probes, predict, *calls]
        return [{"match": m, **_answer(503, "no model serves yet")} for m in matches]
    # Probes ask the revision with the larger share: how a canary fares is the judge's business.
    main = max(shares, key=lambda revision: shares[revision])
    return [
        _split(infer, model, shares, grpc=False),
        *[_to(m, cluster_name(model, main, probe=True), main) for m in probes],
        _split(predict, model, shares, grpc=True),
        *[_to(m, cluster_name(model, main, grpc=True, probe=True), main) for m in calls],
    ]


def _split(match: Config, model: str, shares: Mapping[str, int], *, grpc: bool) -> Config:
    arms = [
        {
            "name": cluster_name(model, revision, grpc=grpc),
            "weight": percent,
            "response_headers_to_add": [_revision_header(revision)],
        }
        for revision, percent in shares.items()
    ]
    route = {
        "weighted_clusters": {"clusters": arms},
        "timeout": INFER_TIMEOUT,
        # A revision that is gone, or goes meanwhile, is tried elsewhere: a prediction changes
        # nothing. One that answers, in whatever way, is never asked twice.
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream,reset",
            "num_retries": 6,
            "refresh_cluster_on_retry": True,
            "retry_back_off": {"base_interval": "0.01s", "max_interval": "0.1s"},
        },
    }
    return {"match": match, "route": route}


def _to(match: Config, cluster: str, revision: str) -> Config:
    return {
        "match": match,
        "route": {"cluster": cluster, "timeout": PROBE_TIMEOUT},
        "response_headers_to_add": [_revision_header(revision)],
    }


def _revision_header(revision: str) -> Config:
    return {
        "header": {"key": "x-revision", "value": revision},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
    }


def _prefix(path: str) -> Config:
    return {"match": {"prefix": path}}


def _answer(status: int, text: str = "") -> Config:
    body = {"body": {"inline_string": f'{{"error": "{text}"}}'}} if text else {}
    return {"direct_response": {"status": status, **body}}


def _cluster(name: str, ports: Ports, grpc: bool) -> Config:
    endpoint = {"endpoint": {"address": _address(ports.grpc if grpc else ports.rest)}}
    limit = {
        "max_connections": MAX_IN_FLIGHT,
        "max_pending_requests": MAX_IN_FLIGHT,
        "max_requests": MAX_IN_FLIGHT,
        "max_retries": MAX_IN_FLIGHT,
    }
    return {
        "@type": f"{_TYPES}.config.cluster.v3.Cluster",
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "circuit_breakers": {"thresholds": [limit]},
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": _protocol(grpc)
        },
    }


def _protocol(grpc: bool) -> Config:
    options = "http2_protocol_options" if grpc else "http_protocol_options"
    return {
        "@type": f"{_TYPES}.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {options: {}},
        "common_http_protocol_options": {"idle_timeout": IDLE_TIMEOUT},
    }


def _grpc_stats() -> Config:
    """A failed gRPC call is HTTP 200; this counts its real status for each cluster."""
    method = {"name": GRPC_SERVICE, "method_names": ["ModelInfer"]}
    return {
        "name": "envoy.filters.http.grpc_stats",
        "typed_config": {
            "@type": f"{_HTTP}.grpc_stats.v3.FilterConfig",
            "individual_method_stats_allowlist": {"services": [method]},
        },
    }


def _body_limit() -> Config:
    return {
        "name": "envoy.filters.http.buffer",
        "typed_config": {"@type": f"{_HTTP}.buffer.v3.Buffer", "max_request_bytes": MAX_BODY},
    }


def _router() -> Config:
    return {
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": f"{_HTTP}.router.v3.Router"},
    }


def _address(port: int) -> Config:
    return {"socket_address": {"address": LOOPBACK, "port_value": port}}


def _source(folder: Path, name: str) -> Config:
    return {
        "path_config_source": {
            "path": str(folder / name),
            "watched_directory": {"path": str(folder)},
        },
        "resource_api_version": "V3",
    }
