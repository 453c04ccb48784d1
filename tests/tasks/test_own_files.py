"""Tasks over the user's own files: which file is which split, how one file is dealt, and which labels are found."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from peftbench.config.compose import compose_run
from peftbench.config.schema import Task, TaskKind
from peftbench.metrics.measure import measure
from peftbench.tasks.deal import ROW
from peftbench.tasks.load import list_dealt, load_task, read_label_names
from peftbench.utils.errors import UserError

OWN = Task(name="own", kind=TaskKind.classification, text_columns=["text"], metric="accuracy")
WRITING = Task(name="own", kind=TaskKind.text_to_text, source_column="source", target_column="target", metric="rougeL")


def write(folder: Path, name: str, content: str | bytes) -> str:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def jsonl(folder: Path, name: str, *rows: dict[str, Any]) -> str:
    return write(folder, name, "".join(json.dumps(row) + "\n" for row in rows))


def reviews(count: int) -> list[dict[str, Any]]:
    return [{"text": f"film {i}", "label": ("bad", "good")[i % 2]} for i in range(count)]


def test_each_role_has_its_file(tmp_path: Path) -> None:
    files = {
        f"{name}_file": jsonl(tmp_path, f"{name}.jsonl", *reviews(count))
        for name, count in (("train", 6), ("validation", 3), ("test", 4))
    }
    loaded = load_task(replace(OWN, labels=["bad", "good"], **files))
    assert {split: len(rows) for split, rows in loaded.rows.items()} == {"train": 6, "validation": 3, "test": 4}
    assert all("are also trained on" in note for note in loaded.notes)  # all files have the same rows


def test_one_file_is_dealt_by_content(tmp_path: Path) -> None:
    rows = reviews(40)
    loaded = load_task(replace(OWN, train_file=jsonl(tmp_path, "all.jsonl", *rows)))
    for of_split in loaded.rows.values():  # each row knows its place in the file
        assert of_split["text"][:] == [rows[index]["text"] for index in of_split[ROW][:]]
    texts = {split: set(of_split["text"][:]) for split, of_split in loaded.rows.items()}
    assert {split: len(found) for split, found in texts.items()} == {"train": 32, "validation": 4, "test": 4}
    assert texts["train"] | texts["validation"] | texts["test"] == {row["text"] for row in rows}
    again = load_task(replace(OWN, train_file=jsonl(tmp_path, "reversed.jsonl", *reversed(rows))))
    assert {split: set(of_split["text"][:]) for split, of_split in again.rows.items()} == texts
    assert "validation and test each have one in ten of the different inputs." in loaded.notes[1]


def test_a_split_is_dealt_as_for_the_task_that_was_trained(tmp_path: Path) -> None:
    trained = replace(OWN, train_file=jsonl(tmp_path, "all.jsonl", *reviews(40)))
    expected = load_task(trained)
    assert list_dealt(trained) == ["validation", "test"]
    for split, rows in expected.rows.items():
        again = load_task(replace(expected.task, report_split=split), training=False, dealt=list_dealt(trained))
        assert again.rows[split]["text"][:] == rows["text"][:]
    other = replace(expected.task, test_file=jsonl(tmp_path, "other.jsonl", *reviews(7)))  # given since
    assert len(load_task(other, training=False, dealt=list_dealt(trained)).rows["test"]) == 7


def test_equal_inputs_are_dealt_to_one_split(tmp_path: Path) -> None:
    rows = [{"text": f"film {i % 12}", "label": ("bad", "good")[i % 2]} for i in range(120)]
    loaded = load_task(replace(OWN, train_file=jsonl(tmp_path, "all.jsonl", *rows)))
    texts = [set(of_split["text"][:]) for of_split in loaded.rows.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 12
    assert sum(map(len, loaded.rows.values())) == 120


def domains(*sizes: int) -> list[dict[str, str]]:
    """So many different texts of each domain, d0 and so on."""
    rows = [(f"d{domain}", f"film {domain} {number}") for domain, size in enumerate(sizes) for number in range(size)]
    return [{"text": text, "label": ("bad", "good")[i % 2], "domain": name} for i, (name, text) in enumerate(rows)]


def test_groups_are_dealt_whole(tmp_path: Path) -> None:
    """A domain of more than 1.5 tenths goes to the training split; the order of the rows changes nothing."""
    rows = domains(30, 40, *[6] * 5)
    task = replace(OWN, deal_by="domain", train_file=jsonl(tmp_path, "all.jsonl", *rows))
    loaded = load_task(task)
    of = {split: Counter(found["domain"][:]) for split, found in loaded.rows.items()}
    assert sum(of.values(), Counter()) == Counter(row["domain"] for row in rows)
    assert sum(len(found) for found in of.values()) == 7 and {"d0", "d1"} <= of["train"].keys()
    assert all(of[split].total() == 12 for split in ("validation", "test"))
    told = [
        f"{split} has {', '.join(sorted(of[split]))} ({of[split].total()} rows)" for split in ("validation", "test")
    ]
    assert f"is split by domain: {'; '.join(told)}." in loaded.notes[1]
    again = load_task(replace(task, train_file=jsonl(tmp_path, "reversed.jsonl", *reversed(rows))))
    assert {split: Counter(found["domain"][:]) for split, found in again.rows.items()} == of
    for split, found in loaded.rows.items():  # as `peftbench evaluate` does
        alone = load_task(replace(loaded.task, report_split=split), training=False, dealt=list_dealt(task))
        assert alone.rows[split]["text"][:] == found["text"][:]


def test_groups_that_share_an_input_are_one(tmp_path: Path) -> None:
    rows = domains(*[5] * 8)
    linked = [{"text": f"film {one} 0", "label": "bad", "domain": f"d{one + 1}"} for one in (0, 2, 4)]
    loaded = load_task(replace(OWN, deal_by="domain", train_file=jsonl(tmp_path, "all.jsonl", *rows, *linked)))
    for found in loaded.rows.values():
        places = set(found["domain"][:])
        assert all((f"d{one}" in places) == (f"d{one + 1}" in places) for one in (0, 2, 4))
    texts = [set(found["text"][:]) for found in loaded.rows.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 40


def test_a_group_that_is_too_large_leaves_the_smallest(tmp_path: Path) -> None:
    task = replace(OWN, deal_by="domain", train_file=jsonl(tmp_path, "all.jsonl", *domains(50, 40, 30)))
    assert {split: {*found["domain"][:]} for split, found in load_task(task).rows.items()} == {
        "validation": {"d2"},
        "test": {"d1"},
        "train": {"d0"},
    }


@pytest.mark.parametrize(
    ("by", "sizes", "sentence"),
    [
        (
            "topic",
            (5, 5, 5),
            r"task\.deal_by=topic: .*all\.jsonl has no column topic; its columns are text, domain, label\.",
        ),
        (
            "domain",
            (9, 9),
            r"all\.jsonl has 2 different groups by domain, too few for the splits train, validation, test",
        ),
    ],
)
def test_groups_that_cannot_be_dealt(by: str, sizes: tuple[int, ...], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        load_task(replace(OWN, deal_by=by, train_file=jsonl(tmp_path, "all.jsonl", *domains(*sizes))))


def test_groups_without_a_split_to_deal_are_refused(tmp_path: Path) -> None:
    names = ("train", "validation", "test")
    files = {f"{name}_file": jsonl(tmp_path, f"{name}.jsonl", *domains(5, 5, 5)) for name in names}
    with pytest.raises(
        UserError, match=r"task\.deal_by=domain: no split is dealt, .* add task.selection_split=held_out"
    ):
        load_task(replace(OWN, deal_by="domain", **files))


def test_only_what_has_no_file_is_dealt(tmp_path: Path) -> None:
    task = replace(
        OWN,
        train_file=jsonl(tmp_path, "train.jsonl", *reviews(20)),
        test_file=jsonl(tmp_path, "test.jsonl", *reviews(5)),
    )
    loaded = load_task(task)
    assert {split: len(rows) for split, rows in loaded.rows.items()} == {"train": 18, "validation": 2, "test": 5}
    assert "validation has one in ten of the different inputs." in loaded.notes[1]
    assert len(load_task(replace(task, max_train=7)).rows["train"]) == 7


def test_too_few_inputs_to_deal(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "bad"}, {"text": "b", "label": "good"}, {"text": "b", "label": "good"}]
    with pytest.raises(UserError, match=r"all\.jsonl has 2 different inputs, too few for the splits train, validation"):
        load_task(replace(OWN, train_file=jsonl(tmp_path, "all.jsonl", *rows)))


def test_a_pair_is_one_input(tmp_path: Path) -> None:
    rows = [{"premise": "p", "hypothesis": f"h{i}", "label": i % 2} for i in range(10)]
    task = replace(OWN, text_columns=["premise", "hypothesis"], train_file=jsonl(tmp_path, "nli.jsonl", *rows))
    loaded = load_task(task)
    assert {split: len(found) for split, found in loaded.rows.items()} == {"train": 8, "validation": 1, "test": 1}
    assert loaded.task.labels == ["0", "1"]


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["b", "a", "b", "c"] * 3, ["a", "b", "c"]),
        ([10, 9, 2, 10] * 3, ["2", "9", "10"]),
        (["1", "0"] * 3, ["0", "1"]),
        ([True, False] * 3, ["False", "True"]),
    ],
)
def test_labels_are_found_and_sorted(tmp_path: Path, cells: list[Any], labels: list[str]) -> None:
    rows = [{"text": f"film {i}", "label": cell} for i, cell in enumerate(cells)]
    task = replace(OWN, train_file=jsonl(tmp_path, "all.jsonl", *rows))
    assert read_label_names(task) == labels
    loaded = load_task(task)
    found = {
        text: labels[code] for of in loaded.rows.values() for text, code in zip(of["text"], of["label"], strict=True)
    }
    assert found == {row["text"]: str(row["label"]) for row in rows}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("text,label\na,x\nb,\nc,y\n", r"own\.csv:3: column label is empty; every row needs a label\."),
        ('text,label\n"two\nlines",x\nb,\n', r"own\.csv:4: column label is empty"),
        ("text,label\na,x\nb,x\n", r"own\.csv: all rows have the label x; two or more are needed\."),
        (
            "text,label\n" + "".join(f"{i},{i}\n" for i in range(9)),
            r"own\.csv: column label holds 9 labels in 9 rows; name the column of labels by task\.label_column",
        ),
        ("text,grade\na,x\n", r"own\.csv: task\.label_column=label is unknown\. Choices: text, grade\."),
    ],
)
def test_labels_that_are_none(tmp_path: Path, content: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_task(replace(OWN, train_file=write(tmp_path, "own.csv", content)))


def test_a_file_without_a_header(tmp_path: Path) -> None:
    """Its first row is no list of choices: the sentence shows it, and the key that reads it."""
    lines = [f'"a film, {i}",{("bad", "good")[i % 2]}\n' for i in range(20)]
    task = replace(OWN, train_file=write(tmp_path, "own.csv", "".join(lines)))
    with pytest.raises(UserError) as caught:
        load_task(task)
    assert caught.value.faults == [
        f"{task.train_file}: the first row, 'a film, 0', 'bad', was taken for the names of the columns, and text "
        "(task.text_columns) and label (task.label_column) are not among them; set these keys to names in it or, if "
        "the file has no header, add task.column_names=[text,label]."
    ]
    loaded = load_task(replace(task, column_names=["text", "label"]))
    named = replace(loaded.task, test_file=jsonl(tmp_path, "test.jsonl", *reviews(3)))
    assert len(load_task(replace(named, train_file=None), training=False).rows["test"]) == 3  # as `evaluate` reads it
    with pytest.raises(UserError, match=r"task\.column_names is for \.csv and \.tsv files, and the task has none"):
        load_task(replace(named, train_file=named.test_file))
    assert sum(map(len, loaded.rows.values())) == 20
    assert loaded.task.labels == ["bad", "good"]


@pytest.mark.parametrize(
    ("cell", "join", "sentence"),
    [
        (["a film", "and another"], None, "a list, ['a film', 'and another']; task.source_join joins the texts of a"),
        ([1, 2], " | ", "[1, 2], not text"),
        (7, None, "7, not text"),
    ],
)
def test_a_source_that_is_no_text(tmp_path: Path, cell: object, join: str | None, sentence: str) -> None:
    rows = [{"source": cell, "target": "t"}] * 3
    task = replace(WRITING, source_join=join, train_file=jsonl(tmp_path, "own.jsonl", *rows))
    with pytest.raises(UserError, match=re.escape(f"own.jsonl:1: column source holds {sentence}")):
        load_task(task)


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        (["x"], r"own\.jsonl:1: column label holds \['x'\], not one label\."),
        (math.nan, r"own\.jsonl:1: column label is empty; every row needs a label\."),
    ],
)
def test_cells_that_are_no_label(tmp_path: Path, cell: object, sentence: str) -> None:
    rows = [{"text": "a", "label": cell}, {"text": "b", "label": cell}]
    with pytest.raises(UserError, match=sentence):
        load_task(replace(OWN, train_file=jsonl(tmp_path, "own.jsonl", *rows)))


def test_three_labels_have_no_f1_whether_named_or_found(tmp_path: Path) -> None:
    file = write(tmp_path, "own.csv", "text,label\n" + "".join(f"{i},{'xyz'[i % 3]}\n" for i in range(30)))
    with pytest.raises(UserError, match=r"own\.csv: task\.metric=f1 is the F1 of the second of two labels"):
        load_task(replace(OWN, metric="f1", train_file=file))


def test_a_label_that_training_has_not_seen(tmp_path: Path) -> None:
    task = replace(
        OWN,
        train_file=write(tmp_path, "train.csv", "text,label\n" + "".join(f"{i},{'xy'[i % 2]}\n" for i in range(20))),
        validation_file=write(tmp_path, "dev.csv", 'text,label\n"a,\nb",x\nc,z\n'),
    )
    with pytest.raises(UserError, match=r"dev\.csv:4: label 'z' is not one of x, y"):
        load_task(task)


@pytest.mark.parametrize(
    ("trained", "scored", "label"),
    [
        ([1.0, 2.0], 1, "1"),  # a number is one label, with a decimal point or without: pandas writes either
        ([1, 2], 1.0, "1"),
        ([0.5, 1.5], 1, None),  # not the code of 1.5
        ([0.0, 1.0], 0, "0"),
        ([10.0, 2.0], "2", "2"),
    ],
)
def test_numbers_as_labels_are_names(tmp_path: Path, trained: list[float], scored: float, label: str | None) -> None:
    rows = [{"text": f"{i}", "label": trained[i % 2]} for i in range(20)]
    task = replace(OWN, train_file=jsonl(tmp_path, "train.jsonl", *rows))
    task.test_file = jsonl(tmp_path, "test.jsonl", {"text": "a", "label": scored})
    if label is None:
        with pytest.raises(UserError, match=r"test\.jsonl:1: label 1 is not one of 0\.5, 1\.5\."):
            load_task(task)
    else:
        loaded = load_task(task)
        assert [loaded.task.labels[code] for code in loaded.rows["test"]["label"]] == [label]


CODED = [
    (["neg", "pos"], 0),
    (["neg", "pos"], "1"),
    ([False, True], 1),
    (["no", "yes", "maybe"], 2),
]


@pytest.mark.parametrize(("names", "code"), CODED)
def test_a_code_is_refused_where_the_order_of_codes_is_not_known(
    tmp_path: Path, names: list[Any], code: int | str
) -> None:
    """Sorted names are not the order of somebody's codes; task.labels is."""
    rows = [{"text": f"{i}", "label": names[i % len(names)]} for i in range(30)]
    task = replace(OWN, train_file=jsonl(tmp_path, "train.jsonl", *rows))
    task.test_file = jsonl(tmp_path, "test.jsonl", {"text": "a", "label": code})
    ordered = sorted(map(str, names))
    sentence = (
        f"label {code!r} is not one of {', '.join(ordered)}; if it is a code, name the labels in the order of their "
    )
    with pytest.raises(UserError, match=re.escape(f"{sentence}codes, such as task.labels=[{','.join(ordered)}].")):
        load_task(task)
    named = load_task(replace(task, labels=list(map(str, names))))
    assert named.task.labels[named.rows["test"]["label"][0]] == str(names[int(code)])
    # so it is where the run is scored again, with the labels that it had found
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_task(task, training=False, dealt=[], labels=ordered)
    assert (
        load_task(replace(task, test_file=task.train_file), training=False, dealt=[], labels=ordered).task.labels
        == ordered
    )


