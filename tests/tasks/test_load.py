"""Rows from the four kinds of source: order of precedence, checked columns, label codes, fingerprints."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from peftbench.config.compose import compose_run
from peftbench.config.roles import list_splits
from peftbench.config.schema import Task, TaskKind, find_conf_dir
from peftbench.tasks import source
from peftbench.tasks.file_set import list_candidates
from peftbench.tasks.load import _note_idle_files, fingerprint_data, list_dealt, load_task
from peftbench.tasks.rows import check_split
from peftbench.tasks.source import read_split
from peftbench.utils.errors import UserError
from peftbench.utils.files import write_lines

REVIEWS = Task(
    name="reviews",
    kind=TaskKind.classification,
    text_columns=["text"],
    labels=["bad", "good"],
    selection_split="validation",
    report_split="validation",
)
NEWS = Task(name="news", kind=TaskKind.text_to_text)


def load_rows(task: Task, split: str, limit: int | None = None) -> Dataset:
    return check_split(task, split, read_split(task, split), limit)


def with_file(task: Task, folder: Path, *rows: dict[str, Any]) -> Task:
    """`task` with a training file of `rows`."""
    file = folder / "rows.jsonl"
    write_lines(file, rows)
    return replace(task, data_files={"train": str(file)})


@pytest.mark.parametrize("label", ["good", 1, "1"])
def test_a_label_is_a_name_or_a_code(tmp_path: Path, label: str | int) -> None:
    rows = load_rows(with_file(REVIEWS, tmp_path, {"text": "fine", "label": label}), "train")
    assert rows.to_list() == [{"text": "fine", "label": 1}]


def test_a_number_is_a_name_where_names_are_numbers(tmp_path: Path) -> None:
    stars = replace(REVIEWS, labels=["1", "2", "3"])
    assert load_rows(with_file(stars, tmp_path, {"text": "fine", "label": 3}), "train")["label"][:] == [2]
    with pytest.raises(UserError, match=r"label 0 is not one of 1, 2, 3"):
        load_rows(with_file(stars, tmp_path, {"text": "fine", "label": 0}), "train")


@pytest.mark.parametrize("label", ["great", 2, -1, None, 1.0])
def test_a_label_outside_the_set(tmp_path: Path, label: object) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: label {label!r} is not one of bad, good, 0, 1\."):
        load_rows(with_file(REVIEWS, tmp_path, {"text": "odd", "label": label}), "train")


def test_all_missing_columns_are_named_with_their_keys(tmp_path: Path) -> None:
    task = with_file(REVIEWS, tmp_path, {"texts": "fine", "sentiment": 1})
    with pytest.raises(UserError) as caught:
        load_rows(task, "train")
    file = task.data_files["train"]
    assert caught.value.faults == [
        f"{file}: task.text_columns=text is unknown; did you mean texts? Choices: texts, sentiment.",
        f"{file}: task.label_column=label is unknown. Choices: texts, sentiment.",
    ]


def test_summaries_have_columns_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.target_column=summary is unknown; did you mean summaries\?"):
        load_rows(with_file(NEWS, tmp_path, {"document": "long", "summaries": "short"}), "train")


def test_a_cell_that_is_no_text(tmp_path: Path) -> None:
    task = with_file(NEWS, tmp_path, {"document": "", "summary": ""}, {"document": None, "summary": "short"})
    with pytest.raises(UserError, match=r"rows\.jsonl:2: column document holds None, not text\."):
        load_rows(task, "train")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: column summary holds 5, not text or a list of texts\."):
        load_rows(with_file(NEWS, tmp_path, {"document": "long", "summary": 5}), "train")


def test_the_limit_takes_the_first_rows_and_looks_no_further(tmp_path: Path) -> None:
    task = with_file(REVIEWS, tmp_path, {"text": "a", "label": "bad"}, {"text": "b", "label": "outside"})
    assert load_rows(task, "train", limit=1).to_list() == [{"text": "a", "label": 0}]


def test_order_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(hub_id: str, hub_config: str | None, split: str, revision: str | None) -> Dataset:
        features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
        return Dataset.from_list([{"text": f"{hub_id} {hub_config} {split}", "label": 1}], features=features)

    def docstrings(packages: list[str], split: str) -> list[dict[str, str]]:
        return [{"name": "json.dumps", "text": f"{packages} {split}", "label": "good"}]

    monkeypatch.setattr(source, "load_dataset", hub)
    monkeypatch.setattr(source, "explain_missing_hub", lambda: None)
    monkeypatch.setattr(source, "make_topic_rows", docstrings)
    task = replace(REVIEWS, hub_id="me/reviews", hub_config="en")
    assert load_rows(task, "train").to_list() == [{"text": "me/reviews en train", "label": 1}]
    task = replace(task, packages=["json"])
    assert load_rows(task, "train").to_list() == [{"name": "json.dumps", "text": "['json'] train", "label": 1}]
    (tmp_path / "train.csv").write_text("text,label\nfrom a folder,bad\n")
    task = replace(task, data_dir=str(tmp_path))
    assert load_rows(task, "train").to_list() == [{"text": "from a folder", "label": 0}]
    task = with_file(task, tmp_path, {"text": "from a file", "label": 0})
    assert load_rows(task, "train").to_list() == [{"text": "from a file", "label": 0}]


def problems(split: str, count: int) -> list[dict[str, str]]:
    return [{"question": f"{split} {i}?", "answer": f"It is {i}. #### {i}"} for i in range(count)]


def test_gsm8k_holds_out_a_tenth_of_its_training_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub has train and test only; the test problems choose nothing."""
    sizes, asked = {"train": 50, "test": 20}, []

    def hub(hub_id: str, hub_config: str | None, split: str, revision: str | None) -> Dataset:
        asked.append(split)
        return Dataset.from_list(problems(split, sizes[split]))

    monkeypatch.setattr(source, "load_dataset", hub)
    monkeypatch.setattr(source, "explain_missing_hub", lambda: None)
    task = compose_run(["task=gsm8k"]).task
    loaded = load_task(task)
    questions = {split: rows["question"][:] for split, rows in loaded.rows.items()}
    assert {split: len(found) for split, found in questions.items()} == {"train": 45, "held_out": 5, "test": 20}
    assert sorted(questions["train"] + questions["held_out"]) == sorted(
        row["question"] for row in problems("train", 50)
    )
    assert loaded.roles["selection"][0] == "held_out" and loaded.roles["report"][0] == "test"
    (note,) = loaded.notes
    assert note == "openai/gsm8k main is split by a hash of the input: held_out has one in ten of the different inputs."
    whole = load_task(replace(task, selection_split="train"))
    assert len(whole.rows["train"]) == 50
    asked.clear()
    assert load_task(task, training=False, dealt=list_dealt(task)).rows.keys() == {"test"} and asked == ["test"]
    again = load_task(replace(task, report_split="held_out"), training=False, dealt=list_dealt(task))
    assert again.rows["held_out"]["question"][:] == questions["held_out"]


