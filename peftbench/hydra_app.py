"""`peftbench train` as a Hydra application: one job, or a sweep of jobs (-m), each of which is `train.train(cfg)`."""

from __future__ import annotations

import math
import sys

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from peftbench.cli import print_faults
from peftbench.compose import CONFIG_NAME, compose_runs
from peftbench.config import conf_dir
from peftbench.errors import UserError


def run(argv: list[str]) -> int:
    """Check the whole command line, run its jobs, and close a sweep with the table of its runs."""
    args = get_args_parser().parse_args(argv)
    sys.argv = ["peftbench train", *argv]
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        job()
        return 0
    runs = compose_runs(args)
    if any(run.budget is not None for run in runs):
        from peftbench.params.solve import solve_all

        runs = solve_all(runs)  # each job solves its own again; here all are refused before the first one trains
    job()
    if not args.multirun:
        return 0
    from peftbench.results.sweep import show_sweep

    return show_sweep(runs)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=CONFIG_NAME)
def job(cfg: DictConfig) -> float:
    """One run. In a sweep a run that fails is recorded as failed and the next one starts."""
    from peftbench.train import train

    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweeping:
        print(f"\nrun {HydraConfig.get().job.num + 1}: {' '.join(HydraConfig.get().overrides.task)}", flush=True)
    try:
        return train(cfg)
    except UserError as error:
        print_faults(error)
        if not sweeping:
            raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if not sweeping:
            raise
        print(f"peftbench: this run failed with {type(error).__name__}: {error}", file=sys.stderr)
    return math.nan
