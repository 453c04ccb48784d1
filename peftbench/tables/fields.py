"""The values of a run, by the names that filters, --rows, --columns, --show and --sort take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from peftbench.config.roles import FURTHER, is_reported
from peftbench.config.schema import index_by_key
from peftbench.records.record import Record
from peftbench.records.wording import describe_search
from peftbench.utils.differences import flatten
from peftbench.utils.errors import UserError, suggest

FIELDS: dict[str, Callable[[Record], Any]] = {
    "method": lambda r: r.method,
    "task": lambda r: r.task,
    "model": lambda r: r.model.name,
    "quantization": lambda r: r.model.quantization,
    "seed": lambda r: r.seed,
    "status": lambda r: r.status,
    "error": lambda r: r.error.name if r.error else None,
    "debug": lambda r: r.debug,
    "unfreeze": lambda r: r.unfreeze,
    "functional_form": lambda r: [axes.functional_form for axes in r.axes],
    "modified_representation": lambda r: [axes.modified_representation for axes in r.axes],
    "insertion_form": lambda r: [axes.insertion_form for axes in r.axes],
    "composition_function": lambda r: [axes.composition_function for axes in r.axes],
    "scale": lambda r: [axes.scale for axes in r.axes],
    "bottleneck": lambda r: [axes.bottleneck for axes in r.axes],
    "learning_rate": lambda r: r.trainer.get("learning_rate"),
    "search": lambda r: r.search.name if r.search else None,
    "searched": lambda r: describe_search(r.search) if r.search else None,
    "fidelity": lambda r: r.fidelity,
    "deviations": lambda r: [deviation.name for deviation in r.deviations],
    "budget": lambda r: r.budget,
    "row": lambda r: index_by_key(r.overrides).get("row"),  # of the paper's tables, as it was typed
    "fast_paths": lambda r: r.fast_paths,
    "metric": lambda r: r.metric,
    "split": lambda r: r.scores["report"].split if "report" in r.scores else None,
    "examples": lambda r: r.scores["report"].examples if "report" in r.scores else None,
    "test_file": lambda r: get_test_file(r),
    "data": lambda r: r.data.get("scored_on", "")[:8] or None,
    "train_examples": lambda r: r.data.get("splits", {}).get("train", {}).get("examples"),
    "backbone": lambda r: r.counts.backbone if r.counts else None,
    "trained": lambda r: r.counts.trained if r.counts else None,
    "stored": lambda r: r.counts.stored if r.counts else None,
    "percent": lambda r: r.counts.percent.get("stored") if r.counts else None,
    "score": lambda r: r.score if r.status == "done" else None,
    "selection": lambda r: r.compared.value if r.compared else None,
    "cut_off": lambda r: r.cut_off.get("report"),
    "steps": lambda r: r.steps,
    "tokens_per_s": lambda r: r.tokens_per_s,
    "step": lambda r: r.step_s,
    "tflops": lambda r: r.tflops,
    "memory": lambda r: _to_gib(r.peak_memory_bytes),
    "time": lambda r: r.timings.get("total_s"),
    "adapter": lambda r: None if r.adapter_bytes is None else r.adapter_bytes / 2**20,
    "general_loss": lambda r: r.retention.after.loss if r.retention and r.retention.after else None,
    "general_loss_before": lambda r: r.retention.before.loss if r.retention else None,
    "general_accuracy": lambda r: r.retention.after.accuracy if r.retention and r.retention.after else None,
    "general_accuracy_before": lambda r: r.retention.before.accuracy if r.retention else None,
    "forgetting": lambda r: compute_forgetting(r),
    "general_text": lambda r: r.retention.text if r.retention else None,
    "speed": lambda r: 100 * r.speed.trained.tokens_per_s / r.speed.bare.tokens_per_s if r.speed else None,
    "use_tokens_per_s": lambda r: r.speed.trained.tokens_per_s if r.speed else None,
    "use_tokens_per_s_bare": lambda r: r.speed.bare.tokens_per_s if r.speed else None,
    "token_ms": lambda r: 1000 / r.speed.trained.tokens_per_s if r.speed else None,
    "use_memory": lambda r: _to_gib(r.speed.trained.memory_bytes) if r.speed else None,
    "use_memory_bare": lambda r: _to_gib(r.speed.bare.memory_bytes) if r.speed else None,
    "device": lambda r: r.device,
    "run": lambda r: r.run,
    "created": lambda r: r.created,
}
AVERAGE = "average"  # over the report split and all further ones
MANY_CUT_OFF = 0.05  # of generated texts: what is said on the screen
COSTS = (  # better when lower
    *("trained", "stored", "percent", "steps", "memory", "time"),
    *("adapter", "token_ms", "use_memory", "general_loss", "forgetting"),
)


def find_field(key: str, records: Sequence[Record]) -> Callable[[Record], Any]:
    """Return the function that reads `key` from a record.

    `key` is one of `FIELDS`, a metric or a baseline of the report split, the score on a further split, `AVERAGE`, or a
    dotted key of a record. Raises UserError for a key that none of the records has.
    """
    if key in FIELDS:
        return FIELDS[key]
    if any(key in r.scores["report"].metrics for r in records if "report" in r.scores):
        return partial(_get_metric, key)
    if any(key in r.baselines for r in records):
        return partial(get_baseline, key)
    if key in list_further_splits(records):
        return partial(get_further_score, key)
    further = list_further_splits(records)
    if key == AVERAGE and further:
        return average_scores(records)
    flat = {id(record): dict(flatten(record.to_json())) for record in records} if "." in key else {}
    if any(key in values for values in flat.values()):
        return lambda record: flat[id(record)].get(key)
    metrics = dict.fromkeys(name for r in records if "report" in r.scores for name in r.scores["report"].metrics)
    known = [*FIELDS, *metrics, *further, *([AVERAGE] if further else [])]
    raise UserError(f"{key} is not a column{suggest(key, known)}")


def describe_cut_off(split: str, share: float | None) -> str | None:
    """The sentence that many of a split's generated texts ended by their length; None where few did, or none was."""
    if share is None or share <= MANY_CUT_OFF:
        return None
    return (
        f"{share:.1%} of the texts on {split} were cut off: no token ended them before task.generation.max_length, and "
        "the score counts what follows a text's proper end."
    )


