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
    page: dsl.Output[dsl.HTML],
) -> int:
    """Make the feature table, with each row as it was known at its own time."""
    from perennial.steps import context
    from perennial.steps import features as step

    with context.opened("features", project, run) as ctx:
        made = step.build(
            ctx.settings,
            ctx.project,
            context.path(snapshot),
            context.known_moment(snapshot.metadata["as_of"]),
            context.path(table),
            page=context.path(page),
            origin=step.Origin(run, ctx.now, ctx.guard),
        )
        known = {"as_of": snapshot.metadata["as_of"], **made.told}
        page.metadata.update(context.pins("", run, data_digest))
        table.metadata.update(context.pins(context.digest(table), run, data_digest, **known))
    return int(made.rows)