def test_labels_of_a_file_that_names_its_codes(tmp_path: Path) -> None:
    """As on the hub; the test file may have other codes for the same names, and one without names has the same ones."""

    def parquet(name: str, names: list[str], codes: list[int]) -> str:
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        rows = {"text": [f"{name} {i}" for i in range(len(codes))], "label": codes}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / name)
        return str(tmp_path / name)

    train = parquet("train.parquet", ["pos", "neg"], [0, 1] * 10)
    task = replace(OWN, train_file=train, test_file=parquet("test.parquet", ["neg", "pos"], [0, 1, 1]))

    def read(task: Task) -> list[str]:
        loaded = load_task(task)
        return [loaded.task.labels[code] for code in loaded.rows["test"]["label"]]

    assert load_task(task).task.labels == ["pos", "neg"]
    assert read(task) == ["neg", "pos", "pos"]
    assert read(replace(task, test_file=jsonl(tmp_path, "own.jsonl", {"text": "a", "label": 0}))) == ["pos"]
    assert read(replace(task, labels=["neg", "pos"])) == ["neg", "pos", "pos"]  # in another order
    assert read(replace(task, labels=["bad", "good"])) == ["bad", "good", "good"]  # other names for the codes
    with pytest.raises(UserError, match=r"label 'neg' is not one of pos, good, 0, 1"):
        read(replace(task, labels=["pos", "good"]))


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        (["Good", "bad", "good"], "'Good' and 'good'"),
        (["good", "bad", " good"], "' good' and 'good'"),
        (["1", "0", "1.0"], "'1' and '1.0'"),
        (["01", "0", "1"], "'01' and '1'"),
    ],
)
def test_labels_that_differ_in_spelling_alone(tmp_path: Path, cells: list[str], told: str) -> None:
    rows = [{"text": f"{i}", "label": cells[i % 3]} for i in range(30)]
    task = replace(OWN, train_file=jsonl(tmp_path, "train.jsonl", *rows))
    with pytest.raises(UserError, match=rf"train\.jsonl: the labels {told} differ only in spelling"):
        load_task(task)
    assert load_task(replace(task, labels=cells)).task.labels == cells


