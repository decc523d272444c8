"""The ingest step as a KFP component."""

from kfp import dsl

from components._image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ingest(
    project: str, source: str, as_of: str, trigger: str, run: str, snapshot: dsl.Output[dsl.Dataset]
) -> str:
    """Keep a snapshot of what is known at one moment, and name it by its content."""
    from perennial.steps import context
    from perennial.steps import ingest as step

    with context.opened("ingest", project, run, trigger) as ctx:
        taken = step.ingest(
            ctx.settings,
            ctx.project,
            ctx.folder,
            source,
            context.moment(as_of),
            context.path(snapshot),
            run=run,
            trigger=trigger,
            now=ctx.now,
            guard=ctx.guard,
        )
        snapshot.metadata.update(
            context.pins(taken.digest, run, as_of=taken.as_of.isoformat(), rows=str(taken.rows))
        )
    return str(taken.digest)
