"""Tokenised rows are made once for all runs that need the same, and again when anything they follow from changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from datasets.table import MemoryMappedTable

import peftbench.tasks.prepare
from peftbench.config.schema import Task, TaskKind
from peftbench.tasks import cache
from peftbench.tasks.base import TaskData
from peftbench.tasks.cache import Recent
from peftbench.tasks.classification import Classification
from peftbench.tasks.load import load_task
from peftbench.tasks.prepare import prepare_data
from peftbench.utils.files import write_lines
from tests.tasks.test_tasks import byte_level, tiny_bert


class Forgetful(Recent[TaskData]):
    """As each run is in a process of its own."""

    def get(self, key: Hashable, make: Callable[[], TaskData]) -> TaskData:
        return make()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The sizes of the batches that have really been tokenised."""
    found: list[int] = []
    encode = Classification.encode

    def counted(self: Classification, rows: dict[str, list[Any]], training: bool) -> dict[str, list[Any]]:
        found.append(len(rows["text"]))
        return encode(self, rows, training)

    monkeypatch.setattr(Classification, "encode", counted)
    monkeypatch.setattr(cache, "MIN_ROWS", 4)
    monkeypatch.setattr(peftbench.tasks.prepare, "_recent", Forgetful())
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path / "cache"))
    return found


@pytest.fixture
def task(tmp_path: Path) -> Task:
    for name, count in (("train", 6), ("dev", 5)):
        rows = [{"text": f"film {i}", "label": ("bad", "good")[i % 2]} for i in range(count)]
        write_lines(tmp_path / f"{name}.jsonl", rows)
    return Task(
        name="own",
        kind=TaskKind.classification,
        data_dir=str(tmp_path),
        report_split="validation",
        text_columns=["text"],
        labels=["bad", "good"],
        metric="accuracy",
    )


def prepared(task: Task) -> TaskData:
    return prepare_data(load_task(task), byte_level(), tiny_bert())


def rows(data: TaskData) -> list[list[dict[str, Any]]]:
    return [of.to_list() for of in (data.train, data.selection, data.report)]


def test_a_second_run_tokenises_nothing(task: Task, made: list[int]) -> None:
    first = prepared(task)
    assert made == [6, 5]
    assert rows(prepared(replace(task, name="another", metric="macro_f1"))) == rows(first)
    assert made == [6, 5]


def test_what_is_kept_is_mapped_not_held(task: Task, made: list[int]) -> None:
    """In the run that makes it and in the next, so that the workers of a sweep share one copy."""
    for _ in range(2):
        data = prepared(task)
        assert [Path(file["filename"]).suffix for file in data.train.cache_files] == [".arrow"]
        assert isinstance(data.train.data, MemoryMappedTable)


CHANGES: dict[str, Callable[[Task], Task]] = {
    "length": lambda task: replace(task, max_source_length=3),
    "training rows": lambda task: replace(task, max_train=4),
    "labels": lambda task: replace(task, labels=["good", "bad"]),
    "columns": lambda task: replace(task, text_columns=["text", "text"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_setting_is_another_entry(task: Task, made: list[int], change: str) -> None:
    prepared(task)
    made.clear()
    changed = prepared(CHANGES[change](task))
    assert made and made[0] == len(changed.train)
    made.clear()
    assert rows(prepared(task))[0][0]["input_ids"] and made == []


def test_other_text_and_another_tokenizer_are_other_entries(task: Task, made: list[int], tmp_path: Path) -> None:
    prepared(task)
    made.clear()
    tokenizer = byte_level()
    tokenizer.add_tokens(["film"])
    prepare_data(load_task(task), tokenizer, tiny_bert())
    assert made == [6, 5]
    file = tmp_path / "train.jsonl"
    file.write_text(file.read_text().replace("film 0", "play 0"))
    made.clear()
    prepared(task)
    assert made == [6]


def test_a_torn_entry_is_made_again(task: Task, made: list[int], tmp_path: Path) -> None:
    first = rows(prepared(task))
    for file in (tmp_path / "cache" / "tokens").rglob("*.arrow"):
        file.write_bytes(b"torn")
    made.clear()
    assert rows(prepared(task)) == first and made == [6, 5]
    made.clear()
    assert rows(prepared(task)) == first and made == []


def test_a_cache_that_cannot_be_written_is_done_without(
    task: Task, made: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path / "file"))
    assert len(prepared(task).train) == 6
    assert made == [6, 5]


def test_nothing_half_written_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cache, "MIN_ROWS", 1)
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path))

    def disk_full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Dataset, "save_to_disk", disk_full)
    assert len(cache.cache_dataset({}, 2, lambda: Dataset.from_dict({"x": [1, 2]}))) == 2
    assert list((tmp_path / "tokens").iterdir()) == []


def test_what_was_asked_for_last_is_in_memory() -> None:
    recent, made = Recent[str](), []

    def make(name: str) -> str:
        made.append(name)
        return name

    for name in ("a", "b", "a", "c", "a", "b"):
        assert recent.get(name, partial(make, name)) == name
    assert made == ["a", "b", "c", "b"]


@pytest.mark.parametrize("harm", ["bit", "short", "gone", "null"])
def test_a_damaged_cache_of_tokens_is_made_again(
    harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Arrow reads any bytes, and ends the process by a wild offset."""
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "MIN_ROWS", 1)
    made: list[int] = []

    def make() -> Dataset:
        made.append(1)
        return Dataset.from_dict({"x": [[1, 2], [3]] * 50})

    for _ in range(2):
        assert cache.cache_dataset({}, 100, make)["x"][:2] == [[1, 2], [3]]
    assert len(made) == 1
    for file in tmp_path.rglob("*.*"):
        if file.is_file() and (harm != "null" or file.suffix == ".json"):
            content = file.read_bytes()
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :]
            file.write_bytes({"bit": flipped, "short": content[:-9], "gone": b"", "null": b"null"}[harm])
            assert cache.cache_dataset({}, 100, make)["x"][:2] == [[1, 2], [3]]
            made.pop()
            assert made, file
            assert "is damaged: it is a cache, and is made again" in capsys.readouterr().err
            break
