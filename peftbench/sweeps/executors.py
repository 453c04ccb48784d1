"""Start what trains the runs of a sweep where `hydra/launcher=` says.

peftbench stays the sweeper: it knows all runs, their phases and their records, and a launcher is given jobs. A sweeper
plugin of Hydra could not be: Hydra parses the command line before it starts one, and knows neither several grids nor
the trials of a search.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftbench.config.launchers import HydraLauncher
from peftbench.sweeps.jobs import Executor


def require_packages(launcher: Any) -> None:
    """Raise UserError if a package or program that the launcher needs is missing."""


@contextmanager
def start_executor(launcher: Any, logs: Path) -> Iterator[Executor]:
    """Provide the executor of a launcher.

    Args:
        launcher: its settings, see `config.launchers`.
        logs: the folder for what the runs print.
    """
    if isinstance(launcher, HydraLauncher):
        from peftbench.sweeps.hydra_launcher import HydraJobs

        yield HydraJobs(launcher)
        return
    raise TypeError(f"{launcher} is no launcher")
