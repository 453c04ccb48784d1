"""Extractive question answering: answers and their tokens, windows, what is learned, and a run to its scores."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, BertForQuestionAnswering, PreTrainedModel

from peftbench.backbones.load import load_backbone
from peftbench.cli.main import main
from peftbench.config.schema import Model, Task, TaskKind
from peftbench.evaluation.retention import put_trained_tensors
from peftbench.metrics.evaluate_metric import EvaluateMetric
from peftbench.metrics.measure import measure
from peftbench.modification.attach import attach
from peftbench.modification.state import FILE_NAME, fold, save
from peftbench.records.record import Record, find_finished
from peftbench.tasks.load import load_task
from peftbench.tasks.question_answering import END, START, QuestionAnswering, find_best_span
from peftbench.training.answer_loss import compute_answer_loss
from peftbench.training.shares import COUNTED, ROW, WHOLE, share_batches
from peftbench.utils.errors import UserError
from peftbench.utils.files import write_lines
from peftbench.utils.team import Team
from tests.families import PRESETS, build, dropout, shake
from tests.finished import save_backbone, save_tiny_bert
from tests.fitting import EPSILON, Rows, fitted, one_step, trained
from tests.tasks.test_tasks import byte_level, tiny_bert, unigram
from tests.tasks.unchanged import FAST_PATHS, assert_fast_paths_train_the_same, assert_packing_keeps_the_gradients

ASK = Task(
    name="ask",
    kind=TaskKind.question_answering,
    text_columns=["question", "context"],
    label_column="answers",
    metric="squad_f1",
    baselines=["copy", "no_answer"],
)


def answered(question: str, context: str, answer: str, start: int | None = None) -> dict[str, Any]:
    place = context.index(answer) if start is None else start
    return {"question": question, "context": context, "answers": {"text": [answer], "answer_start": [place]}}


NONE = {"question": "bad ?", "context": "good film", "answers": {"text": [], "answer_start": []}}
ROWS = [
    answered("good ?", "bad films , good films", "good films"),
    answered("bad ?", "it was </s> good , it was bad", "bad"),  # after what is written otherwise for some tokenizers
    answered("good ?", "good good good", "good", 5),  # not the first place of that text
]


# ---- Scores ----


def reference_scores(ours: str, right: list[str]) -> tuple[float, float]:
    """F1 and exact match of one answer, from the definitions, with lists instead of counts."""

    def words(text: str) -> list[str]:
        kept = "".join(sign for sign in text.lower() if sign not in set(string.punctuation))
        return [word for word in kept.split() if word not in ("a", "an", "the")]

    found = []
    for text in [text for text in right if words(text)] or [""]:
        mine, theirs = words(ours), words(text)
        left, common = list(theirs), 0
        for word in mine:
            if word in left:
                left.remove(word)
                common += 1
        precision, recall = (common / max(1, len(side)) for side in (mine, theirs))
        f1 = 2 * precision * recall / (precision + recall) if common else float(mine == theirs)
        found.append((f1, float(mine == theirs)))
    return max(f1 for f1, _ in found), max(exact for _, exact in found)


def test_scores_are_those_of_the_definition() -> None:
    draw = random.Random(1)
    words = ["The", "a", "An", "cat's", "cat", "U.S.", "us", "—", "...", "Été", "théâtre", "2,000"]
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 4))) for _ in range(400)]
    right = [[" ".join(draw.choices(words, k=draw.randint(0, 4))) for _ in range(draw.randint(1, 3))] for _ in texts]
    expected = np.array([reference_scores(*one) for one in zip(texts, right, strict=True)])
    found = measure("squad_f1", texts, right).scores
    assert found == pytest.approx(
        {"squad_f1": 100 * expected[:, 0].mean(), "squad_exact_match": 100 * expected[:, 1].mean()}
    )
    assert 2 < found["squad_exact_match"] < found["squad_f1"] < 90
    assert EvaluateMetric("squad_f1").compute(predictions=texts, references=right) == found


def test_the_best_part_of_a_context() -> None:
    draw = np.random.default_rng(0)
    for length in (1, 2, 7, 40):
        for longest in (1, 3, 100):
            start, end = draw.normal(size=(2, length))
            pairs = [(i, j) for i in range(length) for j in range(i, min(length, i + longest))]
            first, last, score = find_best_span(start, end, longest)
            assert (first, last) == max(pairs, key=lambda pair: start[pair[0]] + end[pair[1]])
            assert score == start[first] + end[last]
    assert find_best_span(start[:0], end[:0], 3)[2] == -np.inf


# ---- Rows, tokens and windows ----


def make_data(
    tokenizer: Any, folder: Path, *rows: dict[str, Any], model: PreTrainedModel | None = None, **changes: Any
) -> QuestionAnswering:
    write_lines(folder / "train.jsonl", rows)
    task = replace(ASK, data_dir=str(folder), selection_split="train", report_split="train", **changes)
    data = QuestionAnswering(load_task(task), tokenizer, model or tiny_bert())
    data.serve(model or tiny_bert())
    return data


def make_scores(data: QuestionAnswering) -> np.ndarray:
    """The scores of a model that has learned the training examples: 9 at both of an answer's ends, else 0."""
    width = max(map(len, data.train["input_ids"]))
    scores = np.zeros((len(data.train), 2, width))
    for window, places in enumerate(zip(data.train[START], data.train[END], strict=True)):
        for side, place in enumerate(places):
            scores[window, side, place] = 9.0
    return scores


