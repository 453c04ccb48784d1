"""`peftbench train` as a Hydra application: one job, or a sweep of jobs (-m), each of which is `train.train(cfg)`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from peftbench.cli import print_faults
from peftbench.compose import CONFIG_NAME, compose_points
from peftbench.config import Run, conf_dir
from peftbench.errors import UserError
from peftbench.progress import Display, is_live
from peftbench.results.lock import Busy

if TYPE_CHECKING:
    from peftbench.results.sweep import Sweep

INTERRUPTED = 130  # the exit code

display: Display | None = None  # of the run of a sweep that is shown as a whole
put_off: list[tuple[DictConfig, list[str]]] = []  # runs of this sweep that another process was at, with what was typed


def run(argv: list[str]) -> int:
    """Check the whole command line, run its jobs, and close a sweep with the table of its runs."""
    args = get_args_parser().parse_args(argv)
    sys.argv = ["peftbench train", *argv]
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        job()
        return 0
    points = solved(compose_points(args))
    own_sweeper = any(word.startswith("hydra/sweeper=") for word in args.overrides)  # decides on its runs as it goes
    if not args.multirun or own_sweeper:
        job()
        return 0
    from peftbench.results.sweep import Sweep

    sweep = Sweep.start(points, argv)
    put_off.clear()
    try:
        with _shown(sweep):
            job()
            while put_off:
                cfg, overrides = put_off.pop(0)
                print(f"\nwaiting for the other process: {' '.join(overrides)}", flush=True)
                _in_sweep(cfg, overrides, wait=True)
    except SystemExit as exit:
        if exit.code != INTERRUPTED:
            raise
        sweep.show()
        return INTERRUPTED
    return sweep.show()


@contextmanager
def _shown(sweep: Sweep) -> Iterator[None]:
    """The sweep as a table that grows, on a terminal; elsewhere each run prints its own lines."""
    from peftbench.results.live import LiveSweep

    global display
    console = Console()
    if not is_live(console):
        yield
        return
    display = Display(console, within_another=True)
    try:
        with LiveSweep(sweep, console, below=display.progress):
            yield
    finally:
        display = None


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
    overrides = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        if display is None:
            print(f"\nrun {HydraConfig.get().job.num + 1}: {' '.join(overrides)}", flush=True)
        return _in_sweep(cfg, overrides)
    from peftbench.train import train

    try:
        return train(cfg, overrides)
    except UserError as error:
        print_faults(error)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _in_sweep(cfg: DictConfig, overrides: list[str], wait: bool = False) -> float:
    """One run of a sweep: one that fails is recorded as failed, and the next one starts."""
    from peftbench.train import train

    try:
        return train(cfg, overrides, keep_failed=True, wait=wait, display=display)
    except Busy as error:
        _name(overrides)
        print_faults(error)
        put_off.append((cfg, overrides))
    except UserError as error:
        _name(overrides)
        print_faults(error)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        _name(overrides)
        print(f"peftbench: this run failed with {type(error).__name__}: {error}", file=sys.stderr)
    return math.nan


def _name(overrides: list[str]) -> None:
    """Say which run a fault is of, where that does not stand above it already."""
    if display is not None:
        print(f"peftbench: {' '.join(overrides)}", file=sys.stderr)
