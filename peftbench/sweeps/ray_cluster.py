"""Runs of a sweep as tasks of a Ray cluster.

Ray chooses the node and the share of a GPU. The tasks of a node that is lost start again on another one, and their runs
go on from their checkpoints, for which all nodes must see the sweep's output_dir.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import ray

from peftbench.config.launchers import Ray
from peftbench.sweeps.jobs import Ended, Job, take_ready, train_job
from peftbench.utils.console import say
from peftbench.utils.errors import UserError
from peftbench.utils.stopping import Stopped, heed_signals
from peftbench.utils.text import format_count


class RayTasks:
    """An executor: each job is a task of Ray; a context manager that leaves the cluster again.

    Args:
        logs: the folder for what the runs print, `run-1.log` and so on.
    """

    def __init__(self, settings: Ray, logs: Path) -> None:
        self.settings, self.logs = settings, logs.resolve()

    def __enter__(self) -> RayTasks:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a run of peftbench reports to nobody
        try:
            ray.init(
                address=self.settings.address,
                runtime_env=self.settings.runtime_env or None,
                log_to_driver=False,
                logging_level="ERROR",
                include_dashboard=False if self.settings.address is None else None,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"hydra/launcher=ray: {' '.join(str(error).split())[:300]}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ray.shutdown()

    def run(self, jobs: Iterable[Job | None]) -> Iterator[tuple[Job, Ended]]:
        """Train the jobs; yield each with how it ended, in the order in which they end.

        Known jobs are all given to Ray, `at_once` at a time if that is set; of jobs that are chosen one after another
        as many as the cluster has room for.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        asked, room = self._find_resources(), None
        slots = _count_slots(asked)
        if not slots:
            say(f"no node of the Ray cluster has {_describe(asked)} now; the runs wait for one")
        if self.settings.at_once is not None or not isinstance(jobs, Sequence):
            room = self.settings.at_once or max(1, slots)
        number = format_count(len(jobs), "run") if isinstance(jobs, Sequence) else "runs"
        say(
            f"{number} as tasks of Ray on {format_count(len(_list_nodes()), 'node')}; what they print is in {self.logs}"
        )
        waiting, following = iter(jobs), dict[Any, Job]()
        while True:
            free = None if room is None else max(0, room - len(following))
            for job in take_ready(waiting, free):
                following[self._submit(job, asked)] = job
            if not following:
                return
            (ready,), _ = ray.wait(list(following), num_returns=1)
            job = following.pop(ready)
            ended = _take(ready)
            if ended is None:  # the task was told to end, such as on a node that is drained
                following[self._submit(job, asked)] = job
            else:
                yield job, ended

    def _find_resources(self) -> dict[str, float]:
        """Return what a run asks of its node; without `gpus`, a GPU if the cluster has any."""
        gpus = self.settings.gpus
        if gpus is None:
            gpus = float(ray.cluster_resources().get("GPU", 0) > 0)
        return {"CPU": self.settings.cpus, "GPU": gpus, **self.settings.resources}

    def _submit(self, job: Job, asked: dict[str, float]) -> Any:
        task = ray.remote(_train_on_node).options(
            num_cpus=asked["CPU"],
            num_gpus=asked["GPU"],
            resources={name: amount for name, amount in asked.items() if name not in ("CPU", "GPU")},
            max_retries=self.settings.restarts,
            scheduling_strategy="SPREAD",
            name=f"peftbench {job.settings}",
        )
        return task.remote(job, os.getcwd(), str(self.logs / f"run-{job.number}.log"))


def _train_on_node(job: Job, directory: str, log: str) -> Ended | None:
    """Train a job. Returns None if the task was told to end before that. This is what a task of Ray does."""
    with suppress(OSError):
        os.chdir(directory)  # relative paths of the config are those of whoever started the sweep
    with _print_to(log):
        try:
            with heed_signals():
                ended = train_job(job)
        except Stopped:
            return None
        for sentence in ended.faults:
            say(f"peftbench: {sentence}")
    return replace(ended, last=False)


@contextmanager
def _print_to(log: str) -> Iterator[None]:
    """Send to a file what this process and its libraries print during the block."""
    kept = [os.dup(number) for number in (1, 2)]
    with open(log, "a", encoding="utf-8") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, before in zip((1, 2), kept, strict=True):
                os.dup2(before, number)
                os.close(before)


def _take(ready: Any) -> Ended | None:
    """Return the result of a task, or why Ray has none."""
    try:
        result: Ended | None = ray.get(ready)
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        return Ended(faults=(f"Ray lost this run: {said[-1].strip()}",))
    return result


def _list_nodes() -> list[dict[str, float]]:
    """Return the resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _count_slots(asked: dict[str, float]) -> int:
    """Return how many runs the cluster has room for at a time."""
    wanted = {name: amount for name, amount in asked.items() if amount > 0}
    return sum(
        min((int(node.get(name, 0) / amount) for name, amount in wanted.items()), default=1) for node in _list_nodes()
    )


def _describe(asked: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in asked.items() if amount > 0)