def test_a_file_that_is_trained_on_and_scored_on_is_noted(tmp_path: Path) -> None:
    file = jsonl(tmp_path, "own.jsonl", *reviews(20))
    loaded = load_task(replace(OWN, train_file=file, validation_file=f"{tmp_path}/./own.jsonl", test_file=file))
    assert f"{file} is a file of train and of validation and test: training rows are also scored." in loaded.notes


def test_oddities_that_work(tmp_path: Path) -> None:
    """A byte order mark, quotes, empty texts and a text of 100,000 characters."""
    rows = [f'"a ""quoted"", text {i}",{"xy"[i % 2]}' for i in range(9)] + [f"{'long ' * 20_000},x", ",y"]
    content = "\ufefftext,label\r\n" + "\r\n".join(rows) + "\r\n"
    loaded = load_task(replace(OWN, train_file=write(tmp_path, "own.csv", content)))
    texts = {text for rows in loaded.rows.values() for text in rows["text"]}
    assert len(texts) == 11 and 'a "quoted", text 0' in texts and "" in texts and "long " * 20_000 in texts


def test_targets_may_be_lists(tmp_path: Path) -> None:
    rows = [{"source": f"s{i}", "target": ["one", "another"]} for i in range(10)]
    loaded = load_task(replace(WRITING, train_file=jsonl(tmp_path, "own.jsonl", *rows)))
    assert loaded.rows["test"]["target"][:] == [["one", "another"]]


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ([], r"own\.jsonl:2: column target holds \[\], not text or a list of texts\."),
        (["one", None], r"own\.jsonl:2: column target holds \['one', None\], not text"),
        ("a text", r"own\.jsonl:2: column target holds 'a text', but the rows above hold \['one'\]\."),
    ],
)
def test_targets_that_are_none(tmp_path: Path, target: object, sentence: str) -> None:
    rows = [{"source": "s", "target": ["one"]}, {"source": "t", "target": target}]
    with pytest.raises(UserError, match=sentence):
        load_task(replace(WRITING, train_file=jsonl(tmp_path, "own.jsonl", *rows)))