@pytest.mark.parametrize(
    ("build_tokenizer", "longest"), [(byte_level, 32), (byte_level, 22), (unigram, 32), (unigram, 29)]
)
def test_what_a_model_that_is_right_predicts(build_tokenizer: Any, longest: int, tmp_path: Path) -> None:
    """The tokens that are learned, read again, are the answers, however many windows a context has."""
    data = make_data(build_tokenizer(), tmp_path, *ROWS, NONE, unanswerable=True, max_source_length=longest, stride=7)
    assert all(len(ids) <= longest for ids in data.train["input_ids"])
    assert data.train["input_ids"] == data.report["input_ids"]
    assert longest == 32 or len(data.train) > 4
    wanted = [row["answers"]["text"] or [""] for row in [*ROWS, NONE]]
    for row, ids, first, last in zip(
        data.number_examples("report"), data.train["input_ids"], data.train[START], data.train[END], strict=True
    ):
        spelled = data.tokenizer.decode(ids[first : last + 1]).replace("▁", "").replace(" ", "")
        assert first == last == 0 or spelled == wanted[row][0].replace(" ", "")
    assert [[text] for text in data.decode(make_scores(data))] == wanted == data.references(data.report_rows)
    assert data.train_rows["answer_start"][2] == [5]
    assert data.splits["report"]["examples"] == 4
    assert data.baselines()["no_answer.squad_exact_match"] == 25


def test_no_answer_needs_all_windows(tmp_path: Path) -> None:
    """The scores of none are the smallest over the windows, as in SQuAD's own baseline."""
    row = answered("good ?", "bad " * 20 + "good", "good")
    data = make_data(byte_level(), tmp_path, row, unanswerable=True, max_source_length=14, stride=1)
    assert len(data.report) > 2
    scores = make_scores(data)
    assert data.decode(scores) == ["good"]
    inside = [window for window, place in enumerate(data.train[START]) if place]
    scores[inside, :, 0] = 9.5
    assert data.decode(scores) == ["good"]  # the other windows have 9
    scores[:, :, 0] = 9.5
    assert data.decode(scores) == [""]
    data.task = replace(data.task, unanswerable=False)
    assert data.decode(scores) == ["good"]


def test_a_decoder_says_at_the_end_that_there_is_no_answer(tmp_path: Path) -> None:
    model = build("gpt2", vocab_size=512)
    tokenizer = byte_level()
    data = make_data(tokenizer, tmp_path, *ROWS, NONE, model=model, unanswerable=True)
    assert data.train[START][3] == data.train[END][3] == len(data.train["input_ids"][3]) - 1
    assert data.train["input_ids"][3][-1] == tokenizer.eos_token_id
    assert [[text] for text in data.decode(make_scores(data))] == data.references(data.report_rows)


def test_a_question_takes_half_of_a_window(tmp_path: Path) -> None:
    data = make_data(byte_level(), tmp_path, answered("good " * 30, "bad film", "film"), max_source_length=16)
    assert all(len(ids) <= 16 for ids in data.train["input_ids"])
    assert data.cut["train"] == {"questions": 1.0}
    assert "Questions are truncated to 8 tokens (half of a window; task.max_source_length=16)" in " ".join(data.notes)
    assert data.decode(make_scores(data)) == ["film"]


