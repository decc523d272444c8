"""The features step as a KFP component."""

from kfp import dsl

from components._image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def features(
    project: str,
    data_digest: str,
    run: str,
    snapshot: dsl.Input[dsl.Dataset],
    table: dsl.Output[dsl.Dataset],
) -> int:
    """Make the feature table, with each row as it was known at its own time."""
    from perennial.steps import context
    from perennial.steps import features as step

    as_of = snapshot.metadata["as_of"]
    with context.opened("features", project, run) as ctx:
        made = step.build(
            ctx.settings,
            ctx.project,
            context.path(snapshot),
            context.known_moment(as_of),
            context.path(table),
        )
        table.metadata.update(context.pins(context.digest(table), run, data_digest, as_of=as_of))
    return int(made.rows)