def test_numbers_to_predict(tmp_path: Path) -> None:
    task = replace(OWN, kind=TaskKind.regression, metric="pearson")
    rows = "".join(f"text {i},{i}.5\n" for i in range(10))
    loaded = load_task(replace(task, train_file=write(tmp_path, "own.csv", f"text,label\n{rows}")))
    assert sorted(x for of in loaded.rows.values() for x in of["label"]) == [i + 0.5 for i in range(10)]
    for cell in ("", "high", "nan", "inf"):
        with pytest.raises(UserError, match=rf"own\.csv:3: label '{cell}' is not a number\."):
            load_task(replace(task, train_file=write(tmp_path, "own.csv", f"text,label\na,1\nb,{cell}\nc,2\n")))


def parallel(folder: Path, stem: str, count: int, start: int = 0) -> list[str]:
    """Two files of lines."""
    return [
        write(folder, f"{stem}.{name}", "".join(f"{name} {i}\n" for i in range(start, start + count)))
        for name in ("en", "de")
    ]


def test_files_of_lines_are_columns(tmp_path: Path) -> None:
    """Also in a list with others, whose rows follow; and a wrong file is told with its place."""
    task = replace(WRITING, source_column="en", target_column="de")
    task.train_file = [*parallel(tmp_path, "a", 20), *reversed(parallel(tmp_path, "b", 10, 20))]
    task.validation_file = task.test_file = parallel(tmp_path, "dev", 3)
    rows = load_task(task).rows["train"]
    assert rows["en"][:] == [f"en {i}" for i in range(30)]
    assert rows["de"][:] == [f"de {i}" for i in range(30)]
    write(tmp_path, "dev.de", "one\r\n\r\nthree")
    loaded = load_task(task)
    assert loaded.rows["test"]["de"][:] == ["one", "", "three"]
    assert [note for note in loaded.notes if "also trained on" not in note] == [
        "Column de has rows with an empty text, which are kept: 1 of 3 in validation, 1 of 3 in test."
    ]
    write(tmp_path, "dev.de", "one\ntwo")
    with pytest.raises(UserError, match=r"the same number of lines: .*dev\.en has 3, .*dev\.de has 2\."):
        load_task(task)
    task.test_file = task.test_file[:1]
    with pytest.raises(
        UserError, match=r"dev\.en has the lines of one column; name the others too: \[.*dev\.en,dev\.de\]"
    ):
        load_task(replace(task, validation_file=None))
    with pytest.raises(
        UserError, match=r"a file of lines ends in the name of its column, which is here source or target"
    ):
        load_task(replace(task, source_column="source", target_column="target"))


