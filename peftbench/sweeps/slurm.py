"""Runs of a sweep as tasks of Slurm job arrays, through submitit.

The sweep waits on the login node: it looks at squeue and at the runs' records, and computes nothing. If it is stopped,
the tasks go on; the same line follows them instead of submitting them again.
"""

from __future__ import annotations

import getpass
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from peftbench.config.launchers import Slurm, parse_minutes
from peftbench.records.noted import is_over
from peftbench.records.record import find_record
from peftbench.sweeps.jobs import Ended, Job, take_ready, train_job
from peftbench.utils.console import say
from peftbench.utils.errors import UserError, print_faults
from peftbench.utils.files import replace_file
from peftbench.utils.stopping import Stopped, heed_signals
from peftbench.utils.text import format_count

NOTES = "slurm"  # a folder of .sweeps: for each array a file that says which task is at which run
LARGEST_ARRAY = 1000  # Slurm's default for MaxArraySize is 1001
AT_ONCE = 8  # runs at a time, if they are chosen one after another
LOOKS = 3  # at a record before its run counts as lost: shared file systems show changes late
GRACE_S = 600.0  # how long a task that was told to end waits for Slurm to end it


class ArrayTask:
    """What a task of an array does. submitit pickles it, and submits what `checkpoint` returns when it requeues it."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self) -> None:
        requeue = _find_requeue()  # before our handlers take its place
        try:
            with heed_signals():
                ended = train_job(self.job)
        except Stopped as stopped:
            if stopped.number != signal.SIGTERM and requeue is not None:
                requeue(stopped.number, None)
            # Slurm requeues a task that it preempts only if the task still runs when its grace time is over.
            say("the run has stopped; waiting for Slurm to end this task")
            time.sleep(GRACE_S)
            sys.exit(1)
        for sentence in ended.faults:
            print_faults([sentence])

    def checkpoint(self) -> Any:
        """Return what is to be done when the task is started again: the same, since runs have checkpoints."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _find_requeue() -> Callable[[int, Any], Any] | None:
    """Return submitit's handler, which requeues the task and ends this process."""
    for number in (signal.SIGUSR2, signal.SIGUSR1):
        handler = signal.getsignal(number)
        if callable(handler):
            return handler
    return None


