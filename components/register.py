"""The register step as a KFP component."""

from kfp import dsl

from components._image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register(project: str, run: str, judged: dsl.Input[dsl.Model]) -> int:
    """Give a model that passed its gate a version, here and in the MLflow registry."""
    from perennial.steps import context
    from perennial.steps import register as step

    with context.opened("register", project, run) as ctx:
        version = step.register(ctx, context.path(judged))
    return int(version.number)
