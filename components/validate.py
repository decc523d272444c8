"""The validate step as a KFP component."""

from kfp import dsl

from components._image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def validate(
    project: str,
    data_digest: str,
    run: str,
    snapshot: dsl.Input[dsl.Dataset],
    kept: dsl.Output[dsl.Dataset],
    aside: dsl.Output[dsl.Dataset],
    page: dsl.Output[dsl.HTML],
) -> int:
    """Check a snapshot, and part the rows that go on from those that break rules."""
    from perennial.steps import context
    from perennial.steps import validate as step

    page.metadata.update(context.pins("", run, data_digest))
    with context.opened("validate", project, run) as ctx:
        checked = step.validate(
            ctx,
            step.Given(
                context.path(snapshot),
                data_digest,
                context.known_moment(snapshot.metadata["as_of"]),
            ),
            step.Out(context.path(kept), context.path(aside), context.path(page)),
        )
        kept.metadata.update(
            context.pins(context.digest(kept), run, data_digest, as_of=snapshot.metadata["as_of"])
        )
        aside.metadata.update(context.pins(context.digest(aside), run, data_digest))
    return int(checked.aside)
