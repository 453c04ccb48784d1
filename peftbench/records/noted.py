"""Whether the record of a run that has ended says what is asked of it."""

from __future__ import annotations

from peftbench.config.schema import Run
from peftbench.config.search import is_unreported
from peftbench.records.record import Record, Searched


def is_over(run: Run, record: Record) -> bool:
    """Return whether a run has come to the end that is asked of it: that of a trial may be the selection score.

    Args:
        run: with its search, of which it may be a trial.
    """
    return record.has_ended or (record.unreported and is_unreported(run))


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
    """Return whether the selection split must still be scored; a run that diverged has no score."""
    return selecting and record.selection is None and record.diverged is None
