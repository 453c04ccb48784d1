"""`peftbench train` as a Hydra application: one job, or a sweep of jobs (-m), each of which is `train.train(cfg)`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from peftbench import mps
from peftbench.cli import print_faults
from peftbench.compose import AND, CONFIG_NAME, compose_points
from peftbench.config import Run, conf_dir, resolve
from peftbench.errors import UserError, of_the_machine
from peftbench.progress import Display, is_live
from peftbench.quick_imports import quick_imports
from peftbench.results.columns import duration
from peftbench.results.live import LiveSweep
from peftbench.results.record import distinctive, find, finished
from peftbench.results.sweep import FOLDER, Member, Sweep
from peftbench.search import Point, check, is_open, phases
from peftbench.terminal import say, terminal
from peftbench.workers import Ended, Job, Workers, attempt

INTERRUPTED = 130  # the exit code

display: Display | None = None  # of the run of a sweep that is shown as a whole
put_off: list[tuple[Run, list[str]]] = []  # runs of this sweep that another process was at, with what was typed


def run(argv: list[str]) -> int:
    """Check the whole command line, run its jobs, and close a sweep with the table of its runs."""
    args = _arguments(argv)
    argv = [*(word for word in argv if word not in args.overrides), *args.overrides]  # as Hydra's own parser wants them
    sys.argv = ["peftbench train", *argv]
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        if args.cfg:
            compose_points(args)
        job()
        return 0
    composed = compose_points(args)
    check(composed)
    points = solved(composed)
    own_sweeper = any(word.startswith("hydra/sweeper=") for word in args.overrides)  # decides on its runs as it goes
    searching = any(is_open(run) for _, run in points)
    joined = AND in args.overrides
    jobs = composed[0][1].jobs
    for own in ("hydra/sweeper", "hydra/launcher"):
        if any(word.startswith(f"{own}=") for word in args.overrides):
            if jobs != "1":
                raise UserError(f"{own}= and jobs={jobs} both decide where a run goes; leave one of the two out.")
            if searching:
                raise UserError(f"{own}= and search= both decide when what is trained; leave one of the two out.")
            if joined:
                raise UserError(f"{own}= takes one grid and not several; leave it out, or what stands behind {AND}.")
    if not searching and (not args.multirun or own_sweeper):
        job()
        return 0
    trials, final = phases(composed)
    beside_trials, beside_final = (_places([run for _, run in phase]) for phase in (trials, final))
    sweep = Sweep.start(solved(final), argv, solved(trials))
    put_off.clear()
    try:
        with _shown(sweep):
            if searching:
                _phase(trials, sweep.trials, beside_trials)
                sweep.settle()
            if searching or joined or len(beside_final) > 1:
                _phase(final, sweep.members, beside_final, before=len(trials))
            else:
                job()
                _wait_for_put_off()
    except (KeyboardInterrupt, SystemExit) as exit:
        if isinstance(exit, SystemExit) and exit.code != INTERRUPTED:
            raise
        sweep.show()
        return INTERRUPTED
    return sweep.show()


def _arguments(argv: list[str]) -> Namespace:
    parser = get_args_parser()
    parser.prog = "peftbench train"
    args, rest = parser.parse_known_intermixed_args(argv)
    if rest:
        raise UserError(
            f"{rest[0]} is no option of peftbench train: -m, --config-dir FOLDER, --cfg job and --help are; keys have "
            "no dashes, as in method=lora."
        )
    if args.cfg and args.multirun:
        raise UserError("--cfg shows the config of one run; leave out -m, and name one value of each key.")
    return args


@contextmanager
def _shown(sweep: Sweep) -> Iterator[None]:
    """The sweep as a table that grows, on a terminal; elsewhere each run prints its own lines."""
    global display
    console = terminal()
    if not is_live(console):
        yield
        return
    display = Display(console, within_another=True)
    try:
        with LiveSweep(sweep, console, below=display.progress):
            yield
    finally:
        display = None


def _phase(
    points: Sequence[Point], members: Sequence[Member], at_once: Sequence[dict[str, str]], before: int = 0
) -> None:
    """Train runs that are composed already; when it ends, none of them is under way in another process.

    Args:
        members: where the runs lie.
        at_once: of each run that goes on at once, see `places.places`.
        before: the number of runs before them.
    """
    if len(at_once) > 1:
        _side_by_side(_jobs(points, [member.folder for member in members]), at_once)
    else:
        for number, (overrides, run) in enumerate(points, start=before + 1):
            if display is None:
                say(f"\nrun {number}: {' '.join(overrides)}")
            _in_sweep(run, overrides)
    _wait_for_put_off()


def _wait_for_put_off() -> None:
    """The runs that other processes were at, once these have ended."""
    while put_off:
        run, overrides = put_off.pop(0)
        say(f"\nwaiting for the other process: {' '.join(overrides)}")
        _in_sweep(run, overrides, wait=True)


def solved(points: list[tuple[list[str], Run]]) -> list[tuple[list[str], Run]]:
    """The runs with bottlenecks for their budgets, on which their folders depend. Imports no torch without a budget.

    Each job solves its own again; here all are refused before the first one trains.
    """
    if all(run.budget is None for _, run in points):
        return points
    from peftbench.params.solve import solve_all

    return [(point[0], run) for point, run in zip(points, solve_all(run for _, run in points), strict=True)]


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=CONFIG_NAME)
def job(cfg: DictConfig) -> float:
    """One run, alone or of a sweep."""
    run, overrides = resolve(cfg), list(HydraConfig.get().overrides.task)
    sources = HydraConfig.get().runtime.config_sources
    own = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        if display is None:
            say(f"\nrun {HydraConfig.get().job.num + 1}: {' '.join(overrides)}")
        return _in_sweep(run, overrides)
    with quick_imports():
        from peftbench.train import train

    try:
        return train(run, [*own, *overrides])
    except UserError as error:
        print_faults(error.faults)
        raise SystemExit(2) from None
    except OSError as error:
        if (sentence := of_the_machine(error)) is None:
            raise
        print_faults([sentence])
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print_faults(["interrupted; the same line goes on with this run."])
        raise SystemExit(INTERRUPTED) from None


def _in_sweep(run: Run, overrides: list[str], wait: bool = False) -> float:
    """One run of a sweep: one that fails is recorded as failed, and the next one starts."""
    try:
        ended = attempt(run, overrides, wait, display)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    return _take(ended, run, overrides)


def _take(ended: Ended, run: Run, overrides: list[str]) -> float:
    """Say what there is to say of a run that ended; another process's is put off."""
    if ended.busy:
        put_off.append((run, overrides))
    if ended.faults and display is not None:  # elsewhere it stands above them
        print(f"peftbench: {' '.join(overrides)}", file=sys.stderr)
    print_faults(ended.faults)
    return ended.score


