"""Which parameters fit best, and what model do they give?"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perennial import bundle, contract, registry
from perennial.contract import Contract
from perennial.data import split as splits
from perennial.project import Project, Search
from perennial.records import Lineage
from perennial.settings import Settings, StateFolder
from perennial.steps import context

if TYPE_CHECKING:
    import optuna
    from xgboost import Booster, DMatrix

# More threads wait for each other by spinning: on a busy machine that is 20 times slower.
NTHREAD = 1
PATIENCE = 20  # rounds without a better score before boosting stops
GOLDEN_ROWS = 32
TELL_EVERY = 5  # trials between two lines of progress

Matrix = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Trial:
    """One parameter setting, scored on every fold."""

    number: int
    parameters: dict[str, Any]
    scores: tuple[float, ...]  # one a fold
    rounds: int  # mean of what was best in each fold

    @property
    def score(self) -> float:
        return float(np.mean(self.scores))

    @property
    def spread(self) -> float:
        """Standard deviation over the folds."""
        return float(np.std(self.scores))


@dataclass(frozen=True)
class Fit:
    """A closed model and how its parameters were found."""

    digest: str
    rows: int
    metric: str
    best: Trial
    trials: tuple[Trial, ...]

    @property
    def scores(self) -> dict[str, float]:
        """Numbers for a dashboard."""
        return {
            f"cv_{self.metric}": self.best.score,
            f"cv_{self.metric}_spread": self.best.spread,
            "rounds": float(self.best.rounds),
            "training_rows": float(self.rows),
        }


@dataclass(frozen=True)
class _Stretch:
    """One fold, as matrices that are built once for all trials."""

    train: "DMatrix"
    valid: "DMatrix"


@dataclass(frozen=True)
class _Table:
    """Training rows as numbers, with the contract that made them."""

    frame: pd.DataFrame
    contract: Contract
    matrix: Matrix


def train(
    settings: Settings,
    project: Project,
    table: Path,
    out: Path,
    *,
    as_of: datetime,
    data_digest: str,
    seed: int,
    trials: int,
    run: str,
) -> Fit:
    """Search, fit and close ``out/model``; a seed below 0 and 0 trials mean the project's.

    The same rows, code, lock, seed and trials give the same digest.
    """
    frame = pd.read_parquet(table)
    seed = project.training.seed if seed < 0 else int(seed)
    wanted = int(trials) or project.training.trials
    rows = _encoded(project, splits.split(project, frame).train)
    tried = _search(project, rows, _Budget(settings.state(project.name), run, seed, wanted))
    best = max(tried, key=lambda t: (t.score * _sign(project.training.metric), -t.number))
    lineage = _lineage(settings, project, data_digest, best, wanted, seed, as_of)
    booster = _fit(project, rows, best, seed)
    files = bundle.files(
        booster,
        rows.contract.to_json(),
        project,
        lineage,
        _sample(rows.matrix, GOLDEN_ROWS, seed),
        _reference(project, frame, rows.contract, seed),
    )
    fit = Fit(bundle.close(out, files), len(rows.frame), project.training.metric, best, tried)
    _track(settings, project, fit, lineage, run)
    return fit


def _encoded(project: Project, frame: pd.DataFrame) -> _Table:
    learned = contract.learn(project.features, frame)
    return _Table(frame, learned, learned.for_model(learned.encode(frame)))


@dataclass(frozen=True)
class _Budget:
    """How long to search and where the search is kept."""

    state: StateFolder
    run: str
    seed: int
    trials: int


def _search(project: Project, rows: _Table, budget: _Budget) -> tuple[Trial, ...]:
    """Try parameters until the study holds enough trials; an interrupted study goes on."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=budget.run,
        storage=_storage(budget.state),
        direction="maximize" if _sign(project.training.metric) > 0 else "minimize",
        load_if_exists=True,
    )
    stretches = _stretches(project, rows)
    while (done := len(_finished(study))) < budget.trials:
        # A seed for each trial: a search that was interrupted ends where another one would.
        seed = budget.seed * 100_003 + done
        study.sampler = optuna.samplers.TPESampler(seed=seed % 2**32)
        study.optimize(lambda t: _objective(t, project, stretches, budget.seed), n_trials=1)
        _tell(done + 1, budget.trials, study, project.training.metric)
    return tuple(_trial(t) for t in _finished(study))


def _storage(state: StateFolder) -> "optuna.storages.RDBStorage":
    import optuna
    from sqlalchemy.pool import NullPool

    state.root.mkdir(parents=True, exist_ok=True)
    if state.database_url:
        return optuna.storages.RDBStorage(state.database_url, engine_kwargs={"poolclass": NullPool})
    url = f"sqlite:///{state.root / 'studies.db'}"
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 30}})


def _finished(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    import optuna

    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))


def _objective(
    trial: "optuna.Trial", project: Project, stretches: Sequence[_Stretch], seed: int
) -> float:
    suggested = _suggest(trial, project.training.search)
    found = [_boost(project, s, suggested, seed) for s in stretches]
    trial.set_user_attr("scores", [score for score, _ in found])
    trial.set_user_attr("rounds", max(1, round(float(np.mean([rounds for _, rounds in found])))))
    return float(np.mean([score for score, _ in found]))


