"""The evaluate step as a KFP component."""

from kfp import dsl

from components._image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    project: str,
    run: str,
    table: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    curves: dsl.Output[dsl.ClassificationMetrics],
    page: dsl.Output[dsl.HTML],
) -> float:
    """Measure the candidate and the champion on the same later rows."""
    from perennial.steps import context
    from perennial.steps import evaluate as step

    with context.opened("evaluate", project, run) as ctx:
        seen = step.run(
            ctx,
            context.path(table),
            context.path(model),
            context.path(evaluation),
            context.path(page),
        )
    evaluation.metadata.update(context.pins(context.digest(evaluation), run, *seen.parents))
    metrics.metadata.update(seen.scores_by_name)
    seen.draw(curves)
    return float(seen.auc)
