"""Compare two rows of runs: the difference of their scores, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftbench.config.identity import IGNORED, to_plain
from peftbench.config.schema import Modification
from peftbench.config.yaml_files import read_yaml
from peftbench.metrics.bootstrap import Difference, bootstrap_pairs
from peftbench.records.record import Record
from peftbench.records.run_files import name_predictions_file
from peftbench.records.saved import read_saved_predictions
from peftbench.tables.examples import read_examples
from peftbench.tables.row import Row
from peftbench.utils.differences import find_differing, flatten
from peftbench.utils.errors import UserError, warn

_BELOW_IGNORED = tuple(f"{key}." for key in IGNORED)


def compare_rows(a: Row, b: Row, resamples: int) -> dict[str, Difference]:
    """Return the difference of each metric of the runs' report split."""
    _check_examples([*a.scored, *b.scored])
    read = [[read_examples(record) for record in row.scored] for row in (a, b)]
    names = [name for name in read[0][0] if all(name in run for side in read for run in side)]
    scored = [[{name: run[name] for name in names} for run in side] for side in read]
    paired = [record.seed for record in a.scored] == [record.seed for record in b.scored]
    return bootstrap_pairs(*scored, paired_seeds=paired, resamples=resamples)


def find_differing_settings(a: Row, b: Row) -> dict[str, list[Any]]:
    """Return each key of the config, and of the record's circumstances, that differs, with its values in A and in B.

    For a modification that only one of them has: its axes, and its settings that are not the defaults.
    """
    both = [read_settings(row.first) for row in (a, b)]
    if not all(row.first.trainer for row in (a, b)):  # an imported run: how it was trained is not known
        both = [{key: value for key, value in side.items() if not key.startswith("trainer.")} for side in both]
    one, other = ({key.split(".")[1] for key in side if key.startswith("mix.")} for side in both)
    bare = {f"mix.{name}.{key}": value for name in one ^ other for key, value in flatten(to_plain(Modification()))}
    own = [{key: value for key, value in side.items() if key not in bare or value != bare[key]} for side in both]
    return {key: [side.get(key) for side in own] for key in find_differing(own)}


def _check_examples(records: Sequence[Record]) -> None:
    """Raise UserError unless all records were scored on the same examples, by their predictions if they have them."""
    told = [record for record in records if (record.folder / name_predictions_file("report")).is_file()]
    asked = [_identify_examples(read_saved_predictions(record.folder, "report")) for record in told]
    for other, record in zip(asked, told, strict=True):
        if other != asked[0]:
            odd = sum(x != y for x, y in zip(asked[0], other, strict=False)) + abs(len(other) - len(asked[0]))
            raise UserError(f"{record.folder} was not scored on the same examples: {odd} of {len(other)} differ.")
    for record in records if len(told) < len(records) else []:
        if record.data.get("scored_on") != records[0].data.get("scored_on"):
            raise UserError(f"{record.folder} was not scored on the same examples as {records[0].folder}.")


def _identify_examples(predictions: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the inputs of predictions, by which two runs on the same examples are recognised."""
    return [(one.get("id"), one["reference"]) for one in predictions]


def read_settings(record: Record) -> dict[str, Any]:
    """Return a run's config as dotted keys, without keys that are not settings, and the circumstances in the record."""
    found = dict(flatten(_read_config(record.folder / "config.yaml")))
    kept = {key: value for key, value in found.items() if value is not None and not _is_ignored(key)}
    reading = {f"reading.{key}": value for key, value in record.data.get("reading", {}).items()}
    circumstances = {"device": record.device, "data": record.data.get("fingerprint"), **reading, **record.versions}
    return kept | {f"({key})": value for key, value in circumstances.items() if value is not None}


def _read_config(file: Path) -> dict[str, Any]:
    """Return the config of a run as stored on disk; if the file is damaged, name it on stderr and return an empty
    dict."""
    if not file.is_file():
        return {}
    try:
        config = read_yaml(file)
    except UserError:
        config = None
    if isinstance(config, dict):
        return config
    warn(f"{file} is left out: it is incomplete or not the config of a run.")
    return {}


def _is_ignored(key: str) -> bool:
    return key == "seed" or key in IGNORED or key.startswith(_BELOW_IGNORED)
