"""`peftbench status`: show the progress of the sweeps below a folder, and the time left."""

from __future__ import annotations

import argparse
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from peftbench.records.record import find_record
from peftbench.sweeps.plan import Plan, find_plans
from peftbench.sweeps.status import ORDER, State, estimate_seconds_left, format_time, summarise_states
from peftbench.utils.console import make_console, say
from peftbench.utils.errors import UserError, warn


def main(argv: list[str]) -> int:
    """Print the sweeps, the latest last, and return 1 if a run failed, else 0. Raises UserError without sweeps."""
    parser = argparse.ArgumentParser(
        prog="peftbench status", description="Show the progress of the sweeps: runs done, running, failed; time left."
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs"), help="default: %(default)s")
    parser.add_argument("--all", action="store_true", help="also list the runs that are done")
    parser.add_argument("--json", action="store_true", help="print a JSON array with one object for each sweep")
    arguments = parser.parse_args(argv)

    if not arguments.folder.is_dir():
        raise UserError(f"{arguments.folder} is not a folder; give the output_dir of a sweep.")
    sweeps: list[tuple[Plan, list[State]]] = []
    for file in find_plans(arguments.folder):
        try:
            plan = Plan.load(file)
        except (OSError, ValueError) as error:
            warn(f"{file} is left out: {error}.")
            continue
        sweeps.append((plan, [State(point, find_record(file.parent.parent / point.folder)) for point in plan.points]))
    if not sweeps:
        raise UserError(f"{arguments.folder} has no sweep; make one with: peftbench train -m KEY=A,B")
    if arguments.json:
        say(json.dumps([_to_json(plan, states) for plan, states in sweeps], indent=2))
    else:
        console = make_console()
        shared = _find_shared([plan for plan, _ in sweeps])
        if shared:
            console.print(f"Each sweep: peftbench train {shlex.join(shared)}", soft_wrap=True, highlight=False)
            console.print()
        for index, (plan, states) in enumerate(sweeps):
            if index:
                console.print()
            _print_sweep(plan, states, shared, console, arguments.all)
    return int(any(state.status == "failed" for _, states in sweeps for state in states))


def _find_shared(plans: Sequence[Plan]) -> list[str]:
    """Return the words that were typed for every one of several sweeps; none if each is short without that."""
    first, *others = (plan.arguments for plan in plans)
    shared = [word for word in first if all(word in words for words in others)] if others else []
    return shared if any("=" in word for word in shared) else []


def _print_sweep(
    plan: Plan, states: Sequence[State], shared: Sequence[str], console: Console, everything: bool
) -> None:
    own = shlex.join(word for word in plan.arguments if word not in shared)
    line = f"... {own}".rstrip() if shared else f"peftbench train {own}"
    console.print(line, style="dim", soft_wrap=True, highlight=False)
    console.print(summarise_states(states), highlight=False)
    listed = [state for state in states if everything or state.status not in ("done", "trained")]
    if not listed:
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    keys = list(dict.fromkeys(key for state in listed for key in state.point.settings))
    for key in keys:
        table.add_column(key.replace(".", ".\n"), overflow="fold")
    for name in ("status", "time", "run"):
        table.add_column(name, overflow="fold", justify="right" if name == "time" else "left")
    for state in sorted(listed, key=lambda state: ORDER.index(state.status)):
        settings = (str(state.point.settings.get(key, "")) for key in keys)
        table.add_row(*settings, state.outcome, format_time(state), state.point.folder.rpartition("/")[2])
    console.print(table)


def _to_json(plan: Plan, states: Sequence[State]) -> dict[str, Any]:
    counted = Counter(state.status for state in states)
    return {
        "arguments": plan.arguments,
        "counts": {status: counted[status] for status in ORDER},
        "seconds_left": estimate_seconds_left(states),
        "runs": [
            {"folder": state.point.folder, "settings": state.point.settings, "status": state.outcome}
            for state in states
        ],
    }
