"""`peftbench train`: one run, or with -m a sweep of runs.

The command line is composed, validated and resolved once, here; `train.train` gets final runs. Hydra itself starts runs
only where a plugin of its (`hydra/launcher=`, `hydra/sweeper=`) was asked for.
"""

from __future__ import annotations

import math
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from peftbench.cli.ls import find_option_groups, show_option_groups
from peftbench.cli.own_parts import check_own_parts
from peftbench.config.compose import AND, TypedRun, compose_points, resolve_run
from peftbench.config.conf_sources import CONFIG_NAME
from peftbench.config.launchers import SWEEPER, HydraLauncher, Local, read_launcher
from peftbench.config.overrides import address_hydra, describe_error, explain_hydra, list_hydra_words, quote_path
from peftbench.config.schema import Run, find_conf_dir
from peftbench.config.search import check_searches, has_open_search, is_unreported, split_trials
from peftbench.config.studies import group_studies, is_study
from peftbench.records.choice import settle_search
from peftbench.sweeps.executors import require_packages
from peftbench.sweeps.fork_server import start_fork_server
from peftbench.sweeps.hydra_launcher import train_for_hydra
from peftbench.sweeps.plan import Sweep
from peftbench.sweeps.resolve import resolve_points
from peftbench.sweeps.sweeper import INTERRUPTED, Sweeper, find_places
from peftbench.tables.terminal import show_ended
from peftbench.utils.console import make_console, say
from peftbench.utils.environment import Launch, read_launch, run_alone
from peftbench.utils.errors import UserError, print_faults
from peftbench.utils.progress import Display
from peftbench.utils.quick_imports import speed_up_imports
from peftbench.utils.stopping import describe_ignored_interrupt, heed_signals
from peftbench.utils.text import format_count

HELP = """\
peftbench train KEY=VALUE ...             one run
peftbench train -m KEY=A,B ...            every combination
peftbench train KEY=VALUE ... --cfg job   its config, and stop
peftbench ls keys                         every key, and what it means
peftbench ls GROUP                        the choices of a group, and what they are
--config-dir FOLDER                       groups of your own: FOLDER/method/NAME.yaml ...

Groups and their choices"""


def main(argv: list[str]) -> int:
    """Check the whole command line, run its jobs, and close a sweep with the table of its runs."""
    args = _parse_arguments(argv)
    flags = [word for word in argv if word not in args.overrides]
    args.overrides = [quote_path(word) for word in args.overrides]
    argv = [*flags, *args.overrides]  # as Hydra's own parser wants them
    sys.argv = ["peftbench train", *flags, *map(address_hydra, args.overrides)]
    if args.help:
        say(HELP)
        show_option_groups(find_option_groups(Path(args.config_dir) if args.config_dir else None), make_console())
        return 0
    if args.hydra_help or args.cfg or args.info or args.shell_completion:
        if args.cfg:
            compose_points(args.overrides, config_dir=args.config_dir)
        _call_hydra(args.overrides)
        return 0
    launch = read_launch()
    if launch is None:
        run_alone()
    elif launch.rank > 0:
        from peftbench.training.devices import follow

        return follow(launch)
    words, launcher = read_launcher(args.overrides, args.config_dir)
    points = compose_points(words, multirun=args.multirun, config_dir=args.config_dir)
    check_own_parts([run for _, run in points])
    check_searches(points)
    _check_plugins(args.overrides, points, launcher)
    if launch is None:
        return _train(args, words, points, argv, launcher)
    _check_launch(args.overrides, points, launch)
    from peftbench.training.devices import lead

    with lead(launch):
        return _train(args, words, points, argv, launcher)


def _train(args: Namespace, words: Sequence[str], points: Sequence[TypedRun], argv: list[str], launcher: Any) -> int:
    """Train the runs of the command line.

    Args:
        words: its overrides without those of the launcher.
        launcher: see `read_launcher`.
    """
    elsewhere = None if isinstance(launcher, Local) else launcher
    if elsewhere is not None:
        require_packages(elsewhere)
    several = len(points) > 1 or any(has_open_search(run) for _, run in points)
    if several and launcher is None and any(run.jobs != "1" for _, run in points):
        start_fork_server()  # which imports what resolving the points does, too
    points = resolve_points(points)
    if how := describe_ignored_interrupt():
        say(how)
    plugins = _has_plugins(words)
    if any(is_study(run) for _, run in points):
        return _train_with_studies(points, argv, args.config_dir, elsewhere)
    if args.multirun or launcher is not None or any(has_open_search(run) for _, run in points):
        if AND in args.overrides:
            _print_what_differs(points)
        return _train_by_hydra(points, argv, words) if plugins else _train_sweep(points, argv, elsewhere)
    if plugins:
        _call_hydra(words)
        return 0
    ((overrides, run),) = points
    return _train_alone(run, [*_name_config_dir(args.config_dir), *overrides])


def _has_plugins(overrides: Sequence[str]) -> bool:
    """Return whether Hydra itself is configured."""
    return bool(list_hydra_words(overrides))