def test_the_held_out_split_of_files(tmp_path: Path) -> None:
    """A folder's dev file, which may be reported on, is not taken for it; a file that is named for it is."""
    for name, count in (("train", 30), ("dev", 4), ("test", 7), ("own", 3)):
        write_lines(tmp_path / f"{name}.jsonl", problems(name, count))
    for words in (
        [f"task.data_dir={tmp_path}"],
        [f"task.train_file={tmp_path / 'train.jsonl'}", f"task.test_file={tmp_path / 'test.jsonl'}"],
    ):
        rows = load_task(compose_run(["task=gsm8k", *words]).task).rows
        assert {split: len(found) for split, found in rows.items()} == {"train": 27, "held_out": 3, "test": 7}
        assert all(question.startswith("train") for question in rows["held_out"]["question"][:])
        words = ["task=gsm8k", *words, f"task.validation_file={tmp_path / 'own.jsonl'}"]
        rows = load_task(compose_run(words).task).rows
        assert (len(rows["train"]), rows["held_out"]["question"][0]) == (30, "own 0?")


def test_a_dev_file_that_nothing_reads_is_noted(tmp_path: Path) -> None:
    """It is not taken in place of another selection split, which would change what is trained on."""
    for name, count in (("train", 30), ("dev", 4), ("test", 7)):
        write_lines(tmp_path / f"{name}.jsonl", problems(name, count))

    def load(*words: str) -> tuple[int, list[str]]:
        loaded = load_task(compose_run(["task=gsm8k", f"task.data_dir={tmp_path}", *words]).task)
        return len(loaded.rows["train"]), [note for note in loaded.notes if "dev.jsonl" in note]

    def make_note(split: str) -> str:
        of = f"because task.selection_split={split}; task.selection_split=validation chooses on it."
        return f"{tmp_path / 'dev.jsonl'} is not used, {of}"

    assert load() == (27, [make_note("held_out")])
    assert load("task.selection_split=train") == (30, [make_note("train")])
    assert load("task.selection_split=validation") == (30, [])
    assert load(f"task.validation_file={tmp_path / 'test.jsonl'}", "task.report_split=train") == (30, [])  # named
    assert load(f"task.test_file={tmp_path / 'dev.jsonl'}") == (27, [])  # it is read, as the file of another split
    assert load("task.report_split=validation") == (27, [])
    (tmp_path / "val.csv").write_text("question,answer\n1?,1\n")
    ((_, (note,)),) = [load()]
    assert note.startswith(f"{tmp_path / 'dev.jsonl'} and {tmp_path / 'val.csv'} are not used") and "on one." in note


@pytest.mark.parametrize("task", sorted(file.stem for file in (find_conf_dir() / "task").glob("*.yaml")))
def test_no_preset_leaves_the_dev_file_of_a_folder_without_a_word(task: str, tmp_path: Path) -> None:
    chosen = compose_run([f"task={task}", f"task.data_dir={tmp_path}"]).task
    (tmp_path / "dev.tsv").write_text("a\tb\n")
    read = {file for split in list_splits(chosen) for file in list_candidates(str(tmp_path), split)}
    assert bool(read) != bool(_note_idle_files(chosen))
    assert bool(read) or task == "gsm8k"


