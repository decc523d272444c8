"""What was measured of each feature that went online, and what was said of it?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, RowMapping, delete, insert, select

from perennial.store import fence
from perennial.store.engine import reading
from perennial.store.tables import feature_quality


@dataclass(frozen=True)
class Record:
    """One feature at one moment; ``profile`` is JSON-ready, ``drift`` None without a reference."""

    feature: str
    moment: datetime
    run: str
    verdict: str
    reason: str
    drift: float | None
    profile: dict[str, Any]


def keep(
    engine: Engine,
    project: str,
    records: Sequence[Record],
    now: datetime,
    guard: fence.Guard = fence.free,
) -> None:
    """Keep records of one materialization in the place of older ones of the same moment.

    Raises what the guard raises, and then nothing was written.
    """
    with engine.begin() as connection:
        guard(connection)
        for record in records:
            connection.execute(
                delete(feature_quality).where(
                    feature_quality.c.project == project,
                    feature_quality.c.feature == record.feature,
                    feature_quality.c.moment == record.moment.isoformat(),
                )
            )
            connection.execute(insert(feature_quality).values(_row(project, record, now)))


def before(engine: Engine, project: str, moment: datetime) -> dict[str, Record]:
    """The newest record of each feature that is older than ``moment``."""
    with reading(engine) as connection:
        query = (
            select(feature_quality)
            .where(
                feature_quality.c.project == project,
                feature_quality.c.moment < moment.isoformat(),
            )
            .order_by(feature_quality.c.moment)
        )
        return {row["feature"]: _record(row) for row in connection.execute(query).mappings()}


def newest(engine: Engine, project: str) -> dict[str, Record]:
    """The newest record of each feature."""
    with reading(engine) as connection:
        query = (
            select(feature_quality)
            .where(feature_quality.c.project == project)
            .order_by(feature_quality.c.moment)
        )
        return {row["feature"]: _record(row) for row in connection.execute(query).mappings()}


def _row(project: str, record: Record, now: datetime) -> dict[str, Any]:
    return {
        "project": project,
        "feature": record.feature,
        "moment": record.moment.isoformat(),
        "at": now.isoformat(),
        "run": record.run,
        "verdict": record.verdict,
        "reason": record.reason,
        "drift": record.drift,
        "profile": json.dumps(record.profile, sort_keys=True),
    }


def _record(row: RowMapping) -> Record:
    return Record(
        feature=row["feature"],
        moment=datetime.fromisoformat(row["moment"]),
        run=row["run"],
        verdict=row["verdict"],
        reason=row["reason"],
        drift=row["drift"],
        profile=json.loads(row["profile"]),
    )
