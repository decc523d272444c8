"""What did the user ask for: parse, read settings once, import late, one line per error."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perennial.errors import PerennialError

if TYPE_CHECKING:
    from perennial.settings import Settings

Handler = Callable[[argparse.Namespace], int]

OVERVIEW = """\
A model that keeps itself fresh: trained, served, watched, retrained and rolled out.

start
  init TABLE           look at a CSV or Parquet file and write a project for it
  replay PROJECT       drive a project's own history through the running loop, with a report
  up PROJECT           serve in the foreground: Envoy, predictor, drift transformer, retraining
  down [PROJECT]       stop what 'up' started, from elsewhere
look
  status [PROJECT]     what serves, what drifts, what runs, on one screen
  why [PROJECT]        how the serving model came to serve, back to data, code and seed
  doctor [PROJECT]     what is missing here and how to mend it
act
  rollback [PROJECT]   serve the version before this one again
nouns
  models list|show     registered versions
  runs list|show       pipeline runs and their gates
  runs submit|status|logs|retry|terminate
                       one run, on the launcher that is set: this machine, a Job, a KFP backend
  pipeline compile|run the KFP spec, and one run of it by hand, here
  pipeline upload|schedule
                       the spec as a version on a KFP backend, and its runs at set times
  features list|show   what a model may see: owner, versions, quality, models that use it
  features materialize|parity
                       the newest features online, and look-ups against training
  project check|schema a project.yaml and its JSON schema
  expectations suggest rules that fit a table, to put into project.yaml
  quarantine list|show|replay|drop
                       rows that break rules: kept aside, counted, never lost
  data break|breaks    a copy of a file with a fault in it, and the faults there are
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"perennial: {message}; see '{self.prog} --help'\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole grammar; each command carries its handler."""
    parser = _Parser(
        prog="perennial",
        description=OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="perennial COMMAND [options]",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(
        dest="command",
        metavar="COMMAND",
        prog="perennial",
        parser_class=_Parser,
        help=argparse.SUPPRESS,
    )
    _start_commands(commands)
    _look_commands(commands)
    _noun_commands(commands)
    return parser


def _add(
    commands: "argparse._SubParsersAction[_Parser]", name: str, say: str, do: Handler
) -> _Parser:
    command = commands.add_parser(name, help=say, description=say)
    command.set_defaults(do=do)
    return command


def _start_commands(commands: "argparse._SubParsersAction[_Parser]") -> None:
    init = _add(commands, "init", "Look at a table and write a project for it.", _init)
    init.add_argument("table", type=Path, help="CSV (also .gz) or Parquet file")
    init.add_argument("--label", help="column to predict (guessed if not given)")
    init.add_argument("--time", help="column that says when a row happened (guessed)")
    init.add_argument("--name", help="name of the project (default: from the file's name)")
    init.add_argument("--to", type=Path, help="folder to write (default: the project's name)")
    replay = _add(
        commands, "replay", "Drive a project's history through the running loop.", _replay
    )
    _project_argument(replay, required=True)
    replay.add_argument(
        "--source",
        default="",
        help="files with raw rows (a path, a pattern or s3://...), not the project's",
    )
    replay.add_argument("--until", default="", help="stop at this event time (2011-10-01)")
    replay.add_argument("--to", default="", help="only send, to this URL of a loop elsewhere")
    replay.add_argument("--host", default="", help="with --to: Host header that an ingress wants")
    replay.add_argument("--from", dest="since", default="", help="with --to: first event time")
    replay.add_argument("--rows", type=_positive, default=1, help="with --to: rows a request (1)")
    replay.add_argument("--pause", type=float, default=0.0, help="with --to: seconds between (0)")
    replay.add_argument("--json", action="store_true", help="print the summary as JSON at the end")
    up = _add(commands, "up", "Serve a project in the foreground until Ctrl-C.", _up)
    _project_argument(up, required=True)
    up.add_argument(
        "--source",
        default="",
        help="files with raw rows (a path, a pattern or s3://...), not the project's",
    )
    down = _add(commands, "down", "Stop a running stack from elsewhere.", _down)
    _project_argument(down)
    rollback = _add(commands, "rollback", "Serve the version before this one again.", _rollback)
    _project_argument(rollback)


def _look_commands(commands: "argparse._SubParsersAction[_Parser]") -> None:
    status = _add(commands, "status", "What serves, what drifts, what runs.", _status)
    _project_argument(status)
    _json_argument(status)
    why = _add(commands, "why", "How a model came to serve, or why it was refused.", _why)
    _project_argument(why)
    why.add_argument("--model", help="a version such as v2 (default: the one that serves)")
    why.add_argument("--verbose", action="store_true", help="also run and event ids")
    _json_argument(why)
    doctor = _add(commands, "doctor", "What is missing here and how to mend it.", _doctor)
    _project_argument(doctor)
    doctor.add_argument("--cluster", action="store_true", help="look at the cluster instead")
    _json_argument(doctor)


def _noun_commands(commands: "argparse._SubParsersAction[_Parser]") -> None:
    models = _noun(commands, "models", "Registered versions.")
    _listing(_add(models, "list", "All versions, newest first.", _models_list))
    show = _add(models, "show", "One version with its pins and gates.", _models_show)
    show.add_argument("model", help="a version such as v2")
    _listing(show)
    _run_commands(commands)
    _feature_commands(commands)
    _pipeline_commands(commands)
    _rule_commands(commands)
    project = _noun(commands, "project", "A project.yaml.")
    _project_argument(_add(project, "check", "Say every fault of a project.", _project_check), True)
    _add(project, "schema", "Print the JSON schema of project.yaml.", _project_schema)
    _data_commands(commands)


def _run_commands(commands: "argparse._SubParsersAction[_Parser]") -> None:
    runs = _noun(commands, "runs", "Pipeline runs.")
    _listing(_add(runs, "list", "All runs, newest first.", _runs_list))
    show = _run_argument(_add(runs, "show", "One run: data, gates, outcome.", _runs_show))
    _listing(show, with_project=False)
    submit = _add(runs, "submit", "Start a run by hand on the launcher that is set.", _runs_submit)
    submit.epilog = "example: PERENNIAL_LAUNCHER=kfp perennial runs submit examples/retail"
    _run_options(submit)
    submit.add_argument("--trials", type=int, default=0, help="settings to try (the project's)")
    submit.add_argument("--seed", type=int, default=-1, help="seed of the search (the project's)")
    _no_wait_argument(submit)
    status = _run_argument(_add(runs, "status", "Where a run is, step by step.", _runs_status))
    _json_argument(status)
    logs = _run_argument(_add(runs, "logs", "What the steps of a run wrote.", _runs_logs))
    logs.add_argument("--step", default="", help="only this step, such as train")
    logs.epilog = "example: perennial runs logs 4f1c --step train"
    say = "Resume a failed run at the step that failed (KFP)."
    _no_wait_argument(_run_argument(_add(runs, "retry", say, _runs_retry), with_project=False))
    _run_argument(_add(runs, "terminate", "End a run that goes on.", _runs_terminate))


def _rule_commands(commands: "argparse._SubParsersAction[_Parser]") -> None:
    rules = _noun(commands, "expectations", "Rules that raw rows must keep.")
    say = "Propose rules that a table keeps, for the project.yaml: read them before you use them."
    suggest = _add(rules, "suggest", say, _expectations_suggest)
    suggest.epilog = "example: perennial expectations suggest examples/retail >> rules.yaml"
    _project_argument(suggest, required=True)
    suggest.add_argument("--source", default="", help="raw rows, instead of the project's")
    kept = _noun(commands, "quarantine", "Rows that break rules and are kept aside.")
    _listing_of_project(_add(kept, "list", "All batches, newest first.", _quarantine_list))
    show = _batch_argument(_add(kept, "show", "One batch: rules and rows.", _quarantine_show))
    show.add_argument("--rows", type=_positive, default=10, help="rows to show (10)")
    show.add_argument("--to", default="", help="write all rows to this .csv or .parquet instead")
    _json_argument(show)
    say = "Judge a batch again by today's rules; rows that keep them join the next run."
    replay = _batch_argument(_add(kept, "replay", say, _quarantine_replay))
    replay.add_argument("--rows", default="", help="file with mended rows, as 'show --to' wrote it")
    replay.epilog = "example: perennial quarantine replay 4f1c --project examples/retail"
    say = "Delete the rows of a batch for good; that they were there stays in the ledger."
    drop = _batch_argument(_add(kept, "drop", say, _quarantine_drop))
    drop.add_argument("--because", required=True, help="why, in words that 'why' will repeat")


def _batch_argument(parser: _Parser) -> _Parser:
    parser.add_argument("batch", help="a batch, or the first characters of one")
    _which_project(parser)
    return parser


def _listing_of_project(parser: _Parser) -> None:
    _which_project(parser)
    _json_argument(parser)


def _feature_commands(commands: "argparse._SubParsersAction[_Parser]") -> None:
    features = _noun(commands, "features", "What models see: made once, for training and look-up.")
    say = "All features: type, version, owner, models that use them."
    listing = _add(features, "list", say, _features_list)
    _which_project(listing)
    _json_argument(listing)
    say = "One feature: versions, policies, quality, some values."
    show = _add(features, "show", say, _features_show)
    show.add_argument("feature", help="name of a feature, such as spend")
    _which_project(show)
    _json_argument(show)
    say = "Bring features online that are newer than the last ones there."
    materialize = _add(features, "materialize", say, _features_materialize)
    _project_argument(materialize)
    _json_argument(materialize)
    say = "Compare features online with those of training, at the same moment."
    parity = _add(features, "parity", say, _features_parity)
    _project_argument(parity)
    parity.add_argument("--entities", type=_positive, default=1000, help="how many (1000)")
    parity.add_argument("--seed", type=int, default=0, help="another seed, other entities (0)")
    _json_argument(parity)


def _pipeline_commands(commands: "argparse._SubParsersAction[_Parser]") -> None:
    pipeline = _noun(commands, "pipeline", "The compiled KFP pipeline.")
    compile_ = _add(pipeline, "compile", "Write pipelines/training.yaml again.", _pipeline_compile)
    compile_.add_argument("--check", action="store_true", help="only say whether it is current")
    compile_.add_argument("--to", default="", help="write this file instead")
    _run_options(_add(pipeline, "run", "Run the compiled pipeline once, by hand.", _pipeline_run))
    say = "Give the pipeline, compiled for these settings, to the KFP backend as a version."
    _add(pipeline, "upload", say, _pipeline_upload)
    say = "Let the KFP backend run the pipeline at set times, one run at a time."
    schedule = _add(pipeline, "schedule", say, _pipeline_schedule)
    schedule.epilog = "example: perennial pipeline schedule examples/retail --cron '0 30 3 * * *'"
    _project_argument(schedule, required=True)
    wanted = schedule.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--cron", help="six fields: second minute hour day month weekday")
    wanted.add_argument("--off", action="store_true", help="remove the schedule")
    patience = "seconds to wait for a run of an old schedule (600)"
    schedule.add_argument("--patience", type=_positive, default=600, help=patience)


def _data_commands(commands: "argparse._SubParsersAction[_Parser]") -> None:
    data = _noun(commands, "data", "Files to try validation with.")
    broken = _add(data, "break", "Write a copy of a file with a fault in it.", _data_break)
    broken.epilog = "example: perennial data break a.csv --fault nulls --column age --to b.csv"
    broken.add_argument("file", type=Path, help="CSV (also .gz) or Parquet file; is not changed")
    broken.add_argument("--fault", required=True, help="a name of 'perennial data breaks'")
    broken.add_argument("--to", type=Path, required=True, help="file to write, in the same format")
    broken.add_argument("--column", default="", help="column that breaks")
    broken.add_argument("--other", default="", help="second column (the one behind the first)")
    broken.add_argument("--share", type=float, help="part of the rows, 0 to 1 (the fault's own)")
    broken.add_argument("--seed", type=int, default=0, help="same seed, same bytes (0)")
    broken.add_argument("--no-header", action="store_true", help="the first line holds values")
    _add(data, "breaks", "All faults, one line each.", _data_breaks)


def _run_options(parser: _Parser) -> None:
    _project_argument(parser, required=True)
    parser.add_argument(
        "--source",
        default="",
        help="files with raw rows (a path, a pattern or s3://...), not the project's",
    )
    parser.add_argument("--as-of", default="", help="use only what was known then (2011-10-01)")


def _run_argument(parser: _Parser, with_project: bool = True) -> _Parser:
    parser.add_argument("run", help="a run id, or the first characters of one")
    if with_project:
        _which_project(parser)
    return parser


def _which_project(parser: _Parser) -> None:
    parser.add_argument("--project", default="", help="project folder (default: the one used last)")


def _no_wait_argument(parser: _Parser) -> None:
    parser.add_argument("--no-wait", action="store_true", help="do not follow it to its end")


def _noun(
    commands: "argparse._SubParsersAction[_Parser]", name: str, say: str
) -> "argparse._SubParsersAction[_Parser]":
    noun = commands.add_parser(name, help=say, description=say)
    return noun.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)