def _call_hydra(words: Sequence[str]) -> None:
    """Have Hydra compose and start what is on the command line.

    What Hydra raises before it has started a run comes from its own keys, which have no schema. It would print that as
    a traceback, and end the process.

    Raises:
        UserError: with the words that configure Hydra, and what is wrong.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises
    _started.clear()
    try:
        run_job()
    except (UserError, OSError):
        raise
    except Exception as error:
        if _started:
            raise
        if own := list_hydra_words(words):
            raise UserError(explain_hydra(own, error)) from error
        if isinstance(error, HydraException):  # of a word beside --info, which nobody has read before
            raise UserError(describe_error(error)) from error
        raise
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)


_started: list[str] = []  # runs that Hydra has started in this process


def _check_launch(overrides: Sequence[str], points: Sequence[TypedRun], launch: Launch) -> None:
    """Raise UserError where torchrun and something else would both decide which process trains what."""
    started = f"torchrun has started {launch.size} processes, which train one run after another together"
    for _, run in points:
        if run.jobs != "1":
            raise UserError(f"jobs={run.jobs}: {started}; leave out jobs, or start this without torchrun.")
        if run.trainer.devices not in ("1", "auto", str(launch.size)):
            raise UserError(f"trainer.devices={run.trainer.devices}: {started}; leave out trainer.devices.")
    if _has_plugins(overrides):
        raise UserError(f"hydra/...: {started}; leave Hydra's own keys out, or start this without torchrun.")


def _name_config_dir(folder: str | None) -> list[str]:
    """Return the words that name the user's own folder, for the record."""
    return [] if folder is None else [f"--config-dir={Path(folder).resolve()}"]


def _train_alone(run: Run, overrides: list[str]) -> int:
    """Train one run and show it."""
    with speed_up_imports():
        from peftbench.train import train
    console = make_console()
    final, search = settle_search(run)
    try:
        record = train(final, overrides, search=search, display=Display(console), reporting=not is_unreported(run))
    except KeyboardInterrupt:
        print_faults(["interrupted; the same line goes on with this run."])
        return INTERRUPTED
    show_ended(record, console, alone=True)
    return 0


def _print_what_differs(points: Sequence[TypedRun]) -> None:
    """Print what the grids differ in: a task= or output_dir= that was meant for all may have been typed after `and`."""
    apart = len({run.output_dir for _, run in points}) > 1
    counted = Counter(f"{run.task.name} with {run.model.name}{f' in {run.output_dir}' * apart}" for _, run in points)
    if len(counted) > 1:
        listed = ", ".join(f"{what} ({format_count(count, 'run')})" for what, count in counted.items())
        say(f'This sweep goes over {listed}. What follows "{AND}" belongs to that grid; what all share comes first.')


def _train_sweep(points: Sequence[TypedRun], argv: list[str], elsewhere: Any) -> int:
    """Train the runs of a sweep and the trials of its searches.

    Args:
        elsewhere: the launcher, see `read_launcher`; None: on this machine.
    """
    trials, final = split_trials(points)
    places = find_places([run for _, run in (*trials, *final)])
    sweep = Sweep(final, argv, trials)
    sweeper = Sweeper(sweep, elsewhere, places)
    try:
        with heed_signals(), sweeper.at_work():
            sweeper.train()
    except (KeyboardInterrupt, SystemExit) as exit:
        return _end_interrupted(sweep, exit)
    return sweep.show()


def _train_with_studies(points: Sequence[TypedRun], argv: list[str], config_dir: str | None, elsewhere: Any) -> int:
    """Train the runs of the grids without a study as one sweep, and then the studies of the other grids."""
    _check_studies(elsewhere)
    others = [point for point in points if not is_study(point[1])]
    code = _train_sweep(others, argv, elsewhere) if others else 0
    if code == INTERRUPTED:
        return code
    return max(code, _train_studies([point for point in points if is_study(point[1])], argv, config_dir, elsewhere))


def _check_studies(elsewhere: Any) -> None:
    """Raise UserError where a study cannot be trained."""
    if find_spec("optuna") is None:
        raise UserError("search.trials needs optuna, which is missing: pip install peftbench[search].")
    if isinstance(elsewhere, HydraLauncher):
        raise UserError(
            f"hydra/launcher={elsewhere.name} takes its runs in batches, and a study chooses one after another; use "
            "jobs=, hydra/launcher=slurm or hydra/launcher=ray."
        )


def _train_studies(points: Sequence[TypedRun], argv: list[str], config_dir: str | None, elsewhere: Any) -> int:
    """Train studies. Points that differ only in their seed are one."""
    from peftbench.sweeps.study_training import train_studies  # imports optuna

    studies = group_studies(points)
    runs = [run for (_, run), _ in studies for _ in range((run.search and run.search.trials) or 1)]
    try:
        with heed_signals():
            return train_studies(studies, argv, config_dir, find_places(runs), elsewhere)
    except KeyboardInterrupt:
        print_faults([f"interrupted; the same line goes on with the {'study' if len(studies) == 1 else 'studies'}."])
        return INTERRUPTED


