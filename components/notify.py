"""The exit handler as a KFP component."""

from kfp import dsl

from components._image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def notify(project: str, run: str, status: dsl.PipelineTaskFinalStatus) -> None:
    """Write to the ledger how the run ended and why."""
    from perennial.steps import context
    from perennial.steps import notify as step

    with context.opened("notify", project, run) as ctx:
        step.notify(ctx, status.state, status.error_message or "")
