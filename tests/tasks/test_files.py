"""Reading local files and finding splits: what comes out, and the sentence for each kind of bad file."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from peftbench.tasks.file_set import find_split, has_split
from peftbench.tasks.files import Layout, locate_row, read_file
from peftbench.utils.errors import UserError

ROWS = [{"text": "a film", "label": "good"}, {"text": "", "label": "bad"}]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def written(folder: Path, ending: str) -> Path:
    """A file with `ROWS`."""
    file = folder / f"rows{ending}"
    rows = Dataset.from_list(ROWS)
    if ending == ".parquet":
        rows.to_parquet(file)
    elif ending in (".json", ".jsonl"):
        rows.to_json(file, lines=ending == ".jsonl")
    else:
        rows.to_csv(file, sep="\t" if ending == ".tsv" else ",", index=False)
    return file


@pytest.mark.parametrize("ending", [".tsv", ".csv", ".jsonl", ".json"])
def test_files_packed_by_gzip_give_the_same_rows(tmp_path: Path, ending: str) -> None:
    plain = written(tmp_path, ending)
    packed = write(tmp_path, f"{plain.name}.gz", gzip.compress(plain.read_bytes()))
    assert read_file(packed).to_list() == ROWS
    assert locate_row(packed, 2).replace(".gz", "") == locate_row(plain, 2)


@pytest.mark.parametrize("ending", [".tsv", ".csv", ".jsonl", ".json", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    assert read_file(written(tmp_path, ending)).to_list() == ROWS


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("bom.tsv", b"\xef\xbb\xbftext\nyes\n", [{"text": "yes"}]),
        ("bom.jsonl", b'\xef\xbb\xbf{"text": "yes"}', [{"text": "yes"}]),
        ("crlf.tsv", 'text\tlabel\r\n"so-called\t1\r\n', [{"text": '"so-called', "label": "1"}]),
        ("quoted.csv", 'text,label\n"two,\nlines",1\n', [{"text": "two,\nlines", "label": "1"}]),
        ("long.csv", f"text\n{'x' * 200_000}\n", [{"text": "x" * 200_000}]),
        ("lines.json", '{"text": "a"}\n\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}]),
        ("separator.jsonl", '{"text": "a\u2028b"}\n', [{"text": "a\u2028b"}]),
        ("gap.jsonl", '{"text": "a"}\n{"label": 1}\n', [{"text": "a", "label": None}, {"text": None, "label": 1}]),
    ],
)
def test_oddities_that_are_no_mistakes(tmp_path: Path, name: str, content: str | bytes, rows: list[Any]) -> None:
    assert read_file(write(tmp_path, name, content)).to_list() == rows


def test_a_column_that_nobody_needs_may_hold_anything(tmp_path: Path) -> None:
    """But where a column that is needed is not there, all are: it may stand inside any of them."""
    file = write(tmp_path, "mixed.jsonl", '{"text": "a", "rating": 1}\n{"text": "b", "rating": "none"}')
    assert read_file(file, ["text"]).to_list() == [{"text": "a"}, {"text": "b"}]
    for used in (["text", "rating"], ["text", "label"], []):
        with pytest.raises(UserError, match=r"mixed\.jsonl:2: column rating holds 'none', but the rows above hold 1"):
            read_file(file, used)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("torn.jsonl", '{"text": "a"}\n{"text": "b', r"torn\.jsonl:2 is incomplete or not JSON: Unterminated string"),
        ("torn.json", '[{"text": "a"},\n{"text": ]', r"torn\.json:2 is incomplete or not JSON"),
        ("list.jsonl", '{"text": "a"}\n["b"]', r"list\.jsonl:2 is \['b'\], not an object"),
        ("list.json", '[{"text": "a"}, "b"]', r"list\.json, row 2 is 'b', not an object"),
        ("mixed.jsonl", '{"label": 1}\n{"label": "one"}', r"mixed\.jsonl:2: column label holds 'one', but .* 1\."),
        (
            "short.tsv",
            "text\tlabel\na\t1\nb\n",
            r"short\.tsv:3 should have one cell for each .* \(text, label\); it has 1",
        ),
        (
            "nested.jsonl",
            '{"meta": {"lang": "en"}}\n\n{"meta": {"lang": 5}}',
            r"nested\.jsonl:3: column meta holds {'lang': 5}, but the rows above hold {'lang': 'en'}\.",
        ),
        (
            "half.jsonl",
            '{"text": "a"}\n{"text": "b\\ud800"}',
            r"half\.jsonl:2: column text holds .*: .* surrogates not",
        ),
        ("large.jsonl", f'{{"n": 1}}\n{{"n": {10**30}}}', r"large\.jsonl:2: column n holds 10{30}: .* too large"),
        ("wide.csv", "text,label\na,b,1\n", r"wide\.csv:2 should .*; it has 3"),
        ("twice.csv", "text,text\na,b\n", r"twice\.csv:1 names a column twice"),
        ("open.csv", 'text\n"never closed\n', r"open\.csv:2 is malformed: unexpected end of data"),
        ("latin.tsv", b"text\nyes\ncaf\xe9\n", r"latin\.tsv:3 is not UTF-8 text"),
        ("torn.parquet", b"PAR1 and no more", r"torn\.parquet is incomplete or not Parquet"),
        (
            "torn.csv.gz",
            gzip.compress(b"text\nyes\n" * 99, mtime=0)[:30],
            r"torn\.csv\.gz is incomplete or not packed by gzip",
        ),
        ("plain.csv.gz", b"text\nyes\n", r"plain\.csv\.gz is incomplete or not packed by gzip"),
        ("packed.parquet.gz", b"", r"packed\.parquet\.gz cannot be read"),
        ("rows.xlsx", b"", r"rows\.xlsx cannot be read: its extension must be one of \.tsv, \.csv"),
        ("header.tsv", "text\tlabel\n", r"header\.tsv has no rows"),
        *((f"empty.{kind}", b"", rf"empty\.{kind} has no rows") for kind in ("tsv", "csv", "jsonl", "json")),
    ],
)
def test_a_bad_file_ends_in_a_sentence(tmp_path: Path, name: str, content: str | bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_file(write(tmp_path, name, content))


@pytest.mark.parametrize(
    ("name", "content", "layout"),
    [
        ("semicolons.csv", 'text;label\n"a; film, really";good\n', Layout(delimiter=";")),
        ("tabs.csv", '"text"\tlabel\na; film, really\tgood\n', Layout(delimiter="\t")),
        ("bars.tsv", "text|label\na; film, really|good\n", Layout(delimiter="|")),
        ("headless.csv", '"a; film, really",good\n', Layout(("text", "label"))),
        ("headless.tsv", "\na; film, really\tgood\n", Layout(("text", "label"))),
    ],
)
def test_other_delimiters_and_files_without_a_header(tmp_path: Path, name: str, content: str, layout: Layout) -> None:
    file = write(tmp_path, name, content)
    assert read_file(file, ["text", "label"], layout=layout).to_list() == [{"text": "a; film, really", "label": "good"}]
    place = content.split("\n").index(next(line for line in content.split("\n") if "film" in line)) + 1
    assert locate_row(file, 1, layout) == f"{file}:{place}"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", "text;label\nfine, really;good\n", "has semicolons where commas are expected: 'text;label'"),
        ("a.csv", "text\tlabel\na\tgood\n", r"has tabs where commas .*; 'task.delimiter=\"\\t\"' reads such files"),
        ("a.tsv", "text,label\na,good\n", "has commas where tabs are expected"),
        ("a.tsv", "text|label\na|good\n", "has vertical bars where tabs are expected"),
    ],
)
def test_a_file_with_another_delimiter_says_so(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    file = write(tmp_path, name, content)
    with pytest.raises(UserError, match=f":1 {sentence}"):
        read_file(file, ["text", "label"])
    assert read_file(write(tmp_path, "odd.csv", "a;b\n1\n"), ["a;b"]).to_list() == [{"a;b": "1"}]  # it is a name


def test_names_for_a_file_with_a_header(tmp_path: Path) -> None:
    layout = Layout(("text", "label"))
    with pytest.raises(UserError, match=r"a\.csv:1 is a header with the names in task\.column_names"):
        read_file(write(tmp_path, "a.csv", "text,label\na,good\n"), layout=layout)
    with pytest.raises(UserError, match=r"b\.csv:2 should have one cell for each name in task\.column_names"):
        read_file(write(tmp_path, "b.csv", "a,good\nb\n"), layout=layout)


def test_a_parquet_file_that_names_a_column_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice\.parquet names a column twice: text, text\.$"):
        read_file(tmp_path / "twice.parquet")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.tsv is not a file"):
        read_file(tmp_path / "nothing.tsv")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("dev.tsv", "validation"),
        ("val.csv", "validation"),
        ("dev_matched.tsv", "validation_matched"),
        ("test.parquet", "test"),
        ("fold3.json", "fold3"),
    ],
)
def test_a_split_goes_by_its_aliases(tmp_path: Path, name: str, split: str) -> None:
    file = write(tmp_path, name, "")
    assert find_split(str(tmp_path), split) == [str(file)]


def test_a_split_without_a_file_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "dev.txt", "")
    with pytest.raises(UserError) as caught:
        find_split(str(tmp_path), "validation")
    assert str(caught.value) == (
        f"task.data_dir={tmp_path} has no file for the validation split: looked for validation or dev or valid or "
        "val with the extension .tsv, .csv, .jsonl, .json, .parquet, and found dev.txt; "
        "+task.data_files.validation=FILE names the file."
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_split_of_parallel_lines(tmp_path: Path, packed: bool) -> None:
    """As corpora of translations come: train.en and train.ro."""
    files = [write(tmp_path, f"dev.{name}{'.gz' * packed}", "") for name in ("en", "ro")]
    assert find_split(str(tmp_path), "validation", ["en", "ro"]) == list(map(str, files))
    assert not has_split(str(tmp_path), "validation", ["en", "de"])
    write(tmp_path, "dev.jsonl", "")
    with pytest.raises(UserError, match=r"has 2 files for the validation split \(dev\.jsonl, dev\.en"):
        find_split(str(tmp_path), "validation", ["en", "ro"])


def test_a_split_with_two_files(tmp_path: Path) -> None:
    write(tmp_path, "dev.tsv", "")
    write(tmp_path, "validation.jsonl", "")
    with pytest.raises(UserError, match=r"has 2 files for the validation split \(validation\.jsonl, dev\.tsv\)"):
        find_split(str(tmp_path), "validation")


def test_a_folder_that_is_none() -> None:
    with pytest.raises(UserError, match=r"task\.data_dir=/nowhere is not a folder; give one with a file for each"):
        find_split("/nowhere", "train")
