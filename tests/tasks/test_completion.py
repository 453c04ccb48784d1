"""A decoder alone learns text to text: the loss is the target's, padding is on the left where it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from peftbench.cli.main import main
from peftbench.config.schema import Generation, Run, Task, TaskKind, Trainer
from peftbench.evaluation.evaluator import Evaluator
from peftbench.evaluation.predict import compute_mean_loss, predict
from peftbench.modification.prefix_start import NEAR_START
from peftbench.tasks.base import TaskData
from peftbench.tasks.load import load_task
from peftbench.tasks.prepare import prepare_data
from peftbench.utils.errors import UserError
from peftbench.utils.files import write_lines
from tests.tasks.test_tasks import byte_level

ROWS = [{"source": "good film " * count, "target": "bad " * (1 + count % 3)} for count in (1, 4, 2, 3, 1)]


def tiny_llama(**more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=2,
        initializer_range=0.3,
        **more,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def task(tmp_path: Path) -> Task:
    for split in ("train", "validation", "test"):
        write_lines(tmp_path / f"{split}.jsonl", ROWS)
    return Task(
        name="own",
        kind=TaskKind.text_to_text,
        data_dir=str(tmp_path),
        source_column="source",
        target_column="target",
        prompt="Say: {source}\nAnswer:",
        max_source_length=40,
        max_target_length=12,
        metric="rougeL",
        generation=Generation(num_beams=1, min_length=0, max_length=6, no_repeat_ngram_size=0),
    )


@pytest.fixture
def data(task: Task) -> TaskData:
    tokenizer = byte_level()
    tokenizer.pad_token = None  # as Llama's and GPT-2's
    return prepare_data(load_task(task), tokenizer, tiny_llama())


def test_prompt_and_completion(data: TaskData) -> None:
    example = data.train[0]
    prompt = data.tokenizer.decode(example["input_ids"], skip_special_tokens=True)
    assert prompt == "Say: good film \nAnswer:"
    assert example["input_ids"][0] == 0 and 2 not in example["input_ids"]  # begun, and not ended
    assert data.tokenizer.decode(example["labels"]) == "bad bad </s>"
    assert data.lengths[0] == len(example["input_ids"]) + len(example["labels"])


def test_a_long_source_is_cut_and_the_end_of_the_prompt_stays(task: Task) -> None:
    data = prepare_data(load_task(replace(task, max_source_length=16)), byte_level(), tiny_llama())
    longest = max(data.train["input_ids"][:], key=len)
    assert len(longest) == 16
    assert data.tokenizer.decode(longest).endswith("\nAnswer:")


def test_no_room_for_a_source(task: Task) -> None:
    with pytest.raises(UserError, match=r"task\.max_target_length=64 leaves no room for a source"):
        prepare_data(load_task(replace(task, max_target_length=64)), byte_level(), tiny_llama())


def test_what_is_generated_has_room_behind_the_prompt(task: Task) -> None:
    """Of the 64 positions, where more is generated than trained on."""
    task = replace(task, generation=replace(task.generation, max_length=44))
    data = prepare_data(load_task(task), byte_level(), tiny_llama())
    assert max(map(len, data.report["input_ids"])) == 20
    with pytest.raises(UserError, match=r"task\.generation\.max_length=80 leaves no room for a source"):
        prepare_data(
            load_task(replace(task, generation=replace(task.generation, max_length=80))), byte_level(), tiny_llama()
        )


def test_an_empty_source_is_begun_where_nothing_else_is(task: Task, tmp_path: Path) -> None:
    """As with GPT-2's tokenizer, which puts no token around a text."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", special_tokens=[])
    write_lines(tmp_path / "test.jsonl", [{"source": "", "target": "bad"}, *ROWS])
    for prompt, expected in ((None, tokenizer("\n")["input_ids"]), ("{source}", [0])):
        data = prepare_data(load_task(replace(task, prompt=prompt)), tokenizer, tiny_llama())
        assert data.report[0]["input_ids"] == expected
        Evaluator(tiny_llama(), data, Run(task=data.task, trainer=Trainer(learning_rate=1.0))).score("report")


def test_a_tokenizer_that_cannot_end_a_text(task: Task) -> None:
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"has no token that ends a text.*name one as eos_token"):
        prepare_data(load_task(task), tokenizer, tiny_llama())


def test_the_loss_is_that_of_the_target(data: TaskData) -> None:
    """In a padded batch, as in training, equal to each example's own, token by token."""
    model = tiny_llama()
    batch = data.collator([data.train[i] for i in range(len(data.train))])
    total, tokens = 0.0, 0
    for prompt, target in zip(data.train["input_ids"], data.train["labels"], strict=True):
        logits = model(torch.tensor([prompt + target])).logits[0].log_softmax(-1).detach()
        total -= sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(target))
        tokens += len(target)
    assert float(model(**batch).loss.detach()) == pytest.approx(total / tokens, rel=1e-4)
    # the selection split holds the same rows; the batches are others
    assert compute_mean_loss(model, data.selection, data.collator, 2) == pytest.approx(total / tokens, rel=1e-4)


def test_generation_in_padded_batches_is_that_of_each_prompt_alone(data: TaskData) -> None:
    model = tiny_llama()
    run = Run(task=data.task, trainer=Trainer(learning_rate=1.0))
    generation = Evaluator(model, data, run).generation
    together = predict(model, data.report, data.collator, 5, generation=generation)
    for prompt, ids in zip(data.report["input_ids"], together, strict=True):
        alone = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6, pad_token_id=2)
        written = alone[0, len(prompt) :].numpy()
        assert np.array_equal(ids[: len(written)], written)


def test_what_the_prompt_says_may_be_said_again(data: TaskData) -> None:
    """no_repeat_ngram_size is about what is written, as in an encoder-decoder."""
    model = tiny_llama()
    generation = GenerationConfig(max_new_tokens=8, no_repeat_ngram_size=1, eos_token_id=2, pad_token_id=2)
    ids = predict(model, data.report, data.collator, 5, generation=generation)
    for row in ids:
        written = row[(row >= 0) & (row != 2)]
        assert len(set(written.tolist())) == len(written)
    free = predict(model, data.report, data.collator, 5, generation=GenerationConfig(max_new_tokens=1, pad_token_id=2))
    assert np.array_equal(free[:, 0], ids[:, 0])  # nothing is forbidden before the first token


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_a_run_from_the_command_line(task: Task, tmp_path: Path, method: str) -> None:
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    byte_level().save_pretrained(folder)
    arguments = ["train", "task=text_to_text", "model=bart_large", f"model.path={folder}", f"method={method}"]
    arguments += [f"task.data_dir={task.data_dir}", "debug=smoke", "trainer.max_steps=30", "trainer.learning_rate=0.01"]
    arguments += ["trainer.evaluate_every=10", "task.selection_metric=loss", "bottleneck=4"]
    assert main([*arguments, f"output_dir={tmp_path / 'outputs'}"]) == 0
    (file,) = (tmp_path / "outputs").rglob("record.json")
    record = json.loads(file.read_text())
    assert record["status"] == "done" and set(record["scores"]["report"]["metrics"]) >= {"rougeL"}
    assert (NEAR_START in record["notes"]) == (method == "prefix")
    lines = [json.loads(line) for line in (file.parent / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[-1] < losses[0]