def test_answers_in_three_forms_are_the_same_data(tmp_path: Path) -> None:
    found = []
    lines = "".join(f"{row['question']}\t{row['context']}\t{row['answers']['text'][0]}\n" for row in ROWS)
    (tmp_path / "one.tsv").write_text(f"question\tcontext\tanswers\n{lines}")
    write_lines(tmp_path / "lists.jsonl", [{**row, "answers": row["answers"]["text"]} for row in ROWS])
    write_lines(tmp_path / "squad.jsonl", ROWS)
    for name in ("one.tsv", "lists.jsonl", "squad.jsonl"):
        split = str(tmp_path / name)
        loaded = load_task(replace(ASK, train_file=split, validation_file=split, test_file=split))
        found.append(loaded.rows["train"].select_columns(["question", "context", "answers"])[:])
        assert loaded.rows["train"]["answer_start"][:2] == [[row["answers"]["answer_start"][0]] for row in ROWS[:2]]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (NONE, "2: the question has no answer in column answers; add task.unanswerable=true if"),
        (answered("a", "good film", "bad", 0), "2: the answer .bad. is not in the context, or not where answer_start"),
        (answered("a", "good film", "film", 1), "2: the answer .film. is not in the context, or not where"),
        ({**NONE, "answers": 3}, "2: column answers holds .*, not answers; give texts"),
        ({**NONE, "context": None}, "2: column context holds None, not text"),
    ],
)
def test_rows_that_are_refused(row: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    first = {**ROWS[0], "answers": 4} if row["answers"] == 3 else ROWS[0]
    write_lines(tmp_path / "train.jsonl", [first, row])
    sentence = sentence.replace("2:", "1:") if row["answers"] == 3 else sentence
    with pytest.raises(UserError, match=f"train.jsonl:{sentence}"):
        load_task(replace(ASK, data_dir=str(tmp_path), selection_split="train", report_split="train"))


# ---- Training ----


def answerer(family: str) -> PreTrainedModel:
    """A tiny model with a head that finds answers, without dropout, and its modifications shaken."""
    config = build(family, **dropout(family)).config
    config.num_labels, config.use_cache = 2, False
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForQuestionAnswering.from_config(config)
    attach(model, PRESETS["parallel_adapter"])
    shake(model)
    return model.train()


def asked_rows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(9) < torch.tensor([9, 8, 7, 6, 5, 4, 4, 4])[:, None]).long()
    ids = torch.randint(5, 90, (8, 9), generator=generator) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        START: torch.tensor([8, 0, 3, 2, 1, 0, 2, 3]),
        END: torch.tensor([8, 0, 5, 2, 4, 0, 3, 3]),
    }


def answer_loss(model: PreTrainedModel, rows: dict[str, Tensor]) -> Tensor:
    """The mean over the examples, each of which passes by itself and without padding."""
    found = []
    for ids, mask, first, last in zip(
        *(rows[name] for name in ("input_ids", "attention_mask", START, END)), strict=True
    ):
        outputs = model(ids[None, : mask.sum()])
        found += [-outputs.start_logits.log_softmax(-1)[0, first], -outputs.end_logits.log_softmax(-1)[0, last]]
    return torch.stack(found).mean()


@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_the_gradient_is_that_of_the_mean_over_all_questions(family: str, tmp_path: Path) -> None:
    data = Rows(asked_rows(), [9, 8, 7, 6, 5, 4, 4, 4])
    by_hand = answerer(family)
    answer_loss(by_hand, data.rows).backward()  # type: ignore[no-untyped-call]  # torch's
    expected = {n: p - p.grad / (p.grad.abs() + EPSILON) for n, p in by_hand.named_parameters() if p.grad is not None}
    before = trained(by_hand)
    assert {name for name in expected if name.startswith("qa_outputs")} and len(expected) > 4
    assert max(float((before[name] - tensor.detach()).abs().max()) for name, tensor in expected.items()) > 1e-3
    for split in ({}, {"micro_batch": "3"}, {"batch_size": 4, "accumulation": 2}):
        model = answerer(family)
        fitted(model, data, one_step(**split), tmp_path)
        for name, tensor in trained(model).items():
            torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_without_padding_the_gradients_are_the_same(family: str) -> None:
    assert_packing_keeps_the_gradients(answerer(family), asked_rows(), compute_answer_loss)


@pytest.mark.parametrize(("settings", "size"), FAST_PATHS)
def test_fast_paths_train_the_same(settings: dict[str, bool], size: int, tmp_path: Path) -> None:
    data = Rows(asked_rows(), [9, 8, 7, 6, 5, 4, 4, 4])
    assert_fast_paths_train_the_same(lambda: answerer("bert"), data, settings, size, tmp_path)


