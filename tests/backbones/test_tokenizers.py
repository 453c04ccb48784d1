"""Backbones whose tokenizer is missing, another model's or at odds with the model, as a user meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from peftbench.backbones.load import load_backbone, load_tokenizer
from peftbench.cli.main import main
from peftbench.config.schema import Model, Run, Task, TaskKind, Trainer
from peftbench.evaluation.evaluator import Evaluator
from peftbench.evaluation.partial import Partial
from peftbench.evaluation.predict import measure_cut_off, predict
from peftbench.tasks.load import load_task
from peftbench.tasks.prepare import prepare_data
from peftbench.utils.errors import UserError
from peftbench.utils.files import write_lines
from tests.evaluation.test_batch_size import letters, task_of
from tests.families import FAMILIES, MORE_FAMILIES, build
from tests.hub import hub
from tests.tasks.test_completion import ROWS, tiny_llama
from tests.tasks.test_tasks import byte_level, tiny_bart, tiny_bert, word_level


def say(console: str) -> str:
    return " ".join(console.split())


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """A decoder whose tokenizer ends texts with <mask>, and which itself ends them with </s>."""
    folder = tmp_path / "chat"
    tiny_llama(pad_token_id=1).save_pretrained(folder)
    tokenizer = byte_level()
    tokenizer.eos_token = "<mask>"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Overrides of a short training to write texts."""
    for split in ("train", "validation", "test"):
        write_lines(tmp_path / f"{split}.jsonl", ROWS * 4)
    found = ["task=text_to_text", "model=bart_large", f"task.data_dir={tmp_path}", "debug=smoke", "method=lora"]
    found += ["trainer.learning_rate=0.01", "bottleneck=4", f"output_dir={tmp_path / 'outputs'}"]
    return [*found, "task.generation.max_length=8", "task.generation.num_beams=1"]