def test_a_file_for_a_split_that_the_task_has_not() -> None:
    with pytest.raises(UserError, match=r"task\.data_files\.trian is not a split of this task; its splits are train"):
        load_rows(replace(REVIEWS, data_files={"trian": "x.tsv"}), "train")


def test_docstrings_have_three_splits() -> None:
    with pytest.raises(UserError, match="Docstrings have no dev split; their splits are train, validation, test"):
        load_rows(replace(NEWS, packages=["json"], report_split="dev"), "dev")


@pytest.mark.parametrize(
    ("split", "file"),
    [("train", "task.train_file"), ("validation", "task.validation_file"), ("test", "task.test_file")],
)
def test_no_source_at_all(split: str, file: str) -> None:
    said = f"task=news has no data for its {split} split; give {file}=FILE, or task.data_dir=FOLDER, with files for"
    with pytest.raises(UserError, match=said):
        load_rows(NEWS, split)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            ConnectionError("offline"),
            r"task\.hub_id=me/reviews is not in this machine's cache and no cable is in; "
            r"give task\.data_dir=FOLDER with files for train, validation \(such as train\.jsonl\) that have the "
            r"columns text, label, or set HF_HOME to",
        ),
        (ValueError("Unknown split 'train'.\nMore"), r"the train split cannot be loaded: Unknown split 'train'\.$"),
        (FileNotFoundError("no such data set"), r"task\.hub_config=null: the train split cannot be loaded: no such"),
        (
            ValueError("Couldn't find cache for me/reviews for config 'en'\nAvailable configs in the cache: ['fr']"),
            r"Couldn't find cache for me/reviews for config 'en', and no cable is in; give task\.data_dir=FOLDER with",
        ),
        (
            FileNotFoundError("No file reviews-train.arrow"),
            r"-train\.arrow, and no cable is in; give task\.data_dir=FOLDER",
        ),
    ],
)
def test_the_hub_fails(monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(source, "load_dataset", fail)
    monkeypatch.setattr(source, "explain_missing_hub", lambda: "no cable is in")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # puts back what the call sets
    with pytest.raises(UserError, match=sentence):
        load_rows(replace(REVIEWS, hub_id="me/reviews"), "train")


def test_a_dataset_script_is_read_as_the_hub_converted_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def scripted(*_: object, revision: str | None, **__: object) -> Dataset:
        asked.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found reviews.py")
        return Dataset.from_list([{"text": "fine", "label": 1}])

    monkeypatch.setattr(source, "load_dataset", scripted)
    monkeypatch.setattr(source, "explain_missing_hub", lambda: None)
    assert load_rows(replace(REVIEWS, hub_id="me/reviews"), "train").to_list() == [{"text": "fine", "label": 1}]
    assert asked == [None, "refs/convert/parquet"]


def test_webnlg_has_lists_of_triples_and_of_texts(shared: Path) -> None:
    run = compose_run(["task=webnlg", f"task.data_dir={shared / 'webnlg'}"])
    rows = load_rows(run.task, "test")
    assert len(rows) == 1862 and all(isinstance(text, str) for text in rows["triples"][:])
    assert max(len(texts) for texts in rows["texts"][:]) > 1


def test_the_fingerprint_is_of_the_cells_in_use(tmp_path: Path) -> None:
    plain = load_rows(with_file(REVIEWS, tmp_path, {"text": "fine", "label": "good"}), "train")
    other = load_rows(with_file(REVIEWS, tmp_path, {"id": 7, "label": 1, "text": "fine"}), "train")
    changed = load_rows(with_file(REVIEWS, tmp_path, {"text": "fine!", "label": 1}), "train")
    assert fingerprint_data(REVIEWS, plain) == fingerprint_data(REVIEWS, other) != fingerprint_data(REVIEWS, changed)
    assert len(fingerprint_data(REVIEWS, plain)) == 64


@pytest.fixture
def shared() -> Path:
    folder = os.environ.get("PEFTBENCH_SHARED")
    if not folder:
        pytest.skip("PEFTBENCH_SHARED names no folder with the shared data")
    return Path(folder) / "data"


def test_sst2_as_glue_has_it(shared: Path) -> None:
    task = replace(REVIEWS, data_dir=str(shared / "sst2"), text_columns=["sentence"])
    rows = load_rows(task, "validation")
    assert (len(rows), sum(rows["label"])) == (872, 444)


def test_rte_as_glue_has_it(shared: Path) -> None:
    run = compose_run(["task=rte", f"task.data_dir={shared / 'rte'}"])
    labels = load_rows(run.task, "validation")["label"][:]
    assert [labels.count(code) for code in range(2)] == [146, 131]


def test_mnli_from_two_files(shared: Path) -> None:
    file = str(shared / "nli" / "mnli_dev_matched.jsonl")
    task = replace(
        REVIEWS,
        data_files={"validation": file},
        text_columns=["premise", "hypothesis"],
        labels=["entailment", "neutral", "contradiction"],
    )
    labels = load_rows(task, "validation")["label"][:]
    assert [labels.count(code) for code in range(3)] == [3479, 3123, 3213]
