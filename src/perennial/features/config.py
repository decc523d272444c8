"""Where do Feast's three stores lie: the settings as ``feature_store.yaml``, kept to its owner."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import yaml

from perennial.errors import BadInput
from perennial.project import Project
from perennial.settings import Settings
from perennial.store import files, urls

CONFIG = "feature_store.yaml"
REGISTRY = "registry.sqlite"
ONLINE = "online.sqlite"
_OWN_SCHEMA = '"$user",public'  # the role's own, where there is one
_PORTS = {"redis": 6379, "rediss": 6379, "postgresql": 5432}
_WANTED = {
    "features_online": "redis://user:password@host:6379/0 or rediss://...",
    "features_registry": "postgresql://role:password@host:5432/database",
    "features_offline": "postgresql://role:password@host:5432/database?schema=features",
}


def feast(settings: Settings, project: Project) -> dict[str, Any]:
    """What Feast is told of a project. Raises BadInput for a setting that is no such URL.

    No error of this module quotes a URL: each may hold a password.
    """
    return {
        "project": identifier(project),
        "provider": "local",
        "registry": _registry(settings, project),
        "offline_store": _offline(settings),
        "online_store": _online(settings, project),
        "entity_key_serialization_version": 3,
    }


def write(settings: Settings, project: Project) -> Path:
    """Write ``feature_store.yaml`` for Feast's own tools, readable by its owner only."""
    path = settings.state(project.name).feast / CONFIG
    files.write_atomic(path, yaml.safe_dump(feast(settings, project)), mode=0o600)
    return path


def identifier(project: Project) -> str:
    """The project's name as Feast and PostgreSQL want it."""
    return project.name.replace("-", "_")


def shown(url: str) -> str:
    """A URL without user, password and parameters; what an empty one stands for is empty."""
    if not url:
        return ""
    found = urlsplit(url)
    return f"{found.scheme}://{found.hostname}:{_port(found)}{found.path}"


def is_postgres_offline(settings: Settings) -> bool:
    """Does PostgreSQL join features to rows of the past?"""
    return bool(settings.features_offline)


def postgres(settings: Settings) -> dict[str, Any]:
    """Host, port, database, user, password and schema of the offline store."""
    found = _url(settings, "features_offline", ("postgresql",))
    schema = parse_qs(found.query).get("schema", [_OWN_SCHEMA])[0]
    return {
        "host": found.hostname,
        "port": _port(found),
        "database": found.path.strip("/"),
        "db_schema": schema,
        "user": unquote(found.username or ""),
        "password": unquote(found.password or ""),
    }


def _registry(settings: Settings, project: Project) -> dict[str, Any]:
    # Feast writes a registry file in place, so that a kill leaves half of one; SQL keeps it whole.
    path = f"sqlite:///{settings.state(project.name).feast / REGISTRY}"
    if settings.features_registry:
        found = _url(settings, "features_registry", ("postgresql",))
        path = found._replace(scheme="postgresql+psycopg").geturl()
    return {"registry_type": "sql", "path": path}


def _offline(settings: Settings) -> dict[str, Any]:
    if not is_postgres_offline(settings):
        return {"type": "duckdb"}
    return {"type": "postgres", "sslmode": "prefer", **postgres(settings)}


def _online(settings: Settings, project: Project) -> dict[str, Any]:
    if not settings.features_online:
        path = settings.state(project.name).feast / ONLINE
        return {"type": "sqlite", "path": str(path)}
    found = _url(settings, "features_online", ("redis", "rediss"))
    # Feast would skip a row of the same moment, and so never mend one; the watermark sees to order.
    return {"type": "redis", "connection_string": _redis(found), "skip_dedup": True}


def _redis(found: SplitResult) -> str:
    """Host and options in the manner of Feast: split at commas, each value read as JSON."""
    options: dict[str, Any] = {"db": int(found.path.strip("/") or 0)}
    if found.username:
        options["username"] = unquote(found.username)
    if found.password:
        options["password"] = unquote(found.password)
    if found.scheme == "rediss":
        options["ssl"] = True
    options |= {"socket_connect_timeout": 5, "socket_timeout": 30}
    told = [f"{found.hostname}:{_port(found)}"]
    told += [f"{key}={json.dumps(value)}" for key, value in options.items()]
    if any("," in part for part in told):
        raise BadInput("PERENNIAL_FEATURES_ONLINE holds a comma, which Feast cannot be told")
    return ",".join(told)


def _url(settings: Settings, name: str, schemes: tuple[str, ...]) -> SplitResult:
    url = str(getattr(settings, name))
    wrong = BadInput(
        f"PERENNIAL_{name.upper()} is no such URL, wanted such as {_WANTED[name]}; {urls.ESCAPES}"
    )
    try:
        found: SplitResult = urlsplit(url)
        found = found._replace(scheme=found.scheme.removesuffix("+psycopg"))
        fits = bool(found.hostname) and _port(found) > 0 and found.scheme in schemes
        is_number = found.path.strip("/").isdecimal() or not found.path.strip("/")
    except ValueError:
        raise wrong from None
    needs = is_number if "redis" in schemes else bool(found.path.strip("/"))
    # Who reads it next, Feast or SQLAlchemy, may take another @ for the end of the password.
    if not (fits and needs) or url.count("@") > 1:
        raise wrong
    return found


def _port(found: SplitResult) -> int:
    return found.port or _PORTS.get(found.scheme.removesuffix("+psycopg"), 0)