def _suggest(trial: "optuna.Trial", search: Search) -> dict[str, Any]:
    return {
        "max_depth": trial.suggest_int("max_depth", *search.max_depth),
        "eta": trial.suggest_float("eta", *search.eta, log=True),
        "min_child_weight": trial.suggest_float(
            "min_child_weight", *search.min_child_weight, log=True
        ),
        "subsample": trial.suggest_float("subsample", *search.subsample),
        "colsample_bytree": trial.suggest_float("colsample_bytree", *search.colsample_bytree),
        "reg_lambda": trial.suggest_float("reg_lambda", *search.reg_lambda, log=True),
    }


def _boost(
    project: Project, stretch: _Stretch, parameters: dict[str, Any], seed: int
) -> tuple[float, int]:
    """Score on the later rows of a fold, and after how many rounds boosting stopped.

    It stops by log loss, whatever the score: a ranking is best long before probabilities are.
    """
    import xgboost

    told: dict[str, dict[str, list[float]]] = {}
    booster = xgboost.train(
        _all_parameters(project, parameters, seed),
        stretch.train,
        num_boost_round=project.training.rounds,
        evals=[(stretch.valid, "valid")],
        early_stopping_rounds=PATIENCE,
        evals_result=told,
        verbose_eval=False,
    )
    best = int(booster.best_iteration)
    return told["valid"][project.training.metric][best], best + 1


def _fit(project: Project, rows: _Table, best: Trial, seed: int) -> "Booster":
    import xgboost

    everything = _quantiles(rows, np.arange(len(rows.frame)))
    parameters = _all_parameters(project, best.parameters, seed)
    return xgboost.train(parameters, everything, num_boost_round=best.rounds)


def _all_parameters(project: Project, chosen: dict[str, Any], seed: int) -> dict[str, Any]:
    return {
        "objective": "binary:logistic",
        "tree_method": "hist",
        # The last one is what early stopping looks at.
        "eval_metric": list(dict.fromkeys([project.training.metric, "logloss"])),
        "nthread": NTHREAD,
        "seed": seed,
        **chosen,
    }


def _stretches(project: Project, rows: _Table) -> tuple[_Stretch, ...]:
    found = []
    for fold in splits.folds(project, rows.frame):
        train = _quantiles(rows, fold.train)
        found.append(_Stretch(train, _quantiles(rows, fold.valid, like=train)))
    return tuple(found)


def _quantiles(rows: _Table, places: splits.Rows, like: "DMatrix | None" = None) -> "DMatrix":
    import xgboost

    return xgboost.QuantileDMatrix(
        rows.matrix[places],
        label=rows.frame["label"].to_numpy()[places],
        feature_names=list(rows.contract.names),
        feature_types=["c" if kind == "category" else "q" for kind in rows.contract.kinds],
        enable_categorical=True,
        nthread=NTHREAD,
        ref=like,
    )


def _trial(found: "optuna.trial.FrozenTrial") -> Trial:
    return Trial(
        found.number,
        dict(found.params),
        tuple(found.user_attrs["scores"]),
        int(found.user_attrs["rounds"]),
    )


def _sign(metric: str) -> int:
    return -1 if metric == "logloss" else 1


def _tell(done: int, wanted: int, study: "optuna.Study", metric: str) -> None:
    if done % TELL_EVERY == 0 or done == wanted:
        print(f"trial {done} of {wanted}: best {metric} {study.best_value:.4f}", flush=True)


def _lineage(
    settings: Settings,
    project: Project,
    data_digest: str,
    best: Trial,
    trials: int,
    seed: int,
    as_of: datetime,
) -> Lineage:
    commit, dirty = context.code_state(settings)
    chosen = {key: round(value, 6) for key, value in best.parameters.items()}
    return Lineage(
        data_digest=data_digest,
        code_commit=commit,
        code_dirty=dirty,
        parameters={**chosen, "rounds": best.rounds, "trials": trials},
        lock_digest=context.lock_digest(settings),
        seed=seed,
        as_of=as_of,
    )


def _sample(matrix: Matrix, count: int, seed: int) -> Matrix:
    """At most ``count`` rows, the same ones for the same seed, in their order."""
    if len(matrix) <= count:
        return matrix
    chosen = np.random.default_rng(seed).choice(len(matrix), count, replace=False)
    return matrix[np.sort(chosen)]


def _reference(project: Project, frame: pd.DataFrame, learned: Contract, seed: int) -> Matrix:
    """Rows that later traffic is compared with: the newest ones, labelled or not."""
    starts = sorted({project.window_start(t.to_pydatetime()) for t in frame["event_time"].unique()})
    newest = frame[frame["event_time"] >= starts[-project.drift.reference_windows :][0]]
    return _sample(learned.encode(newest), project.drift.reference_rows, seed)


def _track(settings: Settings, project: Project, fit: Fit, lineage: Lineage, run: str) -> None:
    registry.track_training(
        settings,
        project.name,
        run=run,
        digest=fit.digest,
        parameters={**lineage.parameters, "seed": lineage.seed, "metric": fit.metric},
        metrics=fit.scores,
        trials=[{"trial": t.number, "score": t.score, **t.parameters} for t in fit.trials],
    )
