"""The deploy step as a KFP component."""

from kfp import dsl

from components._image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def deploy(project: str, version: int, run: str) -> int:
    """State the wish that a version should serve; the rollout controller does the rest."""
    from perennial.steps import context
    from perennial.steps import deploy as step

    with context.opened("deploy", project, run) as ctx:
        wished = step.deploy(ctx, int(version))
    return int(wished.id)