def _train_by_hydra(points: Sequence[TypedRun], argv: list[str], words: Sequence[str]) -> int:
    """Have a sweeper or launcher of Hydra's train the runs of a sweep."""
    if any(word.startswith(SWEEPER) for word in argv):  # decides on its runs as it goes: there is no plan
        _call_hydra(words)
        return 0
    if any(has_open_search(run) for _, run in points):
        raise UserError(
            f"{' '.join(list_hydra_words(words))}: Hydra would start the runs, and search= has trials before them; "
            "leave one of the two out."
        )
    sweep = Sweep(points, argv)
    try:
        _call_hydra(words)
    except (KeyboardInterrupt, SystemExit) as exit:
        return _end_interrupted(sweep, exit)
    return sweep.show()


def _end_interrupted(sweep: Sweep, exit: BaseException) -> int:
    """Show what there is of a sweep that Ctrl-C has ended. Raises any other `exit` again."""
    if isinstance(exit, SystemExit) and exit.code != INTERRUPTED:
        raise exit
    sweep.show()
    return INTERRUPTED


def _parse_arguments(argv: list[str]) -> Namespace:
    parser = get_args_parser()
    parser.prog = "peftbench train"
    args, rest = parser.parse_known_intermixed_args(argv)
    if rest:
        raise UserError(
            f"{rest[0]} is no option of peftbench train: -m, --config-dir FOLDER, --cfg job and --help are; keys have "
            "no dashes, as in method=lora."
        )
    if given := [name for name in ("config_name", "config_path") if getattr(args, name, None)]:
        option = f"--{given[0].replace('_', '-')}"
        raise UserError(f"{option} is no option of peftbench train; give a folder of your own groups as --config-dir.")
    if args.cfg and args.multirun:
        raise UserError("--cfg shows the config of one run; leave out -m, and name one value of each key.")
    return args


def _check_plugins(overrides: Sequence[str], points: Sequence[TypedRun], launcher: Any) -> None:
    """Raise UserError where a launcher or sweeper and peftbench would both decide what is trained where."""
    jobs, searching = points[0][1].jobs, any(has_open_search(run) for _, run in points)
    if launcher is not None and not isinstance(launcher, Local) and jobs != "1":
        raise UserError(f"hydra/launcher= and jobs={jobs} both decide where a run goes; leave one of the two out.")
    if not any(word.startswith(SWEEPER) for word in overrides):
        return
    if jobs != "1":
        raise UserError(f"{SWEEPER} and jobs={jobs} both decide where a run goes; leave one of the two out.")
    if searching:
        raise UserError(f"{SWEEPER} and search= both decide when what is trained; leave one of the two out.")
    if AND in overrides:
        raise UserError(f"{SWEEPER} takes one grid and not several; leave it out, or what follows {AND}.")


BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"  # which knows all runs beforehand
# Where the sweepers of Hydra's plugins (Optuna, Nevergrad, Ax) are told to minimise, which is what most do by default.
MINIMISING: dict[str, tuple[Any, str]] = {
    "direction": ("minimize", "maximize"),
    "optim.maximize": (False, "true"),
    "ax_config.experiment.minimize": (True, "false"),
}


def _find_wrong_direction(sweeper: DictConfig) -> str | None:
    """The sentence for a sweeper that would look for the worst run."""
    for key, (wrong, right) in MINIMISING.items():
        found = OmegaConf.select(sweeper, key)
        if wrong in (found if isinstance(found, ListConfig) else [found]):
            return (
                f"hydra.sweeper.{key}={str(found).lower()}: a sweeper is given the score on the selection split, which "
                f"is better when higher (of a loss, its negative); give hydra.sweeper.{key}={right}."
            )
    return None


@hydra.main(version_base="1.3", config_path=str(find_conf_dir()), config_name=CONFIG_NAME)
def run_job(cfg: DictConfig) -> float:
    """Train one run that Hydra has composed; return what a sweeper may maximise (`compute_objective`)."""
    hydra_config = HydraConfig.get()
    _started.append(hydra_config.job.name)
    ((overrides, run),) = resolve_points([(list(hydra_config.overrides.task), resolve_run(cfg))])
    if hydra_config.mode == RunMode.MULTIRUN:
        selecting = hydra_config.sweeper["_target_"] != BASIC  # by a sweeper that goes by the outcome
        if selecting and (fault := _find_wrong_direction(hydra_config.sweeper)):
            print_faults([fault])
            raise SystemExit(2)
        return train_for_hydra(hydra_config.job.num + 1, run, overrides, selecting)
    sources = hydra_config.runtime.config_sources
    own = next((source.path for source in sources if source.provider == "command-line"), None)
    try:
        code = _train_alone(run, [*_name_config_dir(own), *overrides])
    except UserError as error:
        print_faults(error.faults)
        raise SystemExit(2) from None
    if code:
        raise SystemExit(code)
    return math.nan  # nobody chooses by a run alone
