"""`peftbench train` as a Hydra application: one job, or a sweep of jobs (-m), each of which is `train.train(run)`."""

from __future__ import annotations

import math
import sys

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from peftbench.cli import print_faults
from peftbench.compose import CONFIG_NAME, compose_points
from peftbench.config import Run, conf_dir, resolve
from peftbench.errors import UserError
from peftbench.results.lock import Busy
from peftbench.search import Point, check, is_open, phases

INTERRUPTED = 130  # the exit code

put_off: list[tuple[Run, list[str]]] = []  # runs of this sweep that another process was at, with what was typed


def run(argv: list[str]) -> int:
    """Check the whole command line, run its jobs, and close a sweep with the table of its runs."""
    args = get_args_parser().parse_args(argv)
    sys.argv = ["peftbench train", *argv]
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        job()
        return 0
    composed = compose_points(args)
    check(composed)
    points = solved(composed)
    own_sweeper = any(word.startswith("hydra/sweeper=") for word in args.overrides)  # decides on its runs as it goes
    searching = any(is_open(run) for _, run in points)
    for own in ("hydra/sweeper", "hydra/launcher"):
        if searching and any(word.startswith(f"{own}=") for word in args.overrides):
            raise UserError(f"{own}= and search= both decide when what is trained; leave one of the two out.")
    if not searching and (not args.multirun or own_sweeper):
        job()
        return 0
    from peftbench.results.sweep import Sweep

    trials, final = phases(composed)
    sweep = Sweep.start(solved(final), argv, solved(trials))
    put_off.clear()
    try:
        if searching:
            _one_after_another(trials)
            _wait_for_put_off()
            sweep.settle()
            _one_after_another(final, len(trials))
        else:
            job()
        _wait_for_put_off()
    except SystemExit as exit:
        if exit.code != INTERRUPTED:
            raise
        sweep.show()
        return INTERRUPTED
    return sweep.show()


def _one_after_another(points: list[Point], before: int = 0) -> None:
    """Runs that are composed already."""
    for number, (overrides, run) in enumerate(points, start=before + 1):
        print(f"\nrun {number}: {' '.join(overrides)}", flush=True)
        _in_sweep(run, overrides)


def _wait_for_put_off() -> None:
    """The runs that other processes were at, once these have ended."""
    while put_off:
        run, overrides = put_off.pop(0)
        print(f"\nwaiting for the other process: {' '.join(overrides)}", flush=True)
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
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        print(f"\nrun {HydraConfig.get().job.num + 1}: {' '.join(overrides)}", flush=True)
        return _in_sweep(run, overrides)
    from peftbench.train import train

    try:
        return train(run, overrides)
    except UserError as error:
        print_faults(error)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _in_sweep(run: Run, overrides: list[str], wait: bool = False) -> float:
    """One run of a sweep: one that fails is recorded as failed, and the next one starts."""
    from peftbench.train import train

    try:
        return train(run, overrides, keep_failed=True, wait=wait)
    except Busy as error:
        print_faults(error)
        put_off.append((run, overrides))
    except UserError as error:
        print_faults(error)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        print(f"peftbench: this run failed with {type(error).__name__}: {error}", file=sys.stderr)
    return math.nan
