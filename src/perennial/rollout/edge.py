"""What Envoy is told: the one listener, its guard, its routes and its clusters, as plain dicts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from perennial.records import LATENCY_BOUNDS_MS as LATENCY_BOUNDS_MS

Config = dict[str, Any]
# From the name of a document to where Envoy reads it.
Source = Callable[[str], Config]

CDS, LDS, RDS = "cds.json", "lds.json", "rds.json"
BOOTSTRAP = "bootstrap.json"
LOOPBACK, ANYWHERE = "127.0.0.1", "0.0.0.0"
# So long a request for a document is held open while there is nothing new.
HOLD_S = 15.0

# A pod of the edge: what clients ask, what the operator and the kubelet read, what nobody reaches.
POD_PORT, STATS_PORT, ADMIN_PORT = 8080, 8082, 9901
OPERATOR, ADMIN = "operator", "admin"

MAX_BODY = 1 << 20
MAX_CONNECTIONS = 500
MAX_IN_FLIGHT = 64
INFER_TIMEOUT = "5s"
PROBE_TIMEOUT = "2s"
# Shorter than the 65 s of KServe, which could else close a connection just as a request takes it.
IDLE_TIMEOUT = "30s"
GRPC_SERVICE = "inference.GRPCInferenceService"
GRPC_PROBES = ("ServerLive", "ServerReady", "ModelReady", "ModelMetadata")

_TYPES = "type.googleapis.com/envoy"
_HTTP = f"{_TYPES}.extensions.filters.http"


@dataclass(frozen=True)
class Ports:
    """Where a revision listens."""

    rest: int
    grpc: int
    host: str = LOOPBACK


def cluster_name(model: str, revision: str, *, grpc: bool = False, probe: bool = False) -> str:
    """Clusters are apart by protocol, and probes are apart so that they never count as evidence."""
    return f"{model}-{revision}" + ("-grpc" if grpc else "") + ("-probe" if probe else "")


def folder_source(folder: Path) -> Source:
    """Documents are files of a folder, read whenever one is renamed into it."""

    def source(name: str) -> Config:
        place = {"path": str(folder / name), "watched_directory": {"path": str(folder)}}
        return {"path_config_source": place, "resource_api_version": "V3"}

    return source


def bootstrap(source: Source, admin_port: int) -> Config:
    """What Envoy starts with; all else it reads from ``source``."""
    return {
        "node": {"id": "edge", "cluster": "perennial"},
        "admin": {"address": _address(admin_port)},
        "dynamic_resources": {"cds_config": source(CDS), "lds_config": source(LDS)},
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


def operator_source(name: str) -> Config:
    """Documents are asked of the operator, which answers as soon as there is a new one."""
    server = {
        "api_type": "REST",
        "transport_api_version": "V3",
        "cluster_names": [OPERATOR],
        "refresh_delay": "0.1s",
        "request_timeout": f"{2 * HOLD_S:g}s",
    }
    # An Envoy that was told nothing yet must not say that it is ready.
    return {
        "api_config_source": server,
        "resource_api_version": "V3",
        "initial_fetch_timeout": "0s",
    }


@dataclass(frozen=True)
class Pod:
    """One Envoy of a project's edge on a cluster."""

    project: str
    name: str
    operator: tuple[str, int]
    admin_port: int = ADMIN_PORT
    stats_port: int = STATS_PORT


def pod_bootstrap(pod: Pod) -> Config:
    """What an Envoy in a pod starts with: it finds the operator, and shows its statistics."""
    host, port = pod.operator
    return {
        **bootstrap(operator_source, pod.admin_port),
        "node": {"id": pod.name, "cluster": pod.project},
        "static_resources": {
            "clusters": [_plain(OPERATOR, host, port), _plain(ADMIN, LOOPBACK, pod.admin_port)],
            "listeners": [_stats_listener(pod.stats_port)],
        },
    }


