"""Which rows of a history are served: those that a run would learn from as well."""

from datetime import datetime

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from perennial.data import checks, history
from perennial.project import Project
from perennial.store import scratch


def examples(
    project: Project, raw: pd.DataFrame, since: datetime, until: datetime | None
) -> pd.DataFrame:
    """Rows as ``history.examples`` gives them, without those that validation keeps aside.

    Purchases are sifted before features are made of them, as in a run: a line that was booked twice
    must not count twice when it is served, and once when it trains.
    """
    if project.kind == "transactions":
        return history.examples(project, sifted(project, raw), since, until)
    return sifted(project, history.examples(project, raw, since, until))


def sifted(project: Project, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows without those that a run would quarantine; all, where it would rather stop."""
    quarantining = [one for one in project.expectations if checks.quarantines(one)]
    rules = tuple(one for one in quarantining if checks.is_about_rows(one))
    if not rules or rows.empty:
        return rows
    with scratch.folder() as near:
        path = near / "rows.parquet"
        pq.write_table(pa.Table.from_pandas(rows, preserve_index=False), path)
        wanted = project.model_copy(update={"expectations": rules})
        found = checks.check(wanted, path, (), None, near)
    if found.too_many:
        return rows
    return rows.drop(index=rows.index[found.aside]).reset_index(drop=True)