def test_files_in_a_list_follow_each_other(tmp_path: Path) -> None:
    first = jsonl(tmp_path, "a.jsonl", *({**row, "more": 1} for row in reviews(20)))
    second = write(tmp_path, "b.csv", "label,text\nbad,x\ngood,\n")
    task = replace(OWN, train_file=[first, second], test_file=jsonl(tmp_path, "t.jsonl", *reviews(2)))
    task.validation_file = task.test_file
    loaded = load_task(task)
    rows = loaded.rows["train"]
    assert rows["text"][:] == [*(row["text"] for row in reviews(20)), "x", ""]
    assert [loaded.task.labels[code] for code in rows["label"]][-2:] == ["bad", "good"]
    assert "Column text has rows with an empty text, which are kept: 1 of 22 in train." in loaded.notes
    write(tmp_path, "b.csv", "label,text\nbad,x\n,y\n")
    with pytest.raises(UserError, match=r"b\.csv:3: column label is empty"):
        load_task(task)
    jsonl(tmp_path, "a.jsonl", *({"text": f"{i}", "label": i % 2} for i in range(20)))
    with pytest.raises(UserError, match=r"b\.csv: column label holds string, but that of .*a\.jsonl holds int64"):
        load_task(task)
    jsonl(tmp_path, "a.jsonl", *reviews(20))
    write(tmp_path, "b.csv", "label,words\nbad,x\n")
    with pytest.raises(UserError, match=r"b\.csv has no column text, which .*a\.jsonl has\."):
        load_task(task)
    task.train_file = [second, first]
    with pytest.raises(UserError, match=r"b\.csv has no column text, which .*a\.jsonl has\."):
        load_task(task)
    task.train_file = [write(tmp_path, "c.csv", "review,stars\nx,1\n"), write(tmp_path, "d.csv", "body,note\ny,2\n")]
    with pytest.raises(UserError, match=r"d\.csv and .*c\.csv have no column in common; files of a split need"):
        load_task(task)


