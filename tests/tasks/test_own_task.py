"""A task of the user's own, with a form, a metric and a callback: the example of the docs in a sweep, and refusals."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftbench.backbones.load import load_backbone
from peftbench.cli.main import main
from peftbench.config.compose import compose_run
from peftbench.config.identity import hash_run
from peftbench.records.record import load_records
from peftbench.tasks.base import TaskData
from peftbench.tasks.completion import Completion
from peftbench.tasks.load import load_task
from peftbench.tasks.prepare import derive_own_task, prepare_data
from peftbench.tasks.text_to_text import TextToText
from tests.own_parts import EXAMPLE, importable

TASKS = """
from transformers import TrainerCallback
from peftbench.tasks.base import TaskData
from peftbench.tasks.classification import Classification
from peftbench.tasks.text_to_text import TextToText

class Shout(TextToText):
    def decode(self, predictions):
        return [text.upper() for text in super().decode(predictions)]

class Abstract(TaskData):
    pass

class Broken(Classification):
    @staticmethod
    def read_rows(task, split):
        return [1, 2]

class Fails(Classification):
    @staticmethod
    def read_rows(task, split):
        raise KeyError(task.settings)

class OwnColumns(Classification):
    @staticmethod
    def read_rows(task, split):
        return [{"words": "a b", "label": "x"}]

class Quiet(TrainerCallback):
    pass
"""


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The example's folder and one with tasks can be imported from, in each test only."""
    (tmp_path / "tasks_of_mine.py").write_text(TASKS, encoding="utf-8")
    with importable(monkeypatch, EXAMPLE, tmp_path):
        yield


def test_the_rows_are_those_that_the_task_makes() -> None:
    run = compose_run(["task=colours", "task.settings.words=5"], config_dir=str(EXAMPLE))
    loaded = load_task(run.task)
    for split, rows in loaded.rows.items():
        for text, code in zip(rows["text"], rows["label"], strict=True):
            (first, most), *others = Counter(text.split()).most_common()
            assert run.task.labels[code] == first and all(count < most for _, count in others) and split
            assert len(text.split()) == 5
    assert loaded.rows["train"]["text"] != loaded.rows["test"]["text"]
    backbone = load_backbone(run.model, loaded.task)
    data = prepare_data(loaded, backbone.tokenizer, backbone.model)
    assert type(data).__name__ == "Colours" and len(data.train) == len(loaded.rows["train"])


def test_a_task_that_writes_text_keeps_its_methods_with_a_decoder() -> None:
    task = compose_run(["task=docsum", "task._target_=tasks_of_mine.Shout"]).task
    assert derive_own_task(task, TextToText, TextToText).__mro__[1] is TextToText
    derived = derive_own_task(task, TextToText, Completion)
    assert [one.__name__ for one in derived.__mro__[:4]] == ["Shout", "Shout", "Completion", "TextToText"]
    assert issubclass(derived, TaskData) and derived.encode is Completion.encode


def test_a_run_is_named_by_its_task_and_callbacks() -> None:
    plain = hash_run(compose_run(["task=doctopic"]))
    named = [
        hash_run(compose_run(["task=doctopic", *words]))
        for words in (
            ["callbacks=[tasks_of_mine.Quiet]"],
            ["callbacks=[{_target_: my_parts.StopAtLoss, loss: 1}]"],
            ["callbacks=[{_target_: my_parts.StopAtLoss, loss: 2}]"],
            ["task._target_=my_parts.Colours"],
            ["task._target_=my_parts.Colours", "task.settings.words=3"],
        )
    ]
    assert len({plain, *named}) == len(named) + 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(
            ["task._target_=my_parts.Swish2"],
            "task._target_=my_parts.Swish2 is not a class derived from peftbench.",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["task._target_=tasks_of_mine.Shout"],
            "task._target_=tasks_of_mine.Shout is not a class derived from",
            marks=pytest.mark.slow,
        ),
        (["task._target_=colours"], "task._target_=colours is not the dotted name of a class"),
        (["task.settings.words=2"], "are for a task of your own, task._target_=mypkg.Task; leave them out."),
        (["task._target_=tasks_of_mine.Broken"], "read_rows(task, 'train') fails or returns no rows: TypeError"),
        pytest.param(
            ["task._target_=tasks_of_mine.Fails"],
            "read_rows(task, 'train') fails or returns no rows: KeyError",
            marks=pytest.mark.slow,
        ),
        (
            ["task._target_=tasks_of_mine.OwnColumns"],
            "tasks_of_mine.OwnColumns: task.text_columns=text is unknown. Choices: words, label.",
        ),
        (["callbacks=[my_parts.StopAtLoss]"], "callbacks=my_parts.StopAtLoss cannot be built with its settings {}"),
        (["callbacks=[my_parts.Swish2]"], "callbacks=my_parts.Swish2 is not a class derived from transformers."),
        (["callbacks=[stop]"], "callbacks=stop is not the dotted name of a class, such as mypkg.Part."),
        pytest.param(
            ["callbacks=[{loss: 1}]"], "callbacks={'loss': 1} is not the dotted name of a class", marks=pytest.mark.slow
        ),
    ],
)
def test_what_is_no_task_or_callback_is_refused_in_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["task=text_classification", "task.labels=[x,y]", "debug=smoke", f"output_dir={tmp_path / 'runs'}"]
    assert main(["train", *base, "task.train_file=null", *words, "task.hub_id=nobody/nothing"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("peftbench: ")]
    assert len(told) == 1 and sentence in told[0]
    assert not list((tmp_path / "runs").rglob("record.json"))


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_the_example_of_the_docs_in_a_sweep(jobs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["task=colours", "method=lora", "functional_form=relu,swish2", "task.metric=my_parts.WithinOne"]
    words += ["callbacks=[{_target_: my_parts.StopAtLoss, loss: 100}]", "debug=smoke", f"jobs={jobs}"]
    line = ["train", "-m", "--config-dir", str(EXAMPLE), *words, f"output_dir={tmp_path / 'runs'}"]
    assert main(line) == 0
    records, _ = load_records(tmp_path / "runs")
    assert {record.axes[0].functional_form for record in records} == {"relu", "my_parts.Swish2"}
    for record in records:
        rows = [json.loads(line) for line in (record.folder / "predictions.jsonl").read_text().splitlines()]
        near = [abs(len(row["prediction"]) - len(row["reference"])) <= 1 for row in rows]
        assert record.metric == "my_parts.WithinOne" and record.score == pytest.approx(100 * sum(near) / len(near))
        assert record.steps == 1 and "ended at step 1 of 4, by a callback." in record.data["notes"][-1]
    capsys.readouterr()
    assert main(["results", str(tmp_path / "runs"), "--csv"]) == 0
    assert "my_parts.Swish2" in capsys.readouterr().out
    assert main(line) == 0  # finished runs are found again
    assert "2 of 2 runs are done" in capsys.readouterr().out
    if jobs == 1:
        (own,) = (record.folder for record in records if record.axes[0].functional_form != "relu")
        assert main(["evaluate", str(own)]) == 0 and "as in the record" in capsys.readouterr().out
        assert main(["rescore", str(own)]) == 0 and "WithinOne" in capsys.readouterr().out
        assert main(["compare", *(str(record.folder) for record in records)]) == 2
        assert "cannot be compared example by example" in capsys.readouterr().err
        (tmp_path / "three.txt").write_text("red red blue\n")
        assert main(["predict", str(own), str(tmp_path / "three.txt")]) == 0
        assert capsys.readouterr().out.partition("\t")[0] in ("red", "blue", "green", "yellow")
