"""Which rules would fit a project's rows? Printed for a person to read and keep."""

from perennial import project as projects
from perennial.data import snapshots, sources
from perennial.data import suggest as proposals
from perennial.local import folders
from perennial.settings import Settings
from perennial.store import scratch


def suggest(settings: Settings, text: str, *, source: str) -> int:
    """Print rules that the rows of a project keep, as YAML for its ``expectations``."""
    where = folders.project_folder(settings, text)
    project = projects.load(where)
    root = where if where.is_dir() else where.parent
    with (
        scratch.folder() as near,
        sources.opened(project, source or None, root, near, url=settings.source_url) as opened,
    ):
        opened.rows.check()
        path = near / "rows.parquet"
        count = snapshots.write(path, opened.rows.schema, opened.rows.known(None))
        found = proposals.suggest(path, near, is_timed=not project.time.row_order)
    print(f"# {len(found)} proposals from {count:,} rows. Each is kept by these rows; read them")
    print("# before you use them: what was seen once is not yet a rule.")
    print(proposals.as_yaml(found), end="")
    return 0
