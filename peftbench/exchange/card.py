"""The model card of an exported adapter: what it is, how it scored, how it is loaded. Every figure is the record's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

import peftbench
from peftbench.config.roles import is_reported
from peftbench.config.schema import WITH_LABELS, Run
from peftbench.exchange.peft_form import PeftAdapter, describe_targets
from peftbench.records.record import Axes, Record
from peftbench.utils.files import replace_file

CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
}


def write_card(path: Path, run: Run, record: Record, adapter: PeftAdapter, difference: float | None) -> None:
    """Write the card of an adapter; `difference` is that of peft's logits to ours, None if they were not compared."""
    with replace_file(path) as file:
        file.write("\n".join([*_head(run), "", *_body(run, record, adapter, difference)]) + "\n")


def _head(run: Run) -> Iterator[str]:
    """Yield the metadata that the hub reads."""
    values = {"library_name": "peft", "tags": ["peftbench", run.method]}
    if run.model.path is None and run.model.hub_id is not None:
        values["base_model"] = run.model.hub_id
    if run.task.hub_id is not None and not any((run.task.data_dir, run.task.data_files, run.task.train_file)):
        values["datasets"] = [run.task.hub_id]
    yield "---"
    yield yaml.safe_dump(values, sort_keys=True).rstrip()
    yield "---"


def _body(run: Run, record: Record, adapter: PeftAdapter, difference: float | None) -> Iterator[str]:
    base = run.model.hub_id if run.model.path is None else f"FOLDER OF {run.model.name}"  # not where it lies here
    yield f"# {run.method} on {run.task.name}, for {run.model.name}"
    yield ""
    yield (
        f"An adapter of the type {adapter.config['peft_type']} for `{base}`, at {describe_targets(adapter.config)}, "
        f"trained by peftbench {record.versions.get('peftbench', peftbench.__version__)} (run {record.run})."
    )
    yield ""
    yield from _show_modifications(record.axes)
    yield ""
    yield from _show_scores(record)
    yield ""
    yield from _show_settings(run, record)
    yield ""
    yield "## Load"
    yield ""
    yield from _show_loading(run, adapter, base)
    for note in adapter.notes:
        yield ""
        yield note
    if difference is not None:
        yield ""
        yield f"The largest difference of its logits in peft to those of the run: {difference:g}."


def _show_modifications(axes: list[Axes]) -> Iterator[str]:
    yield "| functional form | modified representation | insertion form | composition function | r |"
    yield "|---|---|---|---|---|"
    for one in axes:
        size = "" if one.bottleneck is None else one.bottleneck
        yield (
            f"| {one.functional_form} | {one.modified_representation} | {one.insertion_form} | {one.composition} | "
            f"{size} |"
        )


def _show_scores(record: Record) -> Iterator[str]:
    yield "| split | examples | metric | score |"
    yield "|---|---:|---|---:|"
    for role, score in record.scores.items():
        if is_reported(role):
            for name, value in score.metrics.items():
                yield f"| {score.split} | {score.examples:,} | {name} | {value:.2f} |"
    for name, value in record.baselines.items():
        yield f"| baseline: {name} | | {record.metric} | {value:.2f} |"


def _show_settings(run: Run, record: Record) -> Iterator[str]:
    counts = record.counts
    if counts is not None:
        yield (
            f"- stored parameters: {counts.stored:,} ({counts.percent['stored']:.3g}% of the backbone), without the "
            f"task head's {counts.head:,}"
        )
    if record.trainer:
        trainer = record.trainer
        yield (
            f"- training: learning rate {trainer['learning_rate']:g}, batches of {trainer['batch_size']}, "
            f"{record.steps or 0:,} steps, seed {record.seed}"
        )
    if run.task.prompt is not None:
        yield f"- input: {run.task.prompt!r}, with the text in place of {{source}}"
    yield f"- {', '.join(f'{name} {version}' for name, version in sorted(record.versions.items()))}"


def _show_loading(run: Run, adapter: PeftAdapter, base: str | None) -> Iterator[str]:
    auto = CLASSES[adapter.config["task_type"]]
    labels = run.task.labels if run.task.kind in WITH_LABELS else []
    more = f", num_labels={len(labels)}" if labels else ", num_labels=1" if auto == CLASSES["SEQ_CLS"] else ""
    yield "```python"
    yield "import torch"
    yield "from peft import PeftModel"
    yield f"from transformers import {auto}"
    yield ""
    yield f'base = {auto}.from_pretrained("{base}", dtype=torch.float32{more})'
    yield 'model = PeftModel.from_pretrained(base, "THIS_FOLDER").eval()'
    yield "```"
    if labels:
        yield ""
        yield f"Labels, in the order of the logits: {', '.join(labels)}."
