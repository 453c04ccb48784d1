#!/usr/bin/env python
"""Checks the recorded ROUGE, BLEU and chrF of finished runs against the libraries' own command lines.

    python scripts/library_scores.py outputs

Each run's saved predictions and references are written to files, which `python -m sacrebleu` and `python -m
rouge_score.rouge` score. Each row of the table shows the record's figure next to theirs, to the last digit that the
command line prints (ten for sacreBLEU; rouge_score prints a score for each example). Exits with 1 if any differs.
sacreBLEU reads one file for each reference: an example with fewer references than another repeats one, which changes
nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from peftbench.metrics.romanian import prepare_text
from peftbench.metrics.sentences import split_sentences
from peftbench.records.record import load_records
from peftbench.records.saved import read_saved_predictions
from peftbench.utils.errors import UserError

DIGITS = 10  # printed by sacreBLEU
LAST_DIGIT = {"bleu": 10.0**-DIGITS, "rouge": 1e-4}  # rouge_score prints six decimals of a share: four of a percentage
BETWEEN = "\x1e"  # separates rouge_score's examples: the record separator, since line breaks separate sentences


def sacrebleu(ours: Sequence[str], right: Sequence[list[str]], *options: str) -> list[float]:
    """The scores that `python -m sacrebleu` prints for the predictions `ours` and their references `right`."""
    most = max(map(len, right))
    streams = [[(texts * most)[place] for texts in right] for place in range(most)]
    with TemporaryDirectory() as folder:
        files = [str(write(Path(folder) / f"reference{i}", stream, "\n")) for i, stream in enumerate(streams)]
        predictions = write(Path(folder) / "predictions", ours, "\n")
        arguments = [*files, "-i", str(predictions), "-w", str(DIGITS), "-f", "json", *options]
        printed = json.loads(output("sacrebleu", *arguments))
    return [entry["score"] for entry in (printed if isinstance(printed, list) else [printed])]


def rouge(ours: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """The mean, in percent, of what `python -m rouge_score.rouge` prints for each example; a line for each sentence."""
    kinds = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    with TemporaryDirectory() as folder:
        target, prediction, scores = (Path(folder) / name for name in ("target", "prediction", "scores.csv"))
        write(target, ["\n".join(split_sentences(text)) for text in right], BETWEEN)
        write(prediction, ["\n".join(split_sentences(text)) for text in ours], BETWEEN)
        output(
            "rouge_score.rouge",
            f"--target_filepattern={target}",
            f"--prediction_filepattern={prediction}",
            f"--output_filename={scores}",
            f"--rouge_types={','.join(kinds)}",
            f"--delimiter={BETWEEN}",
            "--use_stemmer",
            "--noaggregate",
        )
        with scores.open() as stream:
            rows = list(csv.DictReader(stream))
    if len(rows) != len(ours):
        raise SystemExit(f"rouge_score printed {len(rows)} rows for {len(ours)} examples")
    return {kind: 100 * sum(float(row[f"{kind}-F"]) for row in rows) / len(rows) for kind in kinds}


def write(path: Path, texts: Sequence[str], end: str) -> Path:
    """Write `texts`, each followed by `end`; within a text `end` is replaced by a space."""
    path.write_text("".join(f"{text.replace(end, ' ')}{end}" for text in texts), encoding="utf-8")
    return path


def output(module: str, *arguments: str) -> str:
    """What a module prints when it runs as a command."""
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, check=True, text=True).stdout


def theirs(metrics: dict[str, float], ours: Sequence[str], right: Sequence[list[str]]) -> dict[str, float]:
    """The scores of the command lines, for each of `metrics` that they can compute."""
    found: dict[str, float] = {}
    if "bleu" in metrics:
        found["bleu"], found["chrf"] = sacrebleu(ours, right, "-m", "bleu", "chrf")
    if "bleu_ro" in metrics:
        normalised = [[prepare_text(text) for text in texts] for texts in right]
        bare = ("-m", "bleu", "--tokenize", "none", "--smooth-method", "none")
        found["bleu_ro"] = sacrebleu([prepare_text(text) for text in ours], normalised, *bare)[0]
    if "rouge2" in metrics and all(len(texts) == 1 for texts in right):
        found |= rouge(ours, [texts[0] for texts in right])
    return found


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the folder of the runs")
    table = Table("run", "metric", "record", "command line", "equal")
    differing = 0
    records, _ = load_records(parser.parse_args().folder)
    for record in records:
        score = record.scores.get("report")
        if record.status != "done" or score is None or not {"bleu", "rouge2"} & set(score.metrics):
            continue
        rows = read_saved_predictions(record.folder, "report")
        ours = [row["prediction"] for row in rows]
        right = [[row["reference"]] if isinstance(row["reference"], str) else row["reference"] for row in rows]
        for name, value in theirs(score.metrics, ours, right).items():
            mine = score.metrics[name]
            equal = abs(mine - value) < LAST_DIGIT["rouge" if name.startswith("rouge") else "bleu"]
            differing += not equal
            run = f"{record.task} {record.method} {record.run}"
            table.add_row(run, name, f"{mine:.6f}", f"{value:.6f}", "yes" if equal else "NO")
    Console(width=120).print(table)
    print(f"{table.row_count} scores compared, {differing} differ")
    return 1 if differing or not table.row_count else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:  # no runs in the folder, or runs without predictions, as in outputs/reference
        sys.exit(str(error))
