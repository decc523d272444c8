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
    from pathlib import Path

    from perennial.steps import context
    from perennial.steps import evaluate as step

    with context.opened("evaluate", project, run) as ctx:
        seen = step.run(
            ctx, Path(table.path), Path(model.path), Path(evaluation.path), Path(page.path)
        )
    evaluation.metadata.update(
        context.pins(context.digest(Path(evaluation.path)), run, *seen.parents)
    )
    metrics.metadata.update(seen.scores_by_name)
    curves.log_roc_curve(*seen.roc)
    curves.log_confusion_matrix(["0", "1"], seen.confusion)
    return float(seen.auc)