def test_processes_share_the_questions() -> None:
    """Each takes its rows, and counts questions; one without any takes the first, which then counts nothing."""

    class Last(Team):
        rank, size = 2, 3

    data = Rows(asked_rows(), [9, 8, 7, 6, 5, 4, 4, 4])
    collate = share_batches(data.collator, Last(), next_token=False)
    share = collate([data.train[row] for row in range(8)])
    assert share[WHOLE].tolist() == [8] * len(share[ROW])
    assert share[START].tolist() == [data.train[row][START] for row in share[ROW]]
    few = collate([data.train[row] for row in range(2)])
    assert few[COUNTED].tolist() == [False] and few[WHOLE].tolist() == [2]


def test_a_llama_keeps_its_weights_under_another_name(tmp_path: Path) -> None:
    """transformers calls the backbone of LlamaForQuestionAnswering `transformer`, that of the others `model`."""
    llama = build("llama")
    save_backbone(tmp_path, llama, byte_level())
    loaded = load_backbone(Model(name="llama", path=str(tmp_path)), ASK)
    assert loaded.untrained == {"qa_outputs.weight", "qa_outputs.bias"}
    for name, tensor in llama.base_model.state_dict().items():
        assert torch.equal(loaded.model.base_model.state_dict()[name], tensor)


def test_what_a_llama_learned_is_put_into_its_language_model(tmp_path: Path) -> None:
    answers, writes = answerer("llama"), build("llama")
    fold(answers)
    save(answers, tmp_path)
    attach(writes, PRESETS["parallel_adapter"])
    put_trained_tensors(writes, tmp_path / FILE_NAME)
    found = trained(writes)
    assert len(found) > 4
    for name, tensor in found.items():
        assert torch.equal(tensor, answers.get_parameter(name.replace("model.", "transformer.", 1)))


# ---- A run ----


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Record]]:
    """The answer is the digit, which a tiny BERT learns in some steps; some contexts need two windows."""
    folder = tmp_path_factory.mktemp("asked")
    draw = np.random.default_rng(0)
    rows = []
    for number in range(48):
        words = ["film"] * int(draw.integers(3, 40))
        words[draw.integers(len(words))] = str(draw.integers(5, 9))
        context = " ".join(words)
        (digit,) = (word for word in words if word != "film")
        rows.append({"id": f"q{number}", **answered("good", context, digit)})
    write_lines(folder / "rows.jsonl", rows)
    line = ["task=question_answering", f"task.train_file={folder / 'rows.jsonl'}", "task.max_source_length=24"]
    line += ["model=bert_base", f"model.path={save_tiny_bert(folder / 'bert')}", "method=lora", "debug=smoke"]
    line += ["trainer.max_steps=60", "trainer.learning_rate=0.03", "task.stride=8", "task.baselines=[copy]"]
    line += ["task.max_train=null", "task.max_eval=null", "task.max_selection=null", "speed=true"]
    assert main(["train", *line, f"output_dir={folder / 'outputs'}"]) == 0
    (file,) = (folder / "outputs").rglob("record.json")
    record = find_finished(file.parent)
    assert record is not None
    yield file.parent, record


def test_a_run_learns_and_is_scored_again(run: tuple[Path, Record], capsys: pytest.CaptureFixture[str]) -> None:
    folder, record = run
    assert record.score is not None and record.score > 90 > record.baselines["copy"]
    assert any("windows" in note for note in record.data["notes"])
    assert record.speed is not None and record.speed.of == "read" and record.speed.tokens > 0
    for command in ("evaluate", "rescore"):
        capsys.readouterr()
        assert main([command, str(folder), "--json"]) == 0
        (again,) = json.loads(capsys.readouterr().out)
        assert again["metrics"] == record.scores["report"].metrics
    assert main(["compare", str(folder), str(folder), "--resamples", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["squad_f1"]["a"] == record.score


def test_a_run_predicts_and_is_merged(
    run: tuple[Path, Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    (tmp_path / "in.txt").write_text("good\tfilm film 7 film\ngood\t" + "film " * 30 + "6 film\n")
    capsys.readouterr()
    assert main(["predict", str(folder), str(tmp_path / "in.txt")]) == 0
    assert capsys.readouterr().out.splitlines() == ["7", "6"]
    assert main(["merge", str(folder), "--out", str(tmp_path / "merged")]) == 0
    _, report = BertForQuestionAnswering.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