def test_a_training_file_of_several_that_is_also_scored(tmp_path: Path) -> None:
    first, second = jsonl(tmp_path, "a.jsonl", *reviews(20)), jsonl(tmp_path, "b.jsonl", *reviews(30))
    loaded = load_task(replace(OWN, train_file=[first, second], test_file=second))
    assert loaded.notes[0] == f"{second} is a file of train and of test: training rows are also scored."


def test_the_sets_of_commonsense_are_those_with_a_file(tmp_path: Path) -> None:
    """The files are those of LLM-Adapters: arrays of objects, one for each set; the main score is BoolQ's."""
    names = ("train", "validation", "boolq", "piqa")
    rows = [{"instruction": f"{i}: true or false?", "output": f"the correct answer is {i % 2 == 0}"} for i in range(6)]
    for name in names:
        write(tmp_path, f"{name}.json", json.dumps(rows).replace("True", "true").replace("False", "false"))
    run = compose_run(["task=commonsense", f"task.data_dir={tmp_path}", "method=lora"])
    loaded = load_task(run.task)
    assert loaded.roles.keys() == {"train", "selection", "report", "report_piqa"}
    assert loaded.roles["report"][0] == "boolq" and "obqa" not in loaded.rows
    assert "siqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa is not scored" in " ".join(loaded.notes)
    texts = loaded.rows["boolq"]["output"][:]
    assert measure(run.task.metric, [text.split()[-1] for text in texts], texts).scores == {"choice": 100.0}
