"""What is left to do for a run of a sweep, by its record. Torch is imported only where measures are asked for."""

from __future__ import annotations

from enum import Enum, auto

from peftbench.config.schema import Run
from peftbench.records.choice import NoChoice, settle_search
from peftbench.records.noted import is_cleared, is_noted, is_over, lacks_selection
from peftbench.records.record import Record, find_record
from peftbench.records.run_files import has_leftovers
from peftbench.sweeps.plan import Member
from peftbench.utils.errors import UserError


class Left(Enum):
    """What is left to do for a run."""

    training = auto()  # or scoring: something must be computed
    noting = auto()  # nothing must be computed, but its record does not say all, or a sentence says why it cannot run
    nothing = auto()


def find_left(member: Member) -> Left:
    """Return what is left to do for a run whose search, if it has one, has been settled as far as it can be.

    Noted are runs that are done, for which a search has chosen, and those for which a search cannot choose, because its
    trials failed.
    """
    run = member.run
    try:
        _, search = settle_search(run, member.compared)
    except NoChoice:
        return Left.noting
    except UserError:  # without a choice, the run is refused where it would be trained
        return Left.training
    record, is_trial = find_record(member.folder), search is not None and search.role == "trial"
    if record is None or run.rerun:
        return Left.training
    if not record.has_ended and is_over(run, record):  # a trial that is trained
        return Left.nothing if is_cleared(record) else Left.training
    if not record.has_ended or has_leftovers(member.folder) or lacks_scores(run, record, is_trial):
        return Left.training
    return Left.nothing if is_noted(record, search, is_trial) else Left.noting


def lacks_scores(run: Run, record: Record, is_trial: bool = False) -> bool:
    """Return whether anything must be computed for a run that has ended."""
    if lacks_selection(record, is_trial):
        return True
    if run.retention is None and not run.speed:
        return False
    from peftbench.evaluation.measures import lacks_measures  # imports torch

    return lacks_measures(run, record)
