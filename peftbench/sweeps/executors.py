"""Start what trains the runs of a sweep where `hydra/launcher=` says.

peftbench stays the sweeper: it knows all runs, their order and their records, and a launcher is given jobs. A sweeper
plugin of Hydra could not be: Hydra parses the command line before it starts one, and knows neither several grids nor
the trials of a search.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peftbench.config.launchers import HydraLauncher, Ray, Slurm
from peftbench.sweeps.jobs import Ended, Executor, Job, train_attempt
from peftbench.utils.console import make_console
from peftbench.utils.errors import UserError
from peftbench.utils.progress import Display


def require_packages(launcher: Any) -> None:
    """Raise UserError if a package or program that the launcher needs is missing."""
    if isinstance(launcher, Slurm):
        if find_spec("submitit") is None:
            raise UserError(
                "hydra/launcher=slurm needs submitit, which is not installed: pip install peftbench[slurm]."
            )
        if missing := [name for name in ("sbatch", "squeue", "srun") if shutil.which(name) is None]:
            raise UserError(f"hydra/launcher=slurm: {missing[0]} is not on PATH; start the sweep where Slurm is.")
    if isinstance(launcher, Ray) and find_spec("ray") is None:
        raise UserError("hydra/launcher=ray needs ray, which is missing: pip install peftbench[ray].")


class InProcess:
    """An executor: it trains one run after another in this process, silently."""

    def run(self, jobs: Iterable[Job | None]) -> Iterator[tuple[Job, Ended]]:
        """Train the jobs; yield each with how it ended."""
        for job in filter(None, jobs):
            display = Display(make_console(), within_another=True)
            yield job, train_attempt(job.run, job.overrides, wait=job.wait, display=display, trial=job.trial)


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
    if isinstance(launcher, Slurm):
        from peftbench.sweeps.slurm import SlurmTasks

        yield SlurmTasks(launcher, logs)
        return
    if isinstance(launcher, Ray):
        from peftbench.sweeps.ray_cluster import RayTasks  # imports ray

        with RayTasks(launcher, logs) as tasks:
            yield tasks
        return
    raise TypeError(f"{launcher} is no launcher")