def recorded(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    (file,) = (tmp_path / "outputs").rglob("record.json")
    return file.parent, json.loads(file.read_text())


@pytest.mark.slow
def test_a_model_learns_the_end_at_which_it_stops(
    chat: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every text ends, and the record and the screen say which end was chosen."""
    arguments = [f"model.path={chat}", "method=full", "trainer.max_steps=60", "trainer.batch_size=20"]
    texts.remove("bottleneck=4")
    assert main(["train", *texts, *arguments, "trainer.schedule=constant"]) == 0
    _, record = recorded(tmp_path)
    (note,) = (note for note in record["data"]["notes"] if "eos_token" in note)
    assert "</s> ends the texts that are learnt, and generation stops at </s> and <mask>." in note
    printed = capsys.readouterr().out
    assert note in say(printed) and "were cut off" not in printed
    assert record["cut_off"]["report"] == 0


def test_texts_that_are_cut_off_are_counted_and_said(
    texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An untrained model ends none: in the record, at the end of a run, in tables, by evaluate and by rescore."""
    folder = tmp_path / "model"
    tiny_llama(pad_token_id=1).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    arguments = [*texts, f"model.path={folder}", "trainer.max_steps=1", "trainer.learning_rate=1e-6"]
    assert main(["train", *arguments]) == 0
    run, record = recorded(tmp_path)
    share = record["cut_off"]["report"]
    said = f"{share:.1%} of the texts on test were cut off: no token ended them before task.generation.max_length"
    assert share > 0.5 and said in say(capsys.readouterr().out)
    for command in (["evaluate", str(run)], ["rescore", str(run)]):
        assert main(command) == 0
        assert said in say(capsys.readouterr().out)
        assert main([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["cut_off"] == share
    assert main(["results", str(tmp_path / "outputs"), "--show", "method,cut_off"]) == 0
    assert f"{share:.1%}" in capsys.readouterr().out
    assert main(["results", str(tmp_path / "outputs"), "cut_off>0.05", "--csv"]) == 0
    assert f"{share}" in capsys.readouterr().out

    old = json.loads((run / "record.json").read_text())  # as one from before this was counted
    del old["cut_off"]
    (run / "record.json").write_text(json.dumps(old))
    for command in (["rescore", str(run)], ["results", str(tmp_path / "outputs"), "--show", "method,cut_off,score"]):
        assert main(command) == 0
        assert "%" not in capsys.readouterr().out
    assert main(["evaluate", str(run)]) == 0
    assert said in say(capsys.readouterr().out)


def test_the_share_that_is_cut_off() -> None:
    """Ends after what a decoder begins with; one that is forced in the last place is none of the text's own."""
    ids = np.array([[2, 7, 2, 1, 1], [2, 7, 8, 9, 7], [2, 7, 8, 9, 2], [2, 7, 4, -100, -100]])
    assert measure_cut_off(ids, GenerationConfig(eos_token_id=[2, 4], max_length=5), begun=1) == 0.25
    assert measure_cut_off(ids, GenerationConfig(eos_token_id=2, max_length=5), begun=1) == 0.5
    forced = GenerationConfig(eos_token_id=[2, 4], forced_eos_token_id=2, max_length=5)
    assert measure_cut_off(ids, forced, begun=1) == 0.5
    assert measure_cut_off(ids[:, 1:], GenerationConfig(eos_token_id=[2, 4], max_new_tokens=4), begun=0) == 0.25
    assert measure_cut_off(ids, GenerationConfig(max_length=5), begun=1) == 1
    assert measure_cut_off(ids[:0], GenerationConfig(eos_token_id=2), begun=1) == 0


@pytest.mark.parametrize(
    ("family", "beams", "likely"),
    [("bart", 1, 3.0), ("bart", 3, 3.0), ("t5", 1, 1.5), ("t5", 3, 1.7), ("llama", 1, 1.5), ("llama", 3, 1.5)],
)
def test_cut_off_is_the_same_in_parts(family: str, beams: int, likely: float, tmp_path: Path) -> None:
    """Of a generation that goes on where it was stopped, in batches of other sizes.

    The end is so `likely` that some texts end and some do not.
    """
    model = build(family)
    model.get_output_embeddings().weight.data[2] *= likely
    model.save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    task = task_of(family, tmp_path)
    task.generation.num_beams, task.generation.max_length = beams, 9
    backbone = load_backbone(Model(path=str(tmp_path)), task)
    data = prepare_data(load_task(task), backbone.tokenizer, backbone.model)
    run = Run(task=task, trainer=Trainer(learning_rate=1.0, eval_batch_size=8))
    evaluator = Evaluator(backbone.model, data, run)
    evaluator.score("report")
    whole = predict(backbone.model, data.report, data.collator, 1, generation=evaluator.generation)
    first, last = {"llama": (0, 9), "t5": (1, 9), "bart": (1, 8)}[family]  # BART is forced to end in the last place
    assert evaluator.cut_off["report"] == np.mean([2 not in row[first:last] for row in whole])
    partial = Partial(tmp_path / "partial", "stamp")
    partial.add([1, 6], [whole[1], whole[6]])
    resumed = Evaluator(backbone.model, data, run)
    resumed.score("report", partial=Partial(tmp_path / "partial", "stamp"))
    assert resumed.cut_off == evaluator.cut_off
    assert 0 < evaluator.cut_off["report"] < 1


def test_an_end_that_is_no_special_token_is_not_part_of_the_text(tmp_path: Path) -> None:
    """As where a tokenizer has <end> among its added tokens, and says of it no more."""
    model, tokenizer = build("llama", eos_token_id=98), letters()
    tokenizer.add_tokens(["<end>"])
    index = tokenizer.convert_tokens_to_ids("<end>")
    model.resize_token_embeddings(index + 1)
    model.config.eos_token_id = model.generation_config.eos_token_id = index
    model.lm_head.weight.data[index] = 3 * model.lm_head.weight.data[50]
    tokenizer.eos_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task = task_of("llama", tmp_path)
    backbone = load_backbone(Model(path=str(tmp_path)), task)
    assert not backbone.tokenizer.added_tokens_decoder[index].special
    data = prepare_data(load_task(task), backbone.tokenizer, backbone.model)
    assert all(labels[-1] == index for labels in data.train["labels"])
    evaluator = Evaluator(backbone.model, data, Run(task=task, trainer=Trainer(learning_rate=1.0)))
    decoded = evaluator.score("report")[1]
    assert evaluator.cut_off["report"] < 1 and not any("<" in text for text in decoded)


@pytest.mark.parametrize("family", [family for family in (*FAMILIES, *MORE_FAMILIES) if "_" not in family])
def test_a_folder_without_a_tokenizer(family: str, tmp_path: Path) -> None:
    """Of which transformers makes up an empty vocabulary: the file that is missing is named."""
    build(family).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^model\.path=.* has no tokenizer: tokenizer\.json is missing.*; put there"):
        load_tokenizer(Model(path=str(tmp_path)))


def test_a_run_on_a_folder_without_a_tokenizer_is_refused(
    texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_bart().save_pretrained(tmp_path / "model")
    assert main(["train", *texts, f"model.path={tmp_path / 'model'}"]) == 2
    error = capsys.readouterr().err
    assert "has no tokenizer: tokenizer.json is missing, or in its place vocab.json and merges.txt" in say(error)
    assert not list(tmp_path.rglob("record.json")) and "Traceback" not in error


def test_a_part_of_a_tokenizer(tmp_path: Path) -> None:
    build("gpt2").config.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "<|endoftext|>": 2}))
    with pytest.raises(UserError, match=r"has only part of a tokenizer: merges\.txt or tokenizer\.json is missing"):
        load_tokenizer(Model(path=str(tmp_path)))


def test_a_vocabulary_of_special_tokens_alone(tmp_path: Path) -> None:
    build("llama").config.save_pretrained(tmp_path)
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has a tokenizer whose vocabulary has only special tokens"):
        load_tokenizer(Model(path=str(tmp_path)))


@pytest.mark.slow
def test_a_hub_id_without_a_tokenizer(tmp_path: Path) -> None:
    """From a hub on loopback."""
    build("bert").config.save_pretrained(tmp_path / "models" / "me" / "tiny")
    code = (
        "from peftbench.backbones.load import load_tokenizer; from peftbench.config.schema import Model; "
        "from peftbench.utils.errors import UserError\n"
        "try: load_tokenizer(Model(hub_id='me/tiny'))\nexcept UserError as error: print(error)"
    )
    with hub(tmp_path) as url:
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": url}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "model.hub_id=me/tiny has no tokenizer: tokenizer.json is missing, or in its place vocab.txt" in done.stdout


@pytest.fixture
def reviews(tmp_path: Path) -> Task:
    """A training row and one to select and report on, of words that `word_level` knows."""
    for name in ("train", "dev"):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": "the film is good", "label": "good"}])
    return Task(
        name="reviews",
        kind=TaskKind.classification,
        data_dir=str(tmp_path),
        selection_split="validation",
        report_split="validation",
        text_columns=["text"],
        labels=["bad", "good"],
        metric="accuracy",
    )


def test_another_models_tokenizer_is_refused(reviews: Task) -> None:
    """Its ids are more than the embedding has."""
    model = tiny_bert()
    model.resize_token_embeddings(260)
    with pytest.raises(UserError, match=r"has the id \d+ for '.*' in train, and .* embeddings for 260 ids only"):
        prepare_data(load_task(reviews), byte_level(), model)


def words(count: int, unknown: int) -> str:
    return " ".join([*["good"] * (count - unknown), *["χ"] * unknown])


@pytest.mark.parametrize(("unknown", "share"), [(0, 0.0), (1, 0.05), (2, 0.1), (10, 0.5)])
def test_unknown_tokens_are_counted(unknown: int, share: float, reviews: Task) -> None:
    """Special tokens around a text do not count, and the split that has them is named."""
    write_lines(Path(str(reviews.data_dir)) / "dev.jsonl", [{"text": words(20, unknown), "label": "good"}])
    data = prepare_data(load_task(reviews), word_level(), tiny_bert())
    assert data.unknown["validation"] == pytest.approx(share)
    notes = [note for note in data.notes if "does not know" in note]
    assert len(notes) == (share > 0.05)
    assert not notes or f"<unk> is {share:.1%} of validation, in tokens." in notes[0]


def test_text_that_is_mostly_unknown_is_refused(reviews: Task) -> None:
    write_lines(Path(str(reviews.data_dir)) / "dev.jsonl", [{"text": words(20, 11), "label": "good"}])
    with pytest.raises(UserError, match=r"knows too little of validation: 55\.0% of its tokens are <unk>"):
        prepare_data(load_task(reviews), word_level(), tiny_bert())


def test_an_end_that_is_the_unknown_token_too_is_not_counted(reviews: Task) -> None:
    """As GPT-2's, which knows every byte."""
    tokenizer = byte_level()
    tokenizer.unk_token = "</s>"
    assert prepare_data(load_task(reviews), tokenizer, tiny_bert()).unknown == {}


def test_texts_of_which_nothing_is_left_are_refused(reviews: Task) -> None:
    write_lines(Path(str(reviews.data_dir)) / "train.jsonl", [{"text": "χ", "label": "good"}] * 3)
    with pytest.raises(UserError, match="makes no token of any text in train"):
        prepare_data(load_task(reviews), letters(), tiny_bert())
