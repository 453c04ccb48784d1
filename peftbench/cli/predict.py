"""`peftbench predict RUN FILE|-`: what a finished run predicts for inputs without labels."""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from peftbench.records.saved import find_run_folder, read_saved_record
from peftbench.utils.errors import UserError
from peftbench.utils.files import dump_json, expand_home, replace_file
from peftbench.utils.quiet import make_quiet_console
from peftbench.utils.text import strip_controls

if TYPE_CHECKING:
    from peftbench.evaluation.unlabelled import Prediction

EPILOG = """\
FILE is .txt, with an input on each line (of a pair: two texts and a tab between them), or .csv, .tsv, .jsonl, .json or
.parquet with the columns that the task reads; task.text_columns=[COLUMN] or task.source_column=COLUMN gives them other
names. - is standard input, whose lines are inputs unless --read says otherwise.

Without --out, each line of standard output is one prediction: a text, a number, or a label, a tab and its probability;
for words, the labels of all, a tab and their probabilities.
With --out FILE, what an interrupted command has predicted is stored in FILE.partial, and the same line goes on from
there. FILE is .txt, as standard output; .csv or .tsv, with the probability of each label; or .jsonl.

examples:
  peftbench predict RUN reviews.csv --out predicted.csv
  cut -f1 reviews.tsv | peftbench predict RUN - > predicted.txt
"""
READ = (".txt", ".tsv", ".csv", ".jsonl", ".json", ".parquet")  # those of tasks/inputs.py, which imports torch
Share = float | list[float | None]
WRITE = (".txt", ".csv", ".tsv", ".jsonl")


def main(argv: list[str]) -> int:
    """Write the predictions and return the exit code.

    Raises:
        UserError: there is no finished run, an override is wrong, or an input cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="peftbench predict",
        description="Predict labels, numbers or texts for inputs without labels.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=find_run_folder, help="its folder, or the first digits of its name")
    parser.add_argument("inputs", metavar="FILE|-", help="the inputs")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings to change")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write; default: standard output")
    parser.add_argument(
        "--read", choices=[name[1:] for name in READ], help="the format of the inputs; default: by FILE's ending"
    )
    parser.add_argument(
        "--write", choices=[name[1:] for name in WRITE], help="the format to write; default: by the ending of --out"
    )
    arguments = parser.parse_intermixed_args(argv)
    out: Path | None = arguments.out
    form = _choose_format(out, arguments.write)
    record = read_saved_record(arguments.run)
    from peftbench.evaluation.unlabelled import (  # torch, which no refusal above needs
        predict_inputs,
        read_run_to_predict,
    )

    run = read_run_to_predict(arguments.run, record, arguments.overrides)
    with redirect_stdout(sys.stderr):  # a library that prints must not print between the predictions
        found = predict_inputs(
            arguments.run,
            run,
            arguments.inputs,
            None if arguments.read is None else f".{arguments.read}",
            make_quiet_console(stderr=True),
            None if out is None else _name_kept(out),
        )
    if out is None:
        written = io.StringIO()
        WRITERS[form](found, written)
        text = written.getvalue()  # which a model wrote: on a terminal it must command nothing
        sys.stdout.write(strip_controls(text) if sys.stdout.isatty() else text)
        return 0
    with replace_file(out) as file:
        WRITERS[form](found, file)
    _name_kept(out).unlink(missing_ok=True)
    return 0


def _choose_format(out: Path | None, wanted: str | None) -> str:
    """Return the ending of the format to write. Raises UserError for a file that cannot be written."""
    if out is not None and not expand_home(out).parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is not a folder.")
    ending = f".{wanted}" if wanted is not None else WRITE[0] if out is None else out.suffix.lower()
    if ending not in WRITE:
        raise UserError(f"--out {out}: its extension must be one of {', '.join(WRITE)}, or give --write.")
    return ending


def _name_kept(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _write_lines(found: Sequence[Prediction], file: TextIO) -> None:
    """Write one line for each prediction; a line break in a text becomes \\n."""
    for one in found:
        own = _find_own_share(one)
        file.write(_escape(str(one.value)) + ("" if own is None else f"\t{_format(own)}") + "\n")


def _write_csv(found: Sequence[Prediction], file: TextIO) -> None:
    csv.writer(file, lineterminator="\n").writerows(_tabulate(found))


def _write_tsv(found: Sequence[Prediction], file: TextIO) -> None:
    for row in _tabulate(found):
        file.write("\t".join(_escape(cell).replace("\t", r"\t") for cell in row) + "\n")


def _write_jsonl(found: Sequence[Prediction], file: TextIO) -> None:
    for one in found:
        probabilities = {} if one.probabilities is None else {"probabilities": one.probabilities}
        file.write(dump_json({**one.name, "prediction": one.value, **probabilities}) + "\n")


def _tabulate(found: Sequence[Prediction]) -> Iterator[list[str]]:
    """Yield the header and a row for each prediction, with the probability of each label."""
    first = found[:1]
    labels = [label for one in first for label in one.probabilities or {}]
    names = [key for one in first for key in one.name]
    yield [*(names or ["index"]), "prediction", *(f"probability of {label}" for label in labels)]
    for one in found:
        shares = [_format((one.probabilities or {})[label]) for label in labels]
        yield [*map(str, one.name.values()), str(one.value), *shares]


def _find_own_share(one: Prediction) -> Share | None:
    """Return the probability of what is predicted; of words, that of each one's label; None of what has no label."""
    value = str(one.value)
    shares: Mapping[str, Any] | None = one.probabilities
    if shares is None or isinstance(shares.get(value), float):
        return None if shares is None else shares[value]
    return [shares[label][word] for word, label in enumerate(value.split())]


def _format(share: Share) -> str:
    """Return a probability, or those of words with spaces between them; nan for a word that has none."""
    if isinstance(share, float):
        return f"{share:.6f}"
    return " ".join(f"{math.nan if one is None else one:.6f}" for one in share)


def _escape(text: str) -> str:
    return text.replace("\r", r"\r").replace("\n", r"\n")


WRITERS: dict[str, Callable[[Sequence[Prediction], TextIO], None]] = {
    ".txt": _write_lines,
    ".csv": _write_csv,
    ".tsv": _write_tsv,
    ".jsonl": _write_jsonl,
}
