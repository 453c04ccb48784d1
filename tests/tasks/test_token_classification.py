"""Token classification: words and their tokens, windows, what is learned, and a run from its files to its scores."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, AutoTokenizer, BertForTokenClassification, PreTrainedModel

from peftbench import load_run
from peftbench.cli.main import main
from peftbench.config.schema import Model, Task, TaskKind
from peftbench.config.task_validity import find_label_faults
from peftbench.counts.run_counts import build_meta_backbone
from peftbench.modification.attach import attach
from peftbench.records.record import Record, find_finished
from peftbench.tasks.load import load_task
from peftbench.tasks.rows import Source, check_split
from peftbench.tasks.token_classification import TAGS, TokenClassification, find_first_pieces
from peftbench.tasks.windows import FIRST, choose_windows, cut_windows
from peftbench.training.class_weights import scale_class_weights
from peftbench.utils.errors import UserError
from peftbench.utils.files import write_lines
from tests.families import PRESETS, build, dropout, shake
from tests.finished import save_tiny_bert
from tests.fitting import EPSILON, Rows, fitted, one_step, trained
from tests.tasks.test_tasks import byte_level, tiny_bert, unigram, word_level
from tests.tasks.unchanged import FAST_PATHS, assert_fast_paths_train_the_same, assert_packing_keeps_the_gradients

LABELS = ["O", "B-PER", "I-PER", "B-LOC"]
NAMES = Task(
    name="names",
    kind=TaskKind.token_classification,
    text_columns=["tokens"],
    label_column="tags",
    metric="entity_f1",
    baselines=["majority"],
)
SENTENCES = [
    (["Anna", "Bee", "sees", "Rome"], ["B-PER", "I-PER", "O", "B-LOC"]),
    (["good", "films", ",", "bad", "</s>", "films"], ["O", "O", "O", "B-PER", "I-PER", "O"]),
    (["Rome"], ["B-LOC"]),
]


def rows(*sentences: tuple[list[str], list[str]]) -> list[dict[str, list[str]]]:
    return [{"tokens": words, "tags": tags} for words, tags in sentences]


def make_data(
    tokenizer: Any, folder: Path, *sentences: tuple[list[str], list[str]], **changes: Any
) -> TokenClassification:
    write_lines(folder / "train.jsonl", rows(*sentences))
    task = replace(NAMES, data_dir=str(folder), selection_split="train", report_split="train", **changes)
    data = TokenClassification(load_task(task), tokenizer, tiny_bert())
    data.serve(tiny_bert())
    return data


@pytest.mark.parametrize("build_tokenizer", [byte_level, unigram, word_level])
def test_the_tokens_of_a_word(build_tokenizer: Any) -> None:
    """The tokens from a word's first one to the next word's first one spell it, also one like a special token."""
    from peftbench.tasks.tokens import Encoder

    tokenizer = build_tokenizer()
    encoder = Encoder(tokenizer, tiny_bert())
    for words, _ in SENTENCES:
        text = " ".join(words)
        ((ids, spans),) = encoder.pieces([text])
        firsts = find_first_pieces(words, spans)
        assert list(firsts) == list(range(len(words)))
        for word, first in firsts.items():
            end = firsts.get(word + 1, len(ids))
            spelled = text[spans[first][0] : spans[end - 1][1]]
            assert spelled.strip() == words[word]
        assert ids == encoder.ids([text])[0]


def test_words_are_aligned_as_by_word_ids(tmp_path: Path) -> None:
    """BERT's tokenizer splits words by itself: it says which word a token is of."""
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_bert(tmp_path))
    words = ["a", "b-c", "film", "don't", "\u200b", "x1y2"]  # one of which the tokenizer removes
    encoded = tokenizer(words, is_split_into_words=True, add_special_tokens=False)
    ids = encoded.word_ids()
    whole = tokenizer(" ".join(words), add_special_tokens=False, return_offsets_mapping=True)
    assert whole["input_ids"] == encoded["input_ids"]
    assert find_first_pieces(words, whole["offset_mapping"]) == {word: ids.index(word) for word in dict.fromkeys(ids)}
    assert 4 not in ids


