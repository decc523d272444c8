"""The gate step as a KFP component."""

from kfp import dsl

from components._image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate(
    project: str,
    run: str,
    evaluation: dsl.Input[dsl.Artifact],
    model: dsl.Input[dsl.Model],
    judged: dsl.Output[dsl.Model],
    card: dsl.Output[dsl.Markdown],
) -> bool:
    """Say of each limit whether the candidate keeps it, and add that to its bundle."""
    from perennial.steps import context
    from perennial.steps import gate as step

    with context.opened("gate", project, run) as ctx:
        record = step.gate(
            ctx,
            context.path(evaluation),
            context.path(model),
            context.path(judged),
            context.path(card),
        )
    judged.metadata.update(context.pins(record.candidate, run, evaluation.metadata["digest"]))
    return bool(record.passed)