def _places(runs: Sequence[Run]) -> list[dict[str, str]]:
    """`places.places`, which takes longer to import than to know that there is one place.

    Raises:
        UserError: there, or because of `mps`.
    """
    if all(run.jobs == "1" for run in runs):
        return [{}]
    from peftbench.places import places

    found = places(runs)
    mps.wanted(_mps(runs), found)  # refused before anything is written
    return found


def _mps(runs: Sequence[Run]) -> bool | str:
    """The `mps` of a sweep. Raises UserError where it differs from run to run."""
    asked = {str(run.mps).lower(): run.mps for run in runs}
    if len(asked) > 1:
        raise UserError(f"mps={','.join(sorted(asked))}: a sweep has one way to share its GPUs, not several.")
    (mode,) = asked.values()
    return mode


def _jobs(points: Sequence[Point], folders: Sequence[Path]) -> list[Job]:
    """Runs with all that a worker must know of them.

    Args:
        points: the runs as they are trained, with the overrides that make them.
        folders: of each run; that of one with a budget has the solved bottlenecks in its name.
    """
    typed = [[word for word in overrides if not word.startswith(("hydra.", "hydra/"))] for overrides, _ in points]
    keys = distinctive([dict(word.partition("=")[::2] for word in words) for words in typed])
    return [
        Job(number, words, " ".join(word for word in words if word.partition("=")[0] in keys), run, folder)
        for number, (words, (_, run), folder) in enumerate(zip(typed, points, folders, strict=True), start=1)
    ]


def _side_by_side(jobs: Sequence[Job], at_once: Sequence[dict[str, str]]) -> None:
    """Runs in workers, a line for each that ends. Those that are done need no worker.

    Args:
        at_once: of each worker, see `places.places`.
    """
    # What a search has chosen is noted in the record of a run that is done.
    waiting = [job for job in jobs if job.run.rerun or job.run.search is not None or finished(job.folder) is None]
    if not waiting:
        return
    at_once = at_once[: len(waiting)]
    logs = Path(waiting[0].run.output_dir).expanduser() / FOLDER / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    with (
        mps.shared(_mps([job.run for job in waiting]), at_once, logs) as shared,
        Workers(shared, logs) as workers,
    ):
        through = " through MPS" if any(mps.PIPES in place for place in shared) else ""
        say(f"{len(waiting)} runs, {len(at_once)} at once{through}; what they print is in {logs}")
        for count, (job, ended) in enumerate(workers.run(waiting), start=1):
            if display is None:
                say(f"{count} of {len(waiting)}: {job.settings}: {_result(job)}")
            _take(ended, job.run, job.overrides)


def _result(job: Job) -> str:
    """How a run ended, by its record."""
    record = find(job.folder)
    if record is None:
        return "missing"
    if record.status != "done" or record.score is None:
        return record.status
    return f"{record.metric} {record.score:.2f}, {duration(record.timings['total_s'])}"
