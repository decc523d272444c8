"""Look features up over HTTP: Feast's own feature server, with the doors shut that write.

Feast's server also takes rows, and materializes, for whoever asks; a look-up needs none of it.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perennial import project as projects
from perennial.errors import PerennialError
from perennial.features import store as stores
from perennial.features.store import TIME, Store
from perennial.settings import Settings

OPEN = ("/get-online-features", "/health")
VIEW = "/view"


def app(store: Store) -> Any:
    """The ASGI application: look-ups, health, and what is looked up."""
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    told = {
        "name": store.name,
        "key": store.key,
        "time": TIME,
        "ttl_s": store.ttl.total_seconds(),
    }
    served = stores.server_app(store)
    kept = [route for route in served.router.routes if getattr(route, "path", "") in OPEN]
    served.router.routes[:] = [*kept, Route(VIEW, lambda _request: JSONResponse(told))]
    return served


def main(argv: Sequence[str] | None = None) -> int:
    """Serve one project's features until SIGTERM."""
    parser = argparse.ArgumentParser(prog="perennial.features.server", description=main.__doc__)
    parser.add_argument("--project", type=Path, required=True, help="project folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        return _serve(given)
    except PerennialError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code


def _serve(given: argparse.Namespace) -> int:
    import uvicorn

    settings = Settings.load()
    with stores.opened(settings, projects.load(given.project)) as store:
        uvicorn.run(app(store), host=given.host, port=given.port, access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
