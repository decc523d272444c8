"""The train step as a KFP component."""

from kfp import dsl

from components._image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    project: str,
    data_digest: str,
    trials: int,
    seed: int,
    run: str,
    table: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Search parameters, fit the model and close it under its digest."""
    from perennial.steps import context
    from perennial.steps import train as step

    with context.opened("train", project, run) as ctx:
        fit = step.train(
            ctx.settings,
            ctx.project,
            context.path(table),
            context.path(model),
            as_of=context.known_moment(table.metadata["as_of"]),
            data_digest=data_digest,
            seed=seed,
            trials=trials,
            run=run,
        )
        model.metadata.update(
            context.pins(
                fit.digest, run, data_digest, table.metadata["digest"], framework="xgboost"
            )
        )
        metrics.metadata.update(fit.scores)
    return str(fit.digest)