def _project_argument(parser: _Parser, required: bool = False) -> None:
    parser.add_argument(
        "project",
        nargs=None if required else "?",
        default="",
        help="project folder, such as examples/retail"
        + ("" if required else " (default: the one used last)"),
    )


def _json_argument(parser: _Parser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def _listing(parser: _Parser, with_project: bool = True) -> None:
    if with_project:
        _which_project(parser)
    parser.add_argument("--verbose", action="store_true", help="also run and bundle ids")
    _json_argument(parser)


def _init(args: argparse.Namespace) -> int:
    from perennial.local import init

    return init.write(args.table, name=args.name, label=args.label, time=args.time, to=args.to)


def _replay(args: argparse.Namespace) -> int:
    if args.to:
        return _send(args)
    from perennial.local import replay

    return replay.main(
        _settings(), args.project, source=args.source, until=args.until, as_json=args.json
    )


def _send(args: argparse.Namespace) -> int:
    from perennial.local import send

    wanted = send.Wanted(
        args.to, args.host, args.source, args.since, args.until, args.rows, max(args.pause, 0.0)
    )
    return send.main(_settings(), args.project, wanted)


def _up(args: argparse.Namespace) -> int:
    from perennial.local import stack

    return stack.up(_settings(), args.project, source=args.source)


def _down(args: argparse.Namespace) -> int:
    from perennial.local import stack

    return stack.down(_settings(), args.project)


def _rollback(args: argparse.Namespace) -> int:
    from perennial.local import stack

    return stack.roll_back(_settings(), args.project)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _status(args: argparse.Namespace) -> int:
    from perennial.local import look

    return look.status(_settings(), args.project, as_json=args.json)


def _why(args: argparse.Namespace) -> int:
    from perennial.local import look

    return look.why(
        _settings(), args.project, model=args.model, verbose=args.verbose, as_json=args.json
    )


def _doctor(args: argparse.Namespace) -> int:
    from perennial.local import doctor

    return doctor.main(_settings(), args.project, as_json=args.json, cluster=args.cluster)


def _models_list(args: argparse.Namespace) -> int:
    from perennial.local import look

    return look.models(_settings(), args.project, verbose=args.verbose, as_json=args.json)


def _models_show(args: argparse.Namespace) -> int:
    from perennial.local import look

    return look.model(
        _settings(), args.project, args.model, verbose=args.verbose, as_json=args.json
    )


def _runs_list(args: argparse.Namespace) -> int:
    from perennial.local import runs

    return runs.listing(_settings(), args.project, verbose=args.verbose, as_json=args.json)


def _runs_show(args: argparse.Namespace) -> int:
    from perennial.local import look

    return look.run(_settings(), args.project, args.run, as_json=args.json)


def _runs_submit(args: argparse.Namespace) -> int:
    from perennial.local import runs

    return runs.submit(
        _settings(),
        args.project,
        source=args.source,
        as_of=args.as_of,
        trials=args.trials,
        seed=args.seed,
        wait=not args.no_wait,
    )


def _runs_status(args: argparse.Namespace) -> int:
    from perennial.local import runs

    return runs.status(_settings(), args.run, project=args.project, as_json=args.json)


def _runs_logs(args: argparse.Namespace) -> int:
    from perennial.local import runs

    return runs.logs(_settings(), args.run, project=args.project, step=args.step)


def _runs_retry(args: argparse.Namespace) -> int:
    from perennial.local import runs

    return runs.retry(_settings(), args.run, wait=not args.no_wait)


def _runs_terminate(args: argparse.Namespace) -> int:
    from perennial.local import runs

    return runs.terminate(_settings(), args.run, project=args.project)


def _features_list(args: argparse.Namespace) -> int:
    from perennial.local import features

    return features.listing(_settings(), args.project, as_json=args.json)


def _features_show(args: argparse.Namespace) -> int:
    from perennial.local import features

    return features.show(_settings(), args.project, args.feature, as_json=args.json)


def _features_materialize(args: argparse.Namespace) -> int:
    from perennial.local import features

    return features.materialize(_settings(), args.project, as_json=args.json)


def _features_parity(args: argparse.Namespace) -> int:
    from perennial.local import features

    return features.compare(
        _settings(), args.project, entities=args.entities, seed=args.seed, as_json=args.json
    )


def _pipeline_compile(args: argparse.Namespace) -> int:
    from perennial.local import spec

    return spec.compile_training(_settings(), check=args.check, to=args.to)


def _pipeline_run(args: argparse.Namespace) -> int:
    from perennial.local import spec

    return spec.run_once(_settings(), args.project, source=args.source, as_of=args.as_of)


def _pipeline_upload(args: argparse.Namespace) -> int:
    from perennial.local import spec

    return spec.upload(_settings())


def _pipeline_schedule(args: argparse.Namespace) -> int:
    from perennial.local import spec

    return spec.schedule(
        _settings(), args.project, when=args.cron, off=args.off, patience_s=args.patience
    )


def _expectations_suggest(args: argparse.Namespace) -> int:
    from perennial.local import rules

    return rules.suggest(_settings(), args.project, source=args.source)


def _quarantine_list(args: argparse.Namespace) -> int:
    from perennial.local import quarantine

    return quarantine.listing(_settings(), args.project, as_json=args.json)


def _quarantine_show(args: argparse.Namespace) -> int:
    from perennial.local import quarantine

    return quarantine.show(
        _settings(), args.project, args.batch, rows=args.rows, to=args.to, as_json=args.json
    )


def _quarantine_replay(args: argparse.Namespace) -> int:
    from perennial.local import quarantine

    return quarantine.replay(_settings(), args.project, args.batch, rows=args.rows)


def _quarantine_drop(args: argparse.Namespace) -> int:
    from perennial.local import quarantine

    return quarantine.drop(_settings(), args.project, args.batch, because=args.because)


def _project_check(args: argparse.Namespace) -> int:
    from perennial import project
    from perennial.local import folders

    found = project.load(folders.project_folder(_settings(), args.project))
    print(f"{found.name} is a valid project: {len(found.features)} features, {found.kind}")
    return 0


def _project_schema(args: argparse.Namespace) -> int:
    import json

    from perennial import project

    print(json.dumps(project.schema(), indent=2, sort_keys=True))
    return 0


def _data_break(args: argparse.Namespace) -> int:
    from perennial.local import data

    return data.break_(
        args.file,
        args.fault,
        args.to,
        column=args.column,
        other=args.other,
        share=args.share,
        seed=args.seed,
        header=not args.no_header,
    )


def _data_breaks(args: argparse.Namespace) -> int:
    from perennial.local import data

    return data.listing()


def _settings() -> "Settings":
    from perennial.settings import Settings

    return Settings.load()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors of ours are one line on stderr with their exit code."""
    args = build_parser().parse_args(argv)
    if args.version:
        from perennial import __version__

        print(f"perennial {__version__}")
        return 0
    if not args.command:
        print(OVERVIEW, end="")
        return 0
    try:
        return args.do(args)  # type: ignore[no-any-return]
    except PerennialError as exc:
        print(f"perennial: {exc}", file=sys.stderr)
        return exc.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except OSError as exc:
        print(f"perennial: {exc.filename or 'a file'}: {exc.strerror or exc}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("perennial: stopped by Ctrl-C", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
