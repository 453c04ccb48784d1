"""A prediction is the same whatever its batch, for every family, also where the files name two pad tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from peftbench.backbones.load import load_backbone
from peftbench.config.schema import Generation, Model, Run, Task, TaskKind, Trainer
from peftbench.evaluation.evaluator import Evaluator
from peftbench.evaluation.predict import predict
from peftbench.tasks.load import load_task
from peftbench.tasks.prepare import prepare_data
from peftbench.utils.files import write_lines
from tests.families import ALIKE, CONTINUING, FAMILIES, MORE_FAMILIES, VOCABULARY, WRITING, build
from tests.tasks.test_tasks import SPECIAL, with_template

LENGTHS = (1, 7, 2, 12, 3, 5, 9, 4)


def letters() -> PreTrainedTokenizerBase:
    """A tokenizer with a letter for each id of the tiny models, in the form that each family's class takes."""
    vocabulary = [*SPECIAL, *map(chr, range(33, 33 + VOCABULARY - len(SPECIAL)))]
    tokenizer = with_template(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, []), pre_tokenizers.ByteLevel(False)
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def task_of(family: str, folder: Path) -> Task:
    """Eight texts of unequal lengths, to be classified or to be gone on with."""
    texts = ["".join(chr(97 + (7 * i + j) % 26) for j in range(length)) for i, length in enumerate(LENGTHS)]
    for split in ("train", "validation", "test"):
        rows = [{"text": text, "label": "abc"[i % 3], "target": text[:9]} for i, text in enumerate(texts)]
        write_lines(folder / f"{split}.jsonl", rows)
    if family in (*WRITING, *CONTINUING):
        return Task(
            name="own",
            kind=TaskKind.text_to_text,
            data_dir=str(folder),
            source_column="text",
            target_column="target",
            max_source_length=40,
            max_target_length=12,
            metric="exact_match",
            generation=Generation(num_beams=2, min_length=0, max_length=6, no_repeat_ngram_size=0),
        )
    return Task(
        name="own",
        kind=TaskKind.classification,
        data_dir=str(folder),
        text_columns=["text"],
        labels=["a", "b", "c"],
        metric="accuracy",
    )


# The files name two pad tokens, which is the hardest, on every family. One or none: once for each kind of model and
# head, since which token pads is decided before the family is seen.
PADS = [(family, "another") for family in (*FAMILIES, *MORE_FAMILIES)]
PADS += [
    (family, pads)
    for family in ("bart", "bart_classifier", "roberta", "t5", "llama", "llama_classifier", "gpt2_classifier")
    for pads in ("one", "none")
]


@pytest.mark.parametrize(
    ("family", "pads"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if case[0] in ALIKE and case[1] == "another" else [])
        for case in PADS
    ],
)
def test_the_size_of_the_batches_changes_no_prediction(family: str, pads: str, tmp_path: Path) -> None:
    model, tokenizer = build(family, pad_token_id=4 if pads == "another" else 1), letters()
    if pads == "none":
        tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task = task_of(family, tmp_path)
    backbone = load_backbone(Model(path=str(tmp_path)), task)
    assert any("pad_token is <pad> (1)" in note for note in backbone.notes) is (pads == "another")
    data = prepare_data(load_task(task), backbone.tokenizer, backbone.model)
    decoded, logits = {}, {}
    for size in (1, 8):
        settings = Trainer(learning_rate=1.0, eval_batch_size=size)
        evaluator = Evaluator(backbone.model, data, Run(task=task, trainer=settings))
        decoded[size] = evaluator.score("report")[1]
        if evaluator.generation is None:
            logits[size] = predict(backbone.model, data.report, data.collator, size)
    assert decoded[1] == decoded[8]
    if logits:
        assert np.allclose(logits[1], logits[8], rtol=0, atol=1e-5) and logits[1].std(axis=0).min() > 1e-3
    else:
        assert len(set(decoded[1])) > 1
