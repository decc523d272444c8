"""What is wished to serve, how far is it, what serves now and what served before."""

from dataclasses import asdict, fields

from sqlalchemy import ColumnElement, Connection, Engine, RowMapping, insert, select, update

from perennial.errors import LoopBroken, Unavailable
from perennial.records import BY_HAND, Phase, RolloutState
from perennial.store import fence
from perennial.store.engine import reading
from perennial.store.tables import rollouts
from perennial.store.tables import serving as served


def wish(
    engine: Engine,
    *,
    project: str,
    version: int,
    digest: str,
    bundle_uri: str,
    run_id: str,
    limits: str = "{}",
    guard: fence.Guard = fence.free,
) -> RolloutState:
    """State that a model should serve. The same run may say so twice and means one rollout.

    An older wish that was not begun is superseded; a rollout that has begun goes on and the new
    one waits for it, as it does for a rollback that a person asked for. Raises what the guard
    raises, and then nothing was written.
    """
    with engine.begin() as connection:
        guard(connection)
        same = _find(
            connection,
            rollouts.c.project == project,
            rollouts.c.run_id == run_id,
            rollouts.c.digest == digest,
        )
        if same:
            return same[0]
        reason = f"v{version} was wished before this one began"
        _supersede(connection, project, reason, by_hand=run_id.startswith(BY_HAND))
        values = {
            "project": project,
            "version": version,
            "digest": digest,
            "bundle_uri": bundle_uri,
            "run_id": run_id,
            "phase": str(Phase.WISHED),
            "step": -1,
            "weight": 0,
            "reason": "waits for the rollout controller",
            "limits": limits,
        }
        new = connection.execute(insert(rollouts).values(values)).inserted_primary_key
        assert new is not None
        return _find(connection, rollouts.c.id == new[0])[0]


def open_rollout(engine: Engine, project: str) -> RolloutState | None:
    """The oldest rollout that is not over."""
    going = [r for r in history(engine, project) if not r.phase.over]
    return going[0] if going else None


def save(engine: Engine, state: RolloutState, guard: fence.Guard = fence.free) -> None:
    """Write how far a rollout is; what is over stays as it ended.

    Raises LoopBroken when there is no such rollout, Unavailable when another controller ended it
    or the guard says so.
    """
    with engine.begin() as connection:
        guard(connection)
        write(connection, state)


def write(connection: Connection, state: RolloutState) -> None:
    """As ``save``, in a transaction of the caller's."""
    mine = rollouts.c.id == state.id
    stored = _find(connection, mine)
    if not stored:
        raise LoopBroken(f"rollout {state.id} is saved but was never wished")
    if stored[0].phase.over and stored[0] != state:
        raise Unavailable(f"rollout {state.id} is over meanwhile: {stored[0].phase}")
    values = asdict(state) | {"phase": str(state.phase)}
    connection.execute(update(rollouts).where(mine).values(values))


def open_projects(engine: Engine) -> list[str]:
    """Projects with a rollout that is not over."""
    over = [str(phase) for phase in Phase if phase.over]
    query = select(rollouts.c.project).where(rollouts.c.phase.not_in(over)).distinct()
    with reading(engine) as connection:
        return sorted(connection.execute(query).scalars())


def projects(engine: Engine) -> list[str]:
    """Every project that ever had a rollout."""
    with reading(engine) as connection:
        return sorted(connection.execute(select(rollouts.c.project).distinct()).scalars())


def manifest(engine: Engine, rollout_id: int) -> str:
    """What a cluster was first told to run for a rollout; empty when it was told nothing yet."""
    query = select(rollouts.c.manifest).where(rollouts.c.id == rollout_id)
    with reading(engine) as connection:
        return connection.execute(query).scalar_one_or_none() or ""


def pin_manifest(
    engine: Engine, rollout_id: int, text: str, guard: fence.Guard = fence.free
) -> str:
    """Write down what runs for a rollout, once; gives what was written down first.

    Raises what the guard raises.
    """
    mine = rollouts.c.id == rollout_id
    with engine.begin() as connection:
        guard(connection)
        connection.execute(
            update(rollouts).where(mine, rollouts.c.manifest == "").values(manifest=text)
        )
        return str(connection.execute(select(rollouts.c.manifest).where(mine)).scalar_one())


def get(engine: Engine, rollout_id: int) -> RolloutState | None:
    """One rollout by its number."""
    with reading(engine) as connection:
        found = _find(connection, rollouts.c.id == rollout_id)
    return found[0] if found else None


def history(engine: Engine, project: str) -> list[RolloutState]:
    """Every rollout of a project, oldest first."""
    with reading(engine) as connection:
        return _find(connection, rollouts.c.project == project)


def set_serving(
    engine: Engine, project: str, rollout_id: int, guard: fence.Guard = fence.free
) -> None:
    """Write down that this rollout's version serves from now on. Raises what the guard raises."""
    with engine.begin() as connection:
        guard(connection)
        order = _order(connection, project)
        # A controller that was killed after this line says it again.
        if order and order[-1] == rollout_id:
            return
        connection.execute(insert(served).values(project=project, rollout_id=rollout_id))


def serving(engine: Engine, project: str) -> RolloutState | None:
    """The rollout whose version serves now."""
    with reading(engine) as connection:
        order = _order(connection, project)
    return get(engine, order[-1]) if order else None


def previous(engine: Engine, project: str) -> RolloutState | None:
    """What served before the present one first came to serve.

    After a rollback that is one deeper, so rolling back twice never swaps back and forth.
    """
    with reading(engine) as connection:
        order = _order(connection, project)
    if not order:
        return None
    first = order.index(order[-1])
    return get(engine, order[first - 1]) if first else None


def _supersede(connection: Connection, project: str, reason: str, *, by_hand: bool) -> None:
    """End what was not begun; a rollback by hand gives way to another rollback by hand only."""
    waiting = [rollouts.c.project == project, rollouts.c.phase == str(Phase.WISHED)]
    if not by_hand:
        waiting.append(rollouts.c.run_id.not_like(f"{BY_HAND}%"))
    connection.execute(
        update(rollouts).where(*waiting).values(phase=str(Phase.SUPERSEDED), reason=reason)
    )


def _order(connection: Connection, project: str) -> list[int]:
    query = select(served.c.rollout_id).where(served.c.project == project).order_by(served.c.seq)
    return list(connection.execute(query).scalars())


def _find(connection: Connection, *where: ColumnElement[bool]) -> list[RolloutState]:
    query = select(rollouts).where(*where).order_by(rollouts.c.id)
    return [_state(row) for row in connection.execute(query).mappings()]


def _state(row: RowMapping) -> RolloutState:
    known = {field.name: row[field.name] for field in fields(RolloutState)}
    return RolloutState(**(known | {"phase": Phase(row["phase"])}))
