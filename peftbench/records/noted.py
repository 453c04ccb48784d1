"""Whether the record of a run that has ended says what is asked of it."""

from __future__ import annotations

from peftbench.config.schema import Run
from peftbench.config.search import is_unreported
from peftbench.records.record import REPORT_SCORE, Record, Searched
from peftbench.records.run_files import has_leftovers


def is_over(run: Run, record: Record) -> bool:
    """Return whether a run has come to the end that is asked of it: that of a trial may be the selection score.

    Args:
        run: with its search, of which it may be a trial.
    """
    return record.has_ended or (record.unreported and is_unreported(run))


def is_cleared(record: Record) -> bool:
    """Return whether nothing is left of the training of a trial that is trained: its process may have died before it
    deleted the checkpoints. One that went on to be scored may have those of a baseline."""
    return record.status != "trained" or not has_leftovers(record.folder, trained=True)


def is_noted(record: Record, search: Searched | None, selecting: bool) -> bool:
    """Return whether the record has its score on the selection split, and says what the run is in a search.

    Args:
        search: what the run is in a search now.
        selecting: whether that score is wanted.
    """
    if lacks_selection(record, selecting):
        return False
    if search is None:  # a run by itself, which a trial now is too
        return record.search is None or record.search.role == "final"
    return search.role == "trial" or record.search == search


def lacks_selection(record: Record, selecting: bool) -> bool:
    """Return whether the selection split must still be scored; a training that diverged has no score."""
    diverged = record.diverged is not None and record.diverged.what != REPORT_SCORE
    return selecting and record.selection is None and not diverged