def test_windows_overlap_and_leave_nothing_out() -> None:
    for length in (0, 1, 9, 10, 11, 57, 200):
        for room, stride in ((10, 4), (10, 1), (10, 128), (1, 1), (3, 2)):
            windows = cut_windows(length, room, stride)
            assert windows[0][0] == 0 and windows[-1][1] == length
            assert all(end - start <= room for start, end in windows)
            shared = [one[1] - other[0] for one, other in pairwise(windows)]
            assert all(count == min(stride, room // 2) for count in shared[:-1])
            assert all(count >= min(stride, room // 2) for count in shared)
    assert choose_windows([(0, 10), (6, 16)], [0, 6, 7, 8, 9, 15]) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("longest", [64, 8, 5])
@pytest.mark.parametrize("build_tokenizer", [byte_level, unigram])
def test_what_a_model_that_is_right_predicts(build_tokenizer: Any, longest: int, tmp_path: Path) -> None:
    """Each word is labelled once, at its first token; the labels there, read again, are those of the rows."""
    long = (["film"] * 5 + ["Rome"] * 3, ["O"] * 5 + ["B-LOC"] * 3)
    data = make_data(build_tokenizer(), tmp_path, *SENTENCES, long, max_source_length=longest, stride=2)
    counts = [len(words) for words, _ in [*SENTENCES, long]]
    assert sum(tag != -100 for tags in data.train[TAGS] for tag in tags) == sum(counts)
    predictions = []
    for tags, ids in zip(data.train[TAGS], data.train["input_ids"], strict=True):
        assert len(tags) == len(ids) <= longest
        predictions.append(tags + [0] * (64 - len(tags)))
    wanted = [" ".join(tags) for _, tags in [*SENTENCES, long]]
    assert data.decode(np.array(predictions), "report") == wanted == data.references(data.report_rows)
    assert data.decode(np.zeros_like(predictions), "report") == [" ".join(["O"] * count) for count in counts]
    assert data.splits["report"]["examples"] == len(counts) == sum(data.report[FIRST])
    assert longest == 64 or len(data.report) > len(counts)
    assert (len(data.report) > len(counts)) == any("windows" in note for note in data.notes)
    assert data.baselines()["majority.token_accuracy"] == pytest.approx(100 * 10 / sum(counts))


def test_a_word_without_tokens_is_outside(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_bert(tmp_path / "bert"))
    data = make_data(tokenizer, tmp_path, (["\u200b", "film"], ["B-PER", "B-PER"]), (["film"], ["O"]))
    assert data.label_codes() == [1, 0]
    assert data.decode(np.ones((2, 9), dtype=int), "report") == ["O B-PER", "B-PER"]


def test_the_first_rows_have_all_of_their_windows(tmp_path: Path) -> None:
    sentences = [(["film"] * count, ["O"] * (count - 1) + ["B-LOC"]) for count in (1, 30, 2, 30, 3)]
    data = make_data(byte_level(), tmp_path, *sentences, max_source_length=10, max_eval=4)
    windows = [data.number_examples("selection").count(row) for row in range(5)]
    assert data.splits["report"] == {"split": "train", "examples": 4, "of": 5}
    assert len(data.report) == sum(windows[:4]) and windows[1] == windows[3] > 2


def test_tables_and_lists_are_the_same_data(tmp_path: Path) -> None:
    found = []
    lines = "".join(f"{' '.join(words)}\t{' '.join(tags)}\n" for words, tags in SENTENCES)
    (tmp_path / "train.tsv").write_text(f"tokens\ttags\n{lines}")
    write_lines(tmp_path / "train.jsonl", rows(*SENTENCES))
    for name in ("train.tsv", "train.jsonl"):
        split = str(tmp_path / name)
        loaded = load_task(replace(NAMES, train_file=split, validation_file=split, test_file=split))
        assert loaded.task.labels == ["O", "B-LOC", "B-PER", "I-PER"]
        found.append(loaded.rows["train"].select_columns(["tokens", "tags"])[:])
    assert found[0] == found[1] and found[0]["tokens"] == [words for words, _ in SENTENCES]


def test_codes_of_the_hub() -> None:
    features = Features({"tokens": Sequence(Value("string")), "tags": Sequence(ClassLabel(names=["B-LOC", "O"]))})
    cells = {"tokens": [["a", "b"], ["c"]], "tags": [[1, 0], [1]]}
    source = Source(Dataset.from_dict(cells, features=features), "hub")
    checked = check_split(replace(NAMES, labels=["O", "B-LOC"]), "train", source, None)
    assert checked["tags"][:] == [[0, 1], [0]]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2: 2 words in tokens have 1 label in tags; give each word one"),
        ({"tokens": ["a"], "tags": ["O X"]}, "2: .O X. is no label of a word"),
        ({"tokens": None, "tags": ["O"]}, "2: column tokens holds .*, not a list of words"),
        ({"tokens": ["a"], "tags": None}, "2: column tags holds .*, not a list of labels"),
        (
            {"tokens": ["a"], "tags": ["B_PER"]},
            ": task.metric=entity_f1 counts entities, .* label B_PER is none",
        ),
    ],
)
def test_rows_that_are_refused(row: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [*rows(SENTENCES[0]), row, *rows(*SENTENCES)])
    with pytest.raises(UserError, match=f"train.jsonl:?{sentence}"):
        load_task(replace(NAMES, train_file=str(tmp_path / "train.jsonl")))


def test_labels_that_mark_no_entities_have_an_accuracy() -> None:
    assert list(find_label_faults("task.metric", "entity_recall", ["NOUN", "VERB"]))
    assert not list(find_label_faults("task.metric", "token_accuracy", ["NOUN", "VERB"]))
    assert not list(find_label_faults("task.metric", "entity_f1", ["O", "I-A", "S-B", "E-B"]))


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_an_encoder_decoder_is_refused(family: str, tmp_path: Path) -> None:
    build(family).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"needs a classifier of tokens .* take an encoder such as model=roberta_base"):
        build_meta_backbone(Model(name=family, path=str(tmp_path)), replace(NAMES, labels=LABELS))


# ---- Training ----


def tagger(family: str) -> PreTrainedModel:
    """A tiny model with a head for three labels, without dropout, and its modifications shaken."""
    config = build(family, **dropout(family)).config
    config.num_labels, config.use_cache = 3, False
    config.classifier_dropout = config.hidden_dropout = 0.0
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForTokenClassification.from_config(config)
    attach(model, PRESETS["parallel_adapter"])
    shake(model)
    return model.train()


def tagged_rows() -> dict[str, Tensor]:
    """Eight rows, of which the first token has a label in some, and of which one has no label at all."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([9, 8, 7, 6, 5, 4, 4, 4])
    mask = (torch.arange(9) < lengths[:, None]).long()
    labels = torch.randint(0, 3, (8, 9), generator=generator)
    labels[torch.rand((8, 9), generator=generator) < 0.4] = -100
    labels[:4, 0] = 1
    labels[7] = -100
    ids = torch.randint(5, 90, (8, 9), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


class Tagged(Rows):
    task = SimpleNamespace(labels=["a", "b", "c"])

    def label_codes(self) -> list[int]:
        return [code for code in self.rows["labels"].flatten().tolist() if code != -100]


@pytest.mark.parametrize(
    ("weights", "smoothing"),
    [(None, 0.0), (None, 0.1), ([4.0, 1.0, 0.5], 0.1)],
    ids=["plain", "smoothed", "weighted and smoothed"],
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_gradient_is_that_of_the_mean_over_all_words(
    family: str, weights: list[float] | None, smoothing: float, tmp_path: Path
) -> None:
    """Of the whole batch, however it is split; the first token of a decoder's text counts too."""
    data = Tagged(tagged_rows(), [9, 8, 7, 6, 5, 4, 4, 4])
    by_hand = tagger(family)
    logits = by_hand(**{name: data.rows[name] for name in ("input_ids", "attention_mask")}).logits
    scaled = None if weights is None else torch.tensor(scale_class_weights(weights, data.label_codes(), "abc"))
    loss = nn.CrossEntropyLoss(scaled, reduction="sum", label_smoothing=smoothing)
    summed = loss(logits.flatten(0, 1), data.rows["labels"].flatten())
    (summed / len(data.label_codes())).backward()
    expected = {n: p - p.grad / (p.grad.abs() + EPSILON) for n, p in by_hand.named_parameters() if p.grad is not None}
    before = trained(by_hand)
    assert max(float((before[name] - tensor.detach()).abs().max()) for name, tensor in expected.items()) > 1e-3
    for split in ({}, {"micro_batch": "1"}, {"batch_size": 4, "accumulation": 2, "micro_batch": "3"}):
        model = tagger(family)
        fitted(model, data, one_step(class_weights=weights, label_smoothing=smoothing, **split), tmp_path)
        for name, tensor in trained(model).items():
            torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_without_padding_the_gradients_are_the_same(family: str) -> None:
    assert_packing_keeps_the_gradients(tagger(family), tagged_rows(), lambda model, batch: model(**batch).loss)


@pytest.mark.parametrize(("settings", "size"), FAST_PATHS)
def test_fast_paths_train_the_same(settings: dict[str, bool], size: int, tmp_path: Path) -> None:
    data = Tagged(tagged_rows(), [9, 8, 7, 6, 5, 4, 4, 4])
    assert_fast_paths_train_the_same(lambda: tagger("bert"), data, settings, size, tmp_path)


# ---- A run ----


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Record]]:
    """Words with digits are names, which a tiny BERT learns in some steps; some texts need two windows."""
    folder = tmp_path_factory.mktemp("names")
    draw = np.random.default_rng(0)
    sentences = []
    for _ in range(48):
        names = draw.random(draw.integers(3, 40)) < 0.4
        sentences.append((["7" if name else "film" for name in names], ["B-PER" if name else "O" for name in names]))
    write_lines(folder / "rows.jsonl", rows(*sentences))
    line = ["task=token_classification", f"task.train_file={folder / 'rows.jsonl'}", "task.max_source_length=24"]
    line += ["model=bert_base", f"model.path={save_tiny_bert(folder / 'bert')}", "method=lora", "debug=smoke"]
    line += ["trainer.max_steps=30", "trainer.learning_rate=0.03", "trainer.class_weights=balanced"]
    line += [
        "task.baselines=[majority]",
        "task.max_train=null",
        "task.max_eval=null",
        "task.max_selection=null",
        "task.stride=8",
    ]
    assert main(["train", *line, f"output_dir={folder / 'outputs'}"]) == 0
    (file,) = (folder / "outputs").rglob("record.json")
    record = find_finished(file.parent)
    assert record is not None
    yield file.parent, record


