"""The training pipeline: eight steps from raw rows to the wish for a rollout."""

import argparse
import sys
import tempfile
from pathlib import Path

from kfp import compiler, dsl

from components.deploy import deploy
from components.evaluate import evaluate
from components.features import features
from components.gate import gate
from components.ingest import ingest
from components.notify import notify
from components.register import register
from components.train import train
from components.validate import validate
from pipelines._cluster import placed

SPEC = Path(__file__).with_suffix(".yaml")


@dsl.pipeline(name="training", display_name="Train, judge and register a model")
def training(
    project: str,
    source: str = "",
    as_of: str = "",
    trials: int = 0,
    seed: int = -1,
    trigger: str = "by hand",
) -> None:
    """Turn raw rows into a model that earned its place, or say why it did not.

    Args:
        project: Folder with a project.yaml, or a YAML file; on a cluster projects/<name>.yaml.
        source: File with raw rows, instead of the one that the project names.
        as_of: Moment up to which data and labels are known (2011-09-01); empty is the newest row.
        trials: Parameter settings to try; 0 takes the project's number.
        seed: Seed of search and training; -1 takes the project's.
        trigger: What started this run: the id of a drift event, or words.
    """
    run = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    told = placed(notify(project=project, run=run))
    told.set_display_name("Tell how it ended").set_caching_options(False)
    with dsl.ExitHandler(told, name="steps"):
        taken = placed(
            ingest(project=project, source=source, as_of=as_of, trigger=trigger, run=run)
        )
        taken.set_display_name("Ingest raw rows").set_caching_options(False)
        digest, snapshot = taken.outputs["Output"], taken.outputs["snapshot"]
        checked = placed(validate(project=project, data_digest=digest, run=run, snapshot=snapshot))
        checked.set_display_name("Validate data").set_caching_options(False)
        kept = checked.outputs["kept"]
        made = placed(features(project=project, data_digest=digest, run=run, snapshot=kept))
        made.set_display_name("Make features")
        table = made.outputs["table"]
        fitted = placed(
            train(
                project=project, data_digest=digest, trials=trials, seed=seed, run=run, table=table
            )
        )
        fitted.set_display_name("Train model")
        model = fitted.outputs["model"]
        measured = placed(evaluate(project=project, run=run, table=table, model=model))
        measured.set_display_name("Evaluate against the champion").set_caching_options(False)
        judged = placed(
            gate(project=project, run=run, evaluation=measured.outputs["evaluation"], model=model)
        )
        judged.set_display_name("Judge").set_caching_options(False)
        # One plain return named Output is the only named output kfp.local compares rightly.
        with dsl.If(judged.outputs["Output"] == True, name="passed"):  # noqa: E712
            known = placed(register(project=project, run=run, judged=judged.outputs["judged"]))
            known.set_display_name("Register version").set_caching_options(False)
            wished = placed(deploy(project=project, version=known.output, run=run))
            wished.set_display_name("Wish for a rollout").set_caching_options(False)


def compiled() -> str:
    """The pipeline as YAML, as it should stand in the file beside this one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SPEC.name
        compiler.Compiler().compile(training, str(path))
        return path.read_text(encoding="utf-8")


def main() -> int:
    """Write the spec; with --check only say whether it is current."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether it is current")
    parser.add_argument("--to", type=Path, default=SPEC, help="file to write (training.yaml)")
    asked = parser.parse_args()
    if not asked.check:
        asked.to.write_text(compiled(), encoding="utf-8")
        print(f"wrote {asked.to}")
        return 0
    current = asked.to.is_file() and asked.to.read_text(encoding="utf-8") == compiled()
    print(f"{asked.to} is current" if current else f"{asked.to} is not current; run 'make spec'")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
