#!/usr/bin/env python
"""Copies the records of finished runs into a folder that is small enough for a repository.

    python scripts/keep_records.py OUTPUTS outputs/reference/grid --shared SHARED

For each run that is done or has diverged, and each trial that is trained, it keeps the record and the config, in which
the paths of this machine are replaced by SHARED and OUTPUTS, and of the log every look at the selection split and
twelve lines of training, to six digits. A run's name and its content stamps stay: they say what it was trained on,
wherever the data was stored. Predictions are left out, since their file also contains the references, which belong to
the data; what each example contributed to the main score is kept, so that runs can be compared. Of trials that others
are better than, in a search or a study, the record alone is kept, also of those that a study has pruned.

A sweep skips the runs that were kept, except that a trained trial that it chooses is trained again, and a study goes on
with its journal, which is kept too: copy them to its output_dir (cp -r KEPT/. OUTPUT_DIR), and another machine goes on.
What was kept before can be kept again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from peftbench.records.choice import compute_objective
from peftbench.records.record import FILE, Record, load_records
from peftbench.records.run_files import METRICS_FILE, read_metrics
from peftbench.tables import examples
from peftbench.tables.row import is_trial
from peftbench.utils.files import replace_file, write_lines

LINES = 12  # of training, at most, that are kept of a log
OUTPUTS = "OUTPUTS"  # in place of the output_dir of the machine
JOURNALS = ".sweeps/*.study.jsonl"
DIGITS = 6  # significant digits of its numbers


def keep(record: Record, target: Path, names: dict[str, str], alone: bool = False) -> None:
    """Write what is kept of a run to the folder `target`, with `names` in place of the folders of this machine.

    Args:
        alone: the record and nothing else.

    Raises:
        ValueError: the run's predictions do not have its score.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", METRICS_FILE, examples.FILE):  # of a run that was the best before
        (target / name).unlink(missing_ok=True)
    (outputs,) = {word.partition("=")[2] for word in record.overrides if word.startswith("output_dir=")}
    renamed = {**names, outputs: OUTPUTS}
    told = json.loads(rename_folders((record.folder / FILE).read_text(encoding="utf-8"), renamed))
    (target / FILE).write_text(json.dumps(told, separators=(",", ":"), ensure_ascii=False) + "\n", encoding="utf-8")
    if alone or not (record.folder / "config.yaml").is_file():  # it was kept alone before
        return
    config = rename_folders((record.folder / "config.yaml").read_text(encoding="utf-8"), renamed)
    (target / "config.yaml").write_text(config, encoding="utf-8")
    write_lines(target / METRICS_FILE, thin_log(read_metrics(record.folder)))
    if record.score is not None and examples.has_examples(record):
        statistics = examples.read_examples(record)[record.metric]
        if not math.isclose(statistics.score_all(), record.score, rel_tol=1e-9):
            raise ValueError(f"{record.folder}: the predictions have {statistics.score_all()}, not {record.score}")
        examples.write_examples(statistics.rows, target, examples.read_groups(record))


def keep_journals(outputs: Path, target: Path, names: dict[str, str]) -> int:
    """Copy the journals of the studies below `outputs`, without a line that is still being written; return how many."""
    found = sorted(outputs.glob(JOURNALS))
    for file in found:
        written = file.read_bytes()
        text = written[: written.rfind(b"\n") + 1].decode("utf-8")
        place = target / file.relative_to(outputs)
        place.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(place) as kept:
            kept.write(rename_folders(text, {**names, str(outputs): OUTPUTS}))
    return len(found)


def rename_folders(text: str, names: dict[str, str]) -> str:
    """Return a text with names in place of folders."""
    for folder, name in names.items():
        text = text.replace(folder, name)
    return text


def find_beaten(records: list[Record]) -> set[str]:
    """Return the names of trials of studies that another trial of the same study is better than: of a study under a
    budget in the selection score, of any other also in what is stored. The runs of such a point with other seeds, which
    were made while it was the best, have become trials too."""
    studies: dict[str, list[Record]] = {}
    beaten = set()
    for one in records:
        if one.study is not None and one.search is not None:
            if one.seed == one.search.seed:
                studies.setdefault(one.study, []).append(one)
            elif is_trial(one):
                beaten.add(one.run)
    for trials in studies.values():
        values = {one.run: _list_objectives(one) for one in trials}
        for one, own in values.items():
            if any(
                all(theirs >= ours for theirs, ours in zip(other, own, strict=True)) and other != own
                for other in values.values()
            ):
                beaten.add(one)
    return beaten


def _list_objectives(trial: Record) -> list[float]:
    """Return what a study compares of a trial, better when higher; the worst of one that was pruned or diverged."""
    stored = -float(trial.counts.stored) if trial.counts is not None else -math.inf
    score = compute_objective(trial.compared)
    return [score] if trial.budget is not None else [score, stored if score > -math.inf else -math.inf]


def find_losers(records: list[Record]) -> set[str]:
    """Return the names of trials whose searches have chosen another one."""
    settled = [trial.run for one in records if one.search and one.search.role == "final" for trial in one.search.trials]
    return {record.run for record in records if is_trial(record) and record.run in settled}


def thin_log(lines: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the lines of a log that are kept: all looks, and `LINES` of training at equal distances, with the last."""
    training = [index for index, line in enumerate(lines) if not any(key.startswith("eval_") for key in line)]
    left_out: set[int] = set()
    if len(training) > LINES:
        left_out = set(training) - {training[len(training) * number // LINES - 1] for number in range(1, LINES + 1)}
    return [
        {key: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value for key, value in line.items()}
        for index, line in enumerate(lines)
        if index not in left_out
    ]


def main() -> None:
    """Copy the runs and print their number."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("outputs", type=Path, help="the folder of the runs")
    parser.add_argument("target", type=Path, help="the folder to copy them to")
    parser.add_argument("--shared", required=True, help="the folder of data and backbones, as in the configs")
    parser.add_argument("--backbones", help="the folder of the backbones, if it is another one")
    arguments = parser.parse_args()
    if arguments.target.resolve() == arguments.outputs.resolve():
        parser.error(f"{arguments.target} is the folder of the runs; give another one")
    folders = {"BACKBONES": arguments.backbones, "SHARED": arguments.shared}
    names = {folder.rstrip("/"): name for name, folder in folders.items() if folder is not None}
    # Before the records: a trial that ends now is then one that has ended and not been told, which is no harm.
    journals = keep_journals(arguments.outputs, arguments.target, names)
    found, _ = load_records(arguments.outputs)
    ended = [one for one in found if one.has_ended or one.unreported or (one.search is not None and one.search.pruned)]
    # Of a search whose runs have not ended, all trials are kept whole.
    beaten = find_losers(ended) | find_beaten(ended)
    for record in ended:
        target = arguments.target / record.folder.relative_to(arguments.outputs)
        keep(record, target, names, alone=record.run in beaten)
    of_studies = f", and {journals} journals of studies" if journals else ""
    print(f"{len(ended)} of {len(found)} runs are kept in {arguments.target}{of_studies}")


if __name__ == "__main__":
    main()