class SlurmTasks:
    """An executor: it submits job arrays, and follows tasks that an earlier process has submitted.

    Args:
        logs: the folder for what the tasks print, `ARRAY_TASK_0_log.out` and `.err`.
    """

    def __init__(self, settings: Slurm, logs: Path) -> None:
        self.settings, self.logs, self.notes = settings, logs.resolve(), logs.resolve().parent / NOTES

    def run(self, jobs: Iterable[Job | None]) -> Iterator[tuple[Job, Ended]]:
        """Train the jobs; yield each with how it ended, in the order in which they end.

        Known jobs are one array, or several if there are more than an array may have. Of jobs that are chosen one after
        another, `at_once` are submitted at a time.
        """
        limit = self.settings.at_once
        if isinstance(jobs, Sequence):
            if len(jobs) <= LARGEST_ARRAY:
                limit = None  # which the array keeps to by itself
        elif limit is None:
            limit = AT_ONCE
        waiting, following = iter(jobs), dict[str, Job]()
        before = self._find_live_tasks()
        try:
            while True:
                free = None if limit is None else max(0, limit - len(following))
                batch = list(take_ready(waiting, free))
                known = {before[str(job.folder.resolve())]: job for job in batch if str(job.folder.resolve()) in before}
                new = [job for job in batch if job not in known.values()]
                if known:
                    are = (
                        "is a task of Slurm already and is" if len(known) == 1 else "are tasks of Slurm already and are"
                    )
                    say(f"{format_count(len(known), 'run')} {are} followed")
                following |= known
                for start in range(0, len(new), LARGEST_ARRAY):
                    following |= self._submit(new[start : start + LARGEST_ARRAY])
                if not following:
                    return
                yield from self._await_some(following)
        except KeyboardInterrupt:
            arrays = " ".join(dict.fromkeys(task.partition("_")[0] for task in following))
            say(f"the tasks of Slurm go on; the same line follows them, and scancel {arrays} ends them")
            raise

    def _submit(self, jobs: Sequence[Job]) -> dict[str, Job]:
        """Submit an array; return its jobs by the ids of their tasks."""
        import submitit

        self.logs.mkdir(parents=True, exist_ok=True)
        settings = self.settings
        executor = submitit.SlurmExecutor(folder=self.logs, max_num_timeout=settings.timeouts)
        asked = {
            "partition": settings.partition,
            "account": settings.account,
            "qos": settings.qos,
            "gpus_per_node": settings.gpus,
            "cpus_per_task": settings.cpus,
        }
        further = {"requeue": True, **({} if settings.memory is None else {"mem": settings.memory}), **settings.options}
        executor.update_parameters(
            job_name="peftbench",
            time=parse_minutes(settings.time),
            signal_delay_s=settings.signal_s,
            array_parallelism=settings.at_once or len(jobs),
            additional_parameters=further,
            **{name: value for name, value in asked.items() if value is not None},
        )
        try:
            with executor.batch():
                tasks = [executor.submit(ArrayTask(job)) for job in jobs]
        except submitit.core.utils.FailedJobError as error:  # sbatch says why on its last line
            said = str(error).strip().splitlines() or ["no output"]
            raise UserError(f"hydra/launcher=slurm: sbatch refused the array: {said[-1]}.") from None
        for link in self.logs.glob(".submission_file_*.sh"):  # of submitit; peftbench refuses folders with links
            link.unlink()
        submitted = {str(task.job_id): job for task, job in zip(tasks, jobs, strict=True)}
        array = str(tasks[0].job_id).partition("_")[0]
        self.notes.mkdir(parents=True, exist_ok=True)
        with replace_file(self.notes / f"{array}.json") as file:
            json.dump({task: str(job.folder.resolve()) for task, job in submitted.items()}, file)
        say(f"{format_count(len(jobs), 'run')} as tasks of Slurm's array {array}; what they print is in {self.logs}")
        return submitted

    def _find_live_tasks(self) -> dict[str, str]:
        """Return the ids of tasks that Slurm still has, by the folders of their runs; forget arrays that are over."""
        files = list(self.notes.glob("*.json")) if self.notes.is_dir() else []
        if not files:
            return {}
        queued = _list_queued()
        if queued is None:
            raise UserError("hydra/launcher=slurm: squeue does not answer, and runs may be queued already; try later.")
        found: dict[str, str] = {}
        for file in files:
            with suppress(OSError, ValueError):
                tasks: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
                live = {folder: task for task, folder in tasks.items() if task in queued}
                found |= live
                if not live:
                    file.unlink()
        return found

    def _await_some(self, following: dict[str, Job]) -> Iterator[tuple[Job, Ended]]:
        """Wait until some tasks have ended; take them out and yield their jobs with how they ended."""
        gone: dict[str, int] = dict.fromkeys(following, 0)
        while True:
            time.sleep(self.settings.poll_s)
            queued = _list_queued()
            if queued is None:
                continue  # Slurm's controller is busy or restarts
            ended = []
            for task in [task for task in following if task not in queued]:
                gone[task] += 1
                result = self._describe(task, following[task], last=gone[task] >= LOOKS)
                if result is not None:
                    ended.append((following.pop(task), result))
            if ended:
                yield from ended
                return

    def _describe(self, task: str, job: Job, last: bool) -> Ended | None:
        """Return how the job of a task that Slurm no longer has ended; None if its record may still change."""
        record = find_record(job.folder)
        known = not job.run.rerun or (record is not None and record.created >= job.since)
        if record is not None and is_over(job.run, record) and known:
            for pickle in self.logs.glob(f"{task}_*.pkl"):  # for 10,000 runs these would be 20,000 files
                pickle.unlink(missing_ok=True)
            return Ended()
        if record is not None and record.status == "failed" and record.error is not None:
            return Ended(faults=(record.error.message,))
        if not last:
            return None
        if record is not None and record.status == "running":
            return Ended(busy=True)
        return Ended(faults=(f"the task {task} of Slurm ended before its run was done; see {self.logs.parent}.",))


def _list_queued() -> set[str] | None:
    """Return the ids of the user's tasks that Slurm has, waiting or running; None if it does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return set(printed.split())
