"""Which version should serve? The wish alone; the rollout controller moves the traffic."""

from perennial import bundle
from perennial.errors import RunFailed
from perennial.records import RolloutState, plain
from perennial.steps.context import Context
from perennial.store import rollouts, versions


def deploy(ctx: Context, number: int) -> RolloutState:
    """Wish that version ``number`` serves, and write the wish to the ledger."""
    version = versions.by_number(ctx.engine, ctx.project.name, number)
    if version is None:
        raise RunFailed(f"{ctx.project.name} has no version v{number} to deploy")
    wished = rollouts.wish(
        ctx.engine,
        project=ctx.project.name,
        version=version.number,
        digest=version.digest,
        bundle_uri=f"{ctx.state.artifacts('bundles')}/{bundle.name_of(version.digest)}",
        run_id=ctx.run,
        limits=ctx.project.rollout.model_dump_json(),
        guard=ctx.guard,
    )
    ctx.ledger.append(
        "rollout.wished",
        project=ctx.project.name,
        subject=version.label,
        body={**plain(wished), "rollout": wished.id},
        now=ctx.now,
        event_time=version.as_of,
    )
    return wished
