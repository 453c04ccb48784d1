"""Optuna's part of a study: its storage, its sampler, and its judgement of looks.

The storage is a journal, a file to which each process appends: a study survives a kill, and workers on other machines
judge by the same trials. A sampler is made anew for each trial, from the seed and the number of trials: what is chosen
depends only on what the journal has.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from peftbench.config.schema import Run, Sampler, Search, Variation, get_value
from peftbench.config.studies import GROUPS, TrialOf, list_multiples
from peftbench.utils.errors import UserError
from peftbench.utils.files import refuse_links

optuna.logging.set_verbosity(optuna.logging.WARNING)
WARM_UP = 5  # trials that are never judged
CANDIDATES = 24  # of which TPE takes the one that is most likely to be good
LOYALTY = 20  # suggestions in vain before random ones
STRIDE = 1_000_003  # between the seeds of two studies, so that their trials have no seed in common


def open_study(file: Path, name: str, objectives: int) -> optuna.Study:
    """Open a study, or begin it. What a killed process has written of its last line is deleted.

    Args:
        objectives: 1, the selection score; 2, also the stored parameters.

    Raises:
        UserError: the journal is damaged.
    """
    refuse_links(file.parent)
    _end_last_line(file)
    try:
        return optuna.create_study(
            storage=_open_storage(str(file)),
            study_name=name,
            load_if_exists=True,
            directions=["maximize", "minimize"][:objectives],
        )
    except OSError:
        raise
    except Exception as error:  # of any kind, since Optuna takes each line as its own
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:100]}); restore it, or delete "
            "it: the study then begins anew, and runs that are done are not trained again."
        ) from error


def _end_last_line(file: Path) -> None:
    """Delete what follows the last line break of a journal: Optuna would append to it, and never read it again."""
    if not file.exists():
        return
    lock = _JournalLock(str(file))
    lock.acquire()
    try:
        with file.open("r+b") as journal:
            content = journal.read()
            journal.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()


class _JournalLock(JournalFileOpenLock):
    """A lock that the system releases when its process ends, as that of a run (`records.lock`).

    Optuna's own is a file that a killed process leaves behind. After half a minute it is taken by force, also from a
    process that has only been stopped and will go on writing.
    """

    def __init__(self, file: str) -> None:
        self.lock = FileLock(f"{file}.lock")

    def acquire(self) -> bool:
        self.lock.acquire()
        return True

    def release(self) -> None:
        self.lock.release()


def _open_storage(file: str) -> JournalStorage:
    return JournalStorage(JournalFileBackend(file, lock_obj=_JournalLock(file)))


def make_sampler(search: Search, study: optuna.Study, trials: int, in_vain: int) -> BaseSampler:
    """Return the sampler for the next trial of a study that has so many.

    Args:
        in_vain: suggestions since the last one that could be trained. A sampler that learns from scores learns nothing
            from these, and would repeat them. TPE then draws one candidate near the good trials and takes it, in place
            of the best of 24; every other one is random after `LOYALTY` of them, and with NSGA-II from the first.
    """
    seed = search.sampler_seed * STRIDE + trials
    loyal = LOYALTY if search.sampler is Sampler.tpe else 1
    if search.sampler is Sampler.random or (in_vain >= loyal and in_vain % 2) or _lacks_good_trials(study):
        return RandomSampler(seed=seed)
    if search.sampler is Sampler.nsgaii:
        return NSGAIISampler(population_size=max(4, (search.trials or 0) // 4), seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both are called experimental
        return TPESampler(
            seed=seed,
            multivariate=True,  # what goes together is learnt together
            constant_liar=True,  # trials that run count as bad ones
            n_ei_candidates=1 if in_vain else CANDIDATES,
        )


def _lacks_good_trials(study: optuna.Study) -> bool:
    """Return whether so few trials have a score that TPE, to which the best tenth are good ones, would take others,
    such as diverged ones, for good. With two objectives, versions 4 of Optuna end with a TypeError there."""
    done, others = (len(list_by_state(study, state)) for state in ("COMPLETE", "PRUNED"))
    return 10 * done < done + others


def tell_diverged(study: optuna.Study, number: int) -> None:
    """Tell the study that a trial diverged.

    It is told as pruned and without a value: TPE then has it among the bad trials, with one objective as with two, and
    for NSGA-II it is no parent. A failed trial TPE ignores, and comes back to the same region again and again. A bad
    value in place of the score would be made up, and with two objectives could lie on the front.
    """
    study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)


def repeat_trial(study: optuna.Study, trial: FrozenTrial) -> FrozenTrial:
    """Begin a trial with the parameters and attributes of one that has ended, which Optuna can be told nothing more of.

    The journal has it as one line, so that a process that dies leaves all of it or nothing.
    """
    study.add_trial(
        create_trial(
            state=TrialState.RUNNING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=trial.user_attrs,
            system_attrs=trial.system_attrs,  # among them its generation, without which it is no parent for NSGA-II
        )
    )
    return next(one for one in reversed(list_by_state(study, "RUNNING")) if one.user_attrs == trial.user_attrs)


def make_distributions(run: Run, space: Mapping[str, Variation]) -> dict[str, BaseDistribution]:
    """Return what Optuna draws for each key: numbers, or values as they are typed."""
    return {key: _make_distribution(run, key, variation) for key, variation in space.items()}


def _make_distribution(run: Run, key: str, variation: Variation) -> BaseDistribution:
    if variation.values:
        return CategoricalDistribution([str(value) for value in variation.values])
    if variation.times:
        return CategoricalDistribution(list_multiples(run, key, variation.times))
    assert variation.low is not None and variation.high is not None
    if _is_whole(run, key, variation):
        return IntDistribution(int(variation.low), int(variation.high), log=variation.log)
    return FloatDistribution(variation.low, variation.high, log=variation.log)


def _is_whole(run: Run, key: str, variation: Variation) -> bool:
    try:
        base: Any = None if key in GROUPS else get_value(run, key)
    except KeyError:
        base = None
    if base is None:
        return float(variation.low or 0).is_integer() and float(variation.high or 0).is_integer()
    return isinstance(base, int)


class JudgedTrial:
    """A trial in the process that trains it, which may be on another machine than the study."""

    def __init__(self, trial: TrialOf) -> None:
        pruner = optuna.pruners.MedianPruner(WARM_UP)
        storage = _open_storage(trial.storage)
        self.study = optuna.load_study(study_name=trial.study, storage=storage, pruner=pruner)
        (frozen,) = [one for one in self.study.get_trials(deepcopy=False) if one.number == trial.number]
        self.trial = optuna.trial.Trial(self.study, frozen._trial_id)  # the id by which Optuna's workers find a trial

    def judge(self, step: int, value: float) -> bool:
        """Return whether a look is worse than the median of the other trials at the same step."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a look that an interrupted attempt has reported already is kept
            self.trial.report(value, step)
        return bool(self.trial.should_prune())

    def prune(self) -> None:
        """Tell the study that the trial was given up."""
        self.study.tell(self.trial.number, state=TrialState.PRUNED, skip_if_finished=True)


def list_by_state(study: optuna.Study, *states: str) -> list[FrozenTrial]:
    """Return the trials in the given states, such as RUNNING, in their order."""
    found: list[FrozenTrial] = study.get_trials(deepcopy=False, states=[TrialState[state] for state in states])
    return found


def note_attribute(study: optuna.Study, trial: FrozenTrial, name: str, value: str) -> None:
    """Give a trial an attribute, unless it has it."""
    if name not in trial.user_attrs:
        optuna.trial.Trial(study, trial._trial_id).set_user_attr(name, value)  # the id by which workers find a trial
