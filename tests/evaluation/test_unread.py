"""A key that is typed for a finished run and that the command does not read is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from peftbench import load_harness_model, load_run
from peftbench.cli.main import main
from peftbench.config import unread
from peftbench.config.compose import compose_run
from peftbench.config.schema import Model, Task, Trainer
from peftbench.config.unread import find_unread_keys
from peftbench.evaluation.finished import read_changed_run
from peftbench.records.saved import read_saved_record
from peftbench.utils.errors import UserError
from peftbench.utils.files import write_lines
from tests.finished import make_run

OF_TRAINER = "which reads trainer.device, trainer.precision, trainer.eval_batch_size, trainer.eval_batch_tokens alone"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished classifier; its data is not there."""
    return make_run(tmp_path / "run", "method=lora", "model=mini", "task=text_classification", labels=("a", "b"))


@pytest.mark.parametrize(
    ("command", "word", "said"),
    [
        ("evaluate", "trainer.learning_rate=3", f"for evaluate, {OF_TRAINER}"),
        ("evaluate", "trainer.devices=2", f"for evaluate, {OF_TRAINER}"),
        ("evaluate", "task.max_train=3", "for evaluate, which does not read it"),
        ("evaluate", "task.baselines=[majority]", "for evaluate, which does not read it"),
        ("evaluate", "task.name=films", "for evaluate, which does not read it"),
        ("evaluate", "model.name=other", "for evaluate, which does not read it"),
        ("evaluate", "task.generation.num_beams=1", "it is for tasks that write text"),
        ("predict", "trainer.epochs=7", f"for predict, {OF_TRAINER}"),
        ("predict", "task.split=validation", "for predict, which reads FILE, and no data of the run"),
        ("predict", "task.max_eval=1", "for predict, which reads FILE, and no data of the run"),
        ("predict", "task.data_dir=nowhere", "for predict, which reads FILE, and no data of the run"),
        ("predict", "task.prompt='read {source}'", "it is for tasks that write text"),
        ("export", "trainer.device=cpu", "for export, which reads no key of trainer"),
        ("export", "task.split=validation", "for export, which does not read it"),
        ("export", "model.dtype=bfloat16", "for export, which does not read it"),
        ("import", "trainer.learning_rate=3", f"for import, {OF_TRAINER}"),
        ("import", "task.max_train=3", "for import, which does not read it"),
    ],
)
def test_what_a_command_does_not_read_is_refused(
    run: Path, command: str, word: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("A text.\n")
    adapter = tmp_path / "adapter"
    others = {
        "predict": [str(tmp_path / "texts.txt")],
        "export": ["--out", str(tmp_path / "out")],
        "import": ["--task", "doctopic", "--out", str(tmp_path / "out")],
    }
    if command == "import":
        assert main(["export", str(run), "--no-check", "--out", str(adapter)]) == 0
        capsys.readouterr()
    assert main([command, str(adapter if command == "import" else run), *others.get(command, []), word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"peftbench: {word} changes nothing ") and said in line and line.endswith("; leave it out.")
    assert not (tmp_path / "out").exists()


def test_a_file_of_a_split_that_is_not_scored_is_refused(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(8)]
    for name in ("train", "validation", "test", "other"):
        write_lines(tmp_path / f"{name}.jsonl", rows)
    given = [f"task.{name}_file={tmp_path / name}.jsonl" for name in ("train", "validation", "test")]
    words = ("method=lora", "model=mini", "task=text_classification")
    run = make_run(tmp_path / "run", *words, *given, labels=("a", "b"))
    other, record = f"{tmp_path}/other.jsonl", read_saved_record(run)
    assert read_changed_run(run, record, [f"task.test_file={other}"]).task.test_file == other
    read_changed_run(run, record, ["task.split=validation", f"task.validation_file={other}"])
    for words, scored in (
        ([f"task.validation_file={other}"], "test"),
        ([f"task.train_file={other}"], "test"),
        ([f"task.test_file={other}", "task.split=validation"], "validation"),
    ):
        with pytest.raises(UserError) as refused:
            read_changed_run(run, record, words)
        (sentence,) = refused.value.faults
        assert sentence == f"{words[0]} changes nothing where {scored} is scored, and no other split; leave it out."


def test_a_split_without_a_name_is_refused_as_it_is_typed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "task.split="]) == 2
    assert capsys.readouterr().err == "peftbench: task.split= has no value; give one, or leave it out.\n"


def test_from_python_too(run: Path) -> None:
    with pytest.raises(UserError, match="device=cpu changes nothing for load_run, which reads no key of trainer;"):
        load_run(run, "trainer.device=cpu")
    with pytest.raises(UserError, match="max_eval=3 changes nothing for load_run, which does not read it;"):
        load_run(run, "task.max_eval=3")
    pytest.importorskip("lm_eval")
    with pytest.raises(
        UserError, match=r"epochs=3 changes nothing for load_harness_model, which reads trainer\.device"
    ):
        load_harness_model(run, "trainer.epochs=3")


def test_a_private_repository_needs_a_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--private", "--out", str(tmp_path / "out")]) == 2
    assert "--private needs --push OWNER/NAME" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["export", "merge", "import"])
def test_a_folder_with_files_is_not_written_to(
    run: Path, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    assert main([command, str(run), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"peftbench: --out {out} exists already; give a folder that is new or empty.\n"


def test_a_task_of_ones_own_may_read_any_of_its_keys() -> None:
    run = compose_run(["method=lora", "model=mini", "task=doctopic"])
    word = ("task.max_train=3", "task.max_train")
    assert list(find_unread_keys([word], run, "evaluate"))
    run.task._target_ = "mypkg.Task"
    assert not list(find_unread_keys([word], run, "evaluate"))


def test_the_keys_that_are_named_exist() -> None:
    task, model, trainer = ({field.name for field in fields(schema)} for schema in (Task, Model, Trainer))
    assert set().union(*unread.UNREAD_OF_TASK.values(), unread.OF_THE_BACKBONE, unread.OF_THE_CARD) <= task
    assert set().union(*unread.UNREAD_OF_MODEL.values()) <= model
    assert set().union(*unread.TRAINER.values()) <= trainer