def _plain(name: str, host: str, port: int) -> Config:
    endpoint = {"endpoint": {"address": _address(port, host)}}
    return {
        "name": name,
        **_discovery(host),
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def _stats_listener(port: int) -> Config:
    """Lets through what can be read only: the admin port itself can also stop Envoy."""
    get = [{"name": ":method", "string_match": {"exact": "GET"}}]
    reads = [
        {"match": {"path": path, "headers": get}, "route": {"cluster": ADMIN}}
        for path in ("/stats", "/stats/prometheus", "/ready")
    ]
    host = {"name": "stats", "domains": ["*"], "routes": [*reads, {**_prefix("/"), **_answer(404)}]}
    manager = {
        "stat_prefix": "stats",
        "http_filters": [_router()],
        "route_config": {"name": "stats", "virtual_hosts": [host]},
    }
    # Whatever flood of clients there is, the numbers must be had.
    return {**_listener("stats", manager, port, ANYWHERE), "ignore_global_conn_limit": True}


def listener(source: Source, port: int, host: str = LOOPBACK) -> Config:
    """The only socket that a client sees."""
    manager = {
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
        "rds": {"route_config_name": "edge", "config_source": source(RDS)},
    }
    return {
        "@type": f"{_TYPES}.config.listener.v3.Listener",
        **_listener("edge", manager, port, host),
        # On one machine a second edge could share the port, and half of the requests.
        "enable_reuse_port": host != LOOPBACK,
    }


def _listener(name: str, manager: Config, port: int, host: str) -> Config:
    http = {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": f"{_TYPES}.extensions.filters.network.http_connection_manager.v3"
            ".HttpConnectionManager",
            **manager,
        },
    }
    return {
        "name": name,
        "address": _address(port, host),
        "per_connection_buffer_limit_bytes": MAX_BODY,
        "filter_chains": [{"filters": [http]}],
    }


def clusters(model: str, revisions: Mapping[str, Ports]) -> list[Config]:
    """Four clusters a revision: REST and gRPC, predictions and probes."""
    return [
        _cluster(cluster_name(model, revision, grpc=grpc, probe=probe), ports, grpc)
        for revision, ports in revisions.items()
        for grpc in (False, True)
        for probe in (False, True)
    ]


def revisions(model: str, clusters: Sequence[Config]) -> dict[str, Ports]:
    """The revisions that clusters were made of: what a restarted controller goes on with."""
    found = {c["name"]: _socket(c) for c in clusters}
    names = [n.removeprefix(f"{model}-") for n in found if not n.endswith(("-grpc", "-probe"))]
    return {
        name: Ports(
            rest=found[cluster_name(model, name)]["port_value"],
            grpc=found[cluster_name(model, name, grpc=True)]["port_value"],
            host=found[cluster_name(model, name)]["address"],
        )
        for name in names
    }


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
    address = _address(ports.grpc if grpc else ports.rest, ports.host)
    endpoint = {"endpoint": {"address": address}}
    limit = {
        "max_connections": MAX_IN_FLIGHT,
        "max_pending_requests": MAX_IN_FLIGHT,
        "max_requests": MAX_IN_FLIGHT,
        "max_retries": MAX_IN_FLIGHT,
    }
    return {
        "@type": f"{_TYPES}.config.cluster.v3.Cluster",
        "name": name,
        **_discovery(ports.host),
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


def _address(port: int, host: str = LOOPBACK) -> Config:
    return {"socket_address": {"address": host, "port_value": port}}


def _discovery(host: str) -> Config:
    """An address is taken as it is, a name is asked for again and again."""
    try:
        ip_address(host)
    except ValueError:
        return {"type": "STRICT_DNS", "dns_lookup_family": "V4_PREFERRED"}
    return {"type": "STATIC"}


def _socket(cluster: Config) -> Config:
    endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    return dict(endpoint["address"]["socket_address"])
