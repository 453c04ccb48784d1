"""Rows that are trained on and scored are told by their content, not by the names of their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftbench.config.compose import compose_run
from peftbench.tasks.load import load_task
from peftbench.utils.errors import UserError


def load(folder: Path, train: list[str], test: list[str]) -> list[str]:
    for name, texts in (("train", train), ("validation", ["x"] * 3), ("test", test)):
        rows = [{"text": text, "label": str(number % 2)} for number, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_task(compose_run(["task=text_classification", f"task.data_dir={folder}"]).task).notes


def test_the_share_of_test_inputs_that_are_trained_on_is_noted(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(40)]
    notes = load(tmp_path, texts, [f"new {number}" for number in range(30)] + texts[:10])
    assert "10 of the 40 inputs of test (25%) are also trained on." in notes
    assert not any("also trained on" in note for note in load(tmp_path, texts, ["new"] * 4))


def test_a_copy_of_the_training_file_is_noted(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(40)]
    assert "40 of the 40 inputs of test (100%) are also trained on." in load(tmp_path, texts, texts)


def test_texts_that_are_all_empty_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="All texts of the train split are empty"):
        load(tmp_path, [" \t"] * 8, ["a", "b"])
