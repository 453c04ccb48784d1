"""`peftbench train` as a Hydra application: one job, or a sweep of jobs (-m), each of which is `train.train(cfg)`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from peftbench.config.compose import AND, CONFIG_NAME, Point, compose_points
from peftbench.config.schema import conf_dir, resolve
from peftbench.config.search import check, is_open, phases
from peftbench.config.sizes import sizes_taken
from peftbench.records.choice import objective
from peftbench.sweeps.plan import Sweep
from peftbench.sweeps.sweeper import INTERRUPTED, places_of, put_off, shown, train_all, train_one, wait_for_others
from peftbench.utils.console import say
from peftbench.utils.environment import run_alone
from peftbench.utils.errors import UserError, of_the_machine, print_faults
from peftbench.utils.quick_imports import quick_imports


def main(argv: list[str]) -> int:
    """Check the whole command line, run its jobs, and close a sweep with the table of its runs."""
    args = _arguments(argv)
    argv = [*(word for word in argv if word not in args.overrides), *args.overrides]  # as Hydra's own parser wants them
    sys.argv = ["peftbench train", *argv]
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        if args.cfg:
            compose_points(args.overrides, config_dir=args.config_dir)
        job()
        return 0
    run_alone()
    points = fitted(compose_points(args.overrides, multirun=args.multirun, config_dir=args.config_dir))
    check(points)
    searching = any(is_open(run) for _, run in points)
    _check_plugins(args.overrides, points[0][1].jobs, searching)
    own_sweeper = any(word.startswith("hydra/sweeper=") for word in args.overrides)  # decides on its runs as it goes
    if not searching and (not args.multirun or own_sweeper):
        solved(points)
        job()
        return 0
    if AND in args.overrides:
        _tell_what_differs(points)
    return _sweep(points, argv, by_hydra=not searching and AND not in args.overrides)


def _tell_what_differs(points: Sequence[Point]) -> None:
    """Grids on different tasks or backbones may be meant, or a task= that was meant for all was typed behind `and`."""
    counted = Counter(f"{run.task.name} with {run.model.name}" for _, run in points)
    if len(counted) > 1:
        listed = ", ".join(f"{what} ({count} run{'s' if count > 1 else ''})" for what, count in counted.items())
        say(f'This sweep goes over {listed}. What stands behind "{AND}" is of that grid; what all share comes first.')


def _sweep(points: Sequence[Point], argv: list[str], by_hydra: bool) -> int:
    """Train the runs of a sweep: the trials of its searches, then the others.

    Args:
        by_hydra: where one run goes on at a time, Hydra's launcher starts the jobs.
    """
    trials, final = phases(points)
    beside_trials, beside_final = (places_of([run for _, run in phase]) for phase in (trials, final))
    sweep = Sweep.start(solved(final), argv, solved(trials))
    put_off.clear()
    try:
        with shown(sweep):
            if trials:
                train_all(trials, sweep.trials, beside_trials)
                sweep.settle()
            if by_hydra and len(beside_final) == 1:
                job()
                wait_for_others()
            else:
                train_all(final, sweep.members, beside_final, before=len(trials))
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


def fitted(points: list[Point]) -> list[Point]:
    """The runs with their column's sizes fitted to their backbones, on which a search of them builds.

    Imports no torch where all backbones are those that the sizes were made for.
    """
    if not any(sizes_taken(run) for _, run in points):
        return points
    from peftbench.counts.shares import fit_all

    return [(point[0], run) for point, run in zip(points, fit_all(run for _, run in points), strict=True)]


def solved(points: list[Point]) -> list[Point]:
    """The runs with bottlenecks for their budgets, on which their folders depend. Imports no torch without a budget.

    Each job solves its own again; here all are refused before the first one trains.
    """
    if all(run.budget is None for _, run in points):
        return points
    from peftbench.counts.solve import solve_all

    return [(point[0], run) for point, run in zip(points, solve_all(run for _, run in points), strict=True)]


def _check_plugins(overrides: Sequence[str], jobs: str, searching: bool) -> None:
    """Raises UserError where a sweeper or launcher of Hydra's and peftbench would both decide what is trained where."""
    for own in ("hydra/sweeper", "hydra/launcher"):
        if not any(word.startswith(f"{own}=") for word in overrides):
            continue
        if jobs != "1":
            raise UserError(f"{own}= and jobs={jobs} both decide where a run goes; leave one of the two out.")
        if searching:
            raise UserError(f"{own}= and search= both decide when what is trained; leave one of the two out.")
        if AND in overrides:
            raise UserError(f"{own}= takes one grid and not several; leave it out, or what stands behind {AND}.")


BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"  # which knows all runs beforehand
# Where the sweepers of Hydra's plugins (Optuna, Nevergrad, Ax) are told to minimise, which is what most do by default.
MINIMISING: dict[str, tuple[Any, str]] = {
    "direction": ("minimize", "maximize"),
    "optim.maximize": (False, "true"),
    "ax_config.experiment.minimize": (True, "false"),
}


def _wrong_direction(sweeper: DictConfig) -> str | None:
    """The sentence for a sweeper that would look for the worst run."""
    for key, (wrong, right) in MINIMISING.items():
        found = OmegaConf.select(sweeper, key)
        if wrong in (found if isinstance(found, ListConfig) else [found]):
            return (
                f"hydra.sweeper.{key}={str(found).lower()}: a sweeper is given the score on the selection split, which "
                f"is better when higher (of a loss, its negative); give hydra.sweeper.{key}={right}."
            )
    return None


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=CONFIG_NAME)
def job(cfg: DictConfig) -> float:
    """One run, alone or of a sweep; gives what a sweeper may maximise (`results.choice.objective`)."""
    run, overrides = resolve(cfg), list(HydraConfig.get().overrides.task)
    sources = HydraConfig.get().runtime.config_sources
    own = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        asked = HydraConfig.get().sweeper["_target_"] != BASIC  # by a sweeper that goes by the outcome
        if asked and (fault := _wrong_direction(HydraConfig.get().sweeper)):
            print_faults([fault])
            raise SystemExit(2)
        return train_one(HydraConfig.get().job.num + 1, run, overrides, selecting=asked)
    with quick_imports():
        from peftbench.train import train

    try:
        return objective(train(run, [*own, *overrides]).selection)
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
