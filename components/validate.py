"""The validate step as a KFP component."""

from kfp import dsl

from components._image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def validate(
    project: str,
    data_digest: str,
    run: str,
    snapshot: dsl.Input[dsl.Dataset],
    page: dsl.Output[dsl.HTML],
) -> bool:
    """Check a snapshot against the project's expectations; a critical fault ends the run."""
    from perennial.steps import context
    from perennial.steps import validate as step

    page.metadata.update(context.pins("", run, data_digest))
    with context.opened("validate", project, run) as ctx:
        checked = step.validate(ctx.project, context.path(snapshot), context.path(page))
    return bool(checked.passed)