def compute_forgetting(record: Record) -> float | None:
    """Return by how much the training has raised the loss of the backbone's own language model on general text."""
    if record.retention is None or record.retention.after is None:
        return None
    return record.retention.after.loss - record.retention.before.loss


def _to_gib(size: int | None) -> float | None:
    return None if size is None else size / 2**30


def _get_metric(name: str, record: Record) -> float | None:
    return record.scores["report"].metrics.get(name) if "report" in record.scores else None


def get_baseline(name: str, record: Record) -> float | None:
    """Return the main metric of a baseline, such as majority."""
    return record.baselines.get(name)


def get_test_file(record: Record) -> str | None:
    """Return the user's files or folder with the scored rows, as typed; a record without the field has it in its
    overrides."""
    words = index_by_key(record.overrides)
    named = (f"task.data_files.{split}" for split in ("test", "validation"))
    keys = ("task.test_file", *named, "task.data_dir", "task.train_file")
    return record.test_file or next((words[key] for key in keys if key in words), None)


def list_further_splits(records: Sequence[Record]) -> list[str]:
    """Return the splits that were scored in addition to the report split, such as validation_mismatched."""
    roles = dict.fromkeys(role for record in records for role in record.scores)
    return [role.removeprefix(FURTHER) for role in roles if role.startswith(FURTHER)]


def get_further_score(split: str, record: Record) -> float | None:
    """Return the task's metric on a further split."""
    score = record.scores.get(f"{FURTHER}{split}") if record.status == "done" else None
    return None if score is None else score.metrics.get(record.metric)


def average_scores(records: Sequence[Record]) -> Callable[[Record], float | None]:
    """Return the function from one of the records to the mean of its scores on the report split and all further ones.

    Each split counts the same, however many examples it has, as in LLM-Adapters (Hu et al., 2023). A run has no average
    if it lacks a split that another run of the same data has: averages over other sets cannot be compared.
    """
    splits: dict[tuple[Any, ...], set[str]] = {}
    for record in records:
        splits.setdefault(_identify_data(record), set()).update(filter(is_reported, record.scores))

    def average(record: Record) -> float | None:
        wanted = splits[_identify_data(record)]
        scores = {role: score.metrics.get(record.metric) for role, score in record.scores.items() if role in wanted}
        known = [score for score in scores.values() if score is not None]
        return fmean(known) if record.status == "done" and len(known) == len(wanted) > 1 else None

    return average


def _identify_data(record: Record) -> tuple[Any, ...]:
    return (record.task, record.metric, *(FIELDS[key](record) for key in ("split", "examples", "data")))