def test_a_run_learns_and_is_scored_again(run: tuple[Path, Record], capsys: pytest.CaptureFixture[str]) -> None:
    folder, record = run
    assert record.data["labels"] == ["O", "B-PER"] and any("windows" in note for note in record.data["notes"])
    assert record.score is not None and record.score > 90 > record.baselines["majority"]
    for command in ("evaluate", "rescore"):
        capsys.readouterr()
        assert main([command, str(folder), "--json"]) == 0
        (again,) = json.loads(capsys.readouterr().out)
        assert again["metrics"] == record.scores["report"].metrics
    assert main(["compare", str(folder), str(folder), "--resamples", "20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert found["entity_f1"]["a"] == record.score and found["entity_f1"]["difference"] == 0


def test_a_run_predicts_and_is_merged(
    run: tuple[Path, Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is predicted for texts is what plain transformers predicts with the merged model."""
    folder, _ = run
    (tmp_path / "in.txt").write_text("film 7 7 film\n\n7\n")
    capsys.readouterr()
    assert main(["predict", str(folder), str(tmp_path / "in.txt")]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert [[len(cell.split()) for cell in line.split("\t")] for line in lines] == [[4, 4], [0, 0], [1, 1], [0]]
    assert main(["merge", str(folder), "--out", str(tmp_path / "merged")]) == 0
    model = BertForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    shares, codes = model(**tokenizer("film 7 7 film", return_tensors="pt")).logits[0, 1:-1].softmax(-1).max(-1)
    labels, told = lines[0].split("\t")
    assert [model.config.id2label[code] for code in codes.tolist()] == labels.split()
    assert [float(share) for share in told.split()] == pytest.approx(shares.tolist(), abs=1e-5)


def test_the_probability_of_each_label_of_a_word(run: tuple[Path, Record], tmp_path: Path) -> None:
    """That of the model in the window in which the word has the most context; none of a word without tokens."""
    folder, _ = run
    words = ["7", "film", "a", "7", "film", "film", "a"] * 6
    inputs = tmp_path / "in.txt"
    inputs.write_text(f"\n{' '.join(words)}\n7 \u200b\n")  # the second has three windows
    for ending in ("jsonl", "csv", "txt"):
        assert main(["predict", str(folder), str(inputs), "--out", str(tmp_path / f"out.{ending}")]) == 0
    model, tokenizer = load_run(folder)
    ids = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    assert len(ids) == 42 == len(words)
    wanted = []
    for word in range(42):  # windows of 22 tokens, of which neighbours share 8
        start = max((0, 14, 28), key=lambda start: min(word - start, min(start + 22, 42) - 1 - word))
        window = [tokenizer.cls_token_id, *ids[start : start + 22], tokenizer.sep_token_id]
        with torch.no_grad():
            wanted.append(model(torch.tensor([window])).logits[0, 1 + word - start].softmax(-1).tolist())
    empty, long, strange = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert empty == {"index": 0, "prediction": "", "probabilities": {"O": [], "B-PER": []}}
    for code, label in enumerate(("O", "B-PER")):
        assert long["probabilities"][label] == pytest.approx([shares[code] for shares in wanted], abs=1e-4)
    assert long["prediction"].split() == [("O", "B-PER")[shares[1] > shares[0]] for shares in wanted]
    assert strange["prediction"].split()[1] == "O" and strange["probabilities"]["B-PER"][1] is None
    header, *table = csv.reader((tmp_path / "out.csv").read_text().splitlines())
    assert header == ["index", "prediction", "probability of O", "probability of B-PER"]
    told = [[*map(float, row[3].split())] for row in table]
    assert told[:2] == [[], pytest.approx([shares[1] for shares in wanted], abs=1e-4)] and np.isnan(told[2][1])
    labels, shares = (tmp_path / "out.txt").read_text().splitlines()[1].split("\t")
    assert labels == long["prediction"]
    assert [float(share) for share in shares.split()] == pytest.approx([max(both) for both in wanted], abs=1e-4)
