"""Runs of a sweep through any launcher of Hydra's plugins, such as joblib's or submitit's.

Such a launcher composes each run again where the run is trained, and returns when all runs of a batch have ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from peftbench.config.compose import resolve_run
from peftbench.config.conf_sources import CONFIG_NAME, open_hydra
from peftbench.config.launchers import HydraLauncher
from peftbench.config.schema import Run
from peftbench.sweeps.jobs import Ended, Job, train_attempt
from peftbench.sweeps.resolve import resolve_points
from peftbench.utils.console import say
from peftbench.utils.environment import run_alone
from peftbench.utils.errors import print_faults

INTERRUPTED = 130  # the exit code


class HydraJobs:
    """An executor: it hands all jobs to a launcher of Hydra's as one batch."""

    def __init__(self, launcher: HydraLauncher) -> None:
        self.launcher = launcher

    def run(self, jobs: Iterable[Job | None]) -> Iterator[tuple[Job, Ended]]:
        """Train the jobs; yield each once all have ended."""
        batch = list(filter(None, jobs))
        # The folder of the sweep lies in its output_dir.
        shared = [word for word in batch[0].overrides if word.startswith("output_dir=")]
        with open_hydra(self.launcher.config_dir):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            config = hydra.compose_config(
                CONFIG_NAME, [*self.launcher.words, *shared], RunMode.MULTIRUN, with_log_configuration=False
            )
            context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config))
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=context, task_function=train_composed, config=config
            )
            returned = launcher.launch([job.overrides for job in batch], initial_job_idx=batch[0].number - 1)
        for job, job_return in zip(batch, returned, strict=True):
            _ = job_return.return_value  # raises what ended the job, if it was no fault of the run
            yield job, Ended()


def train_composed(cfg: DictConfig) -> float:
    """Train one run that Hydra has composed; return its score on the selection split (`compute_objective`)."""
    run_alone()
    job = HydraConfig.get()
    ((overrides, run),) = resolve_points([(list(job.overrides.task), resolve_run(cfg))])
    return train_for_hydra(job.job.num + 1, run, overrides, selecting=False)


def train_for_hydra(number: int, run: Run, overrides: list[str], selecting: bool) -> float:
    """Train one run that a sweeper or launcher of Hydra's has started; a run that fails is recorded and ends nothing.

    A run that another process is at is waited for, since nobody comes back to it.

    Args:
        selecting: the sweeper decides on its next runs by this one.

    Returns:
        What such a sweeper may maximise (`records.choice.compute_objective`).
    """
    say(f"\nrun {number}: {' '.join(overrides)}")
    try:
        ended = train_attempt(run, overrides, wait=True, selecting=selecting)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    print_faults(ended.faults)
    if ended.given:
        say(ended.given)
    return ended.objective
