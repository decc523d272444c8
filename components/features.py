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
    from pathlib import Path

    from perennial.steps import context
    from perennial.steps import features as step

    as_of = snapshot.metadata["as_of"]
    with context.opened("features", project, run) as ctx:
        moment = context.known_moment(as_of)
        made = step.build(ctx.settings, ctx.project, Path(snapshot.path), moment, Path(table.path))
        digest = context.digest(Path(table.path))
        table.metadata.update(context.pins(digest, run, data_digest, as_of=as_of))
    return int(made.rows)
