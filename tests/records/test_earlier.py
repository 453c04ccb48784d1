"""Runs that were recorded when names saw only the ends of large files: the same, or trained anew, in a line."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest

from peftbench.config.compose import compose_run
from peftbench.config.identity import hash_run
from peftbench.config.schema import Model, Run, Task, TaskKind, Trainer
from peftbench.config.stamps import LARGE, stamp_content, stamp_ends
from peftbench.records import earlier
from peftbench.records.earlier import check_backbone
from peftbench.records.location import locate_run
from peftbench.records.record import Record, find_record
from peftbench.records.recording import start_record
from peftbench.utils.errors import UserError
from tests.config.test_stamps import changed, large

MIDDLE = 3 * LARGE // 2


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(earlier, "_told", set())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """With a large file of training and a large backbone."""
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    large(backbone / "model.safetensors")
    return Run(
        method="lora",
        model=Model(name="backbone", path=str(backbone), sizes="mini"),
        task=Task(
            name="own",
            kind=TaskKind.classification,
            sizes="mini",
            metric="accuracy",
            train_file=str(large(tmp_path / "train.csv")),
        ),
        trainer=Trainer(learning_rate=1e-3),
        output_dir=str(tmp_path / "outputs"),
    )


def recorded_then(run: Run, seed: int = 42) -> Record:
    """The record of a run that is done, as peftbench wrote it when names saw the ends alone."""
    run = replace(run, seed=seed)
    method = Path(run.output_dir) / run.task.name / run.model.name / run.method
    record = start_record(run, method / hash_run(run, stamp_ends), [])
    record.run, record.point = hash_run(run, stamp_ends), hash_run(replace(run, seed=0), stamp_ends)
    record.model.content = stamp_ends(str(run.model.path))
    record.finish()
    return record


def test_a_run_whose_files_are_what_they_were_is_found(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [recorded_then(run, seed).folder for seed in (42, 43)]
    assert [locate_run(replace(run, seed=seed)) for seed in (42, 43)] == folders
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith(f"{run.model.path}, {run.task.train_file} unchanged since: runs that")


def test_its_seeds_are_a_row_with_those_recorded_now(run: Run, tmp_path: Path) -> None:
    """Its record is told apart by whole files from then on; its name, by which it is known, stays."""
    before = recorded_then(run)
    found, new = find_record(locate_run(run)), start_record(replace(run, seed=1), tmp_path / "new", [])
    assert found is not None and found.run == before.run
    assert (found.point, found.model.content) == (new.point, new.model.content)
    os.utime(run.task.train_file or "")  # what was seen to be the same once stays so
    assert locate_run(run) == before.folder


@pytest.mark.parametrize("which", ["data", "backbone"])
def test_a_run_whose_files_have_changed_is_another(which: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The middle of a large file has another byte, and the time that it had."""
    before = recorded_then(run)
    file = Path(run.task.train_file or "") if which == "data" else Path(run.model.path or "") / "model.safetensors"
    changed(file, MIDDLE, quietly=True)
    assert hash_run(run, stamp_ends) == before.run
    assert locate_run(run) == locate_run(run) == before.folder.with_name(hash_run(run))
    (told,) = capsys.readouterr().err.splitlines()
    key = f"task.data_files.train={file}" if which == "data" else f"model.path={run.model.path}"
    assert told.startswith(f"{key} has changed since: runs such as {before.folder} were named when")
    record = find_record(before.folder)
    assert record is not None and record.point == before.point


def test_another_path_with_the_same_ends_is_another_run(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "backbone"
    other.mkdir(parents=True)
    large(other / "model.safetensors")
    changed(other / "model.safetensors", MIDDLE)
    before = recorded_then(run)
    assert locate_run(replace(run, model=replace(run.model, path=str(other)))) != before.folder


def test_a_link_that_leads_elsewhere_now_is_seen(run: Run, tmp_path: Path) -> None:
    link, other = tmp_path / "current", tmp_path / "other"
    other.mkdir()
    large(other / "model.safetensors")
    changed(other / "model.safetensors", MIDDLE)
    link.symlink_to(str(run.model.path))
    run = replace(run, model=replace(run.model, path=str(link)))
    before = recorded_then(run)
    assert locate_run(run) == before.folder
    link.unlink()
    link.symlink_to(other)
    assert locate_run(run) != before.folder


def test_a_folder_renamed_into_the_place_is_seen(run: Run, tmp_path: Path) -> None:
    path = Path(run.model.path or "")
    (tmp_path / "other").mkdir()
    large(tmp_path / "other" / "model.safetensors")
    changed(tmp_path / "other" / "model.safetensors", MIDDLE)
    before = recorded_then(run)
    path.rename(tmp_path / "away")
    (tmp_path / "other").rename(path)
    assert hash_run(run, stamp_ends) == before.run and locate_run(run) != before.folder


def test_small_files_need_no_such_look(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(run.model.path or "") / "model.safetensors").write_bytes(b"small")
    Path(run.task.train_file or "").write_bytes(b"small")
    before = recorded_then(run)
    os.utime(run.task.train_file or "")
    assert locate_run(run) == before.folder and before.run == hash_run(run)
    assert not capsys.readouterr().err


def test_the_embedded_backbone_may_be_anywhere(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another installation has it in another folder, as new as that: its whole content has the name of then."""
    mini = Path(str(compose_run([]).model.path))
    Path(run.task.train_file or "").write_bytes(b"small")
    runs = [
        replace(run, model=replace(run.model, path=str(copytree(mini, tmp_path / name / "mini"))))
        for name in ("a", "b")
    ]
    before = recorded_then(runs[0])
    assert locate_run(runs[1]) == before.folder
    large(Path(run.task.train_file or ""))
    before = recorded_then(runs[0])
    assert locate_run(runs[1]) == before.folder
    assert capsys.readouterr().err.startswith(f"{run.task.train_file} unchanged since")


def test_a_backbone_is_checked_by_what_the_record_has(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """evaluate, merge and load_run take the adapter of a record to the backbone that is there."""
    record = recorded_then(run)
    check_backbone(run, record)
    assert not capsys.readouterr().err
    changed(Path(run.model.path or "") / "model.safetensors", MIDDLE, quietly=True)
    check_backbone(run, record)
    assert "model.path" in capsys.readouterr().err
    record.model.content = stamp_content(str(run.model.path))
    check_backbone(run, record)
    changed(Path(run.model.path or "") / "model.safetensors", MIDDLE)
    with pytest.raises(UserError, match="is not the backbone on which the run was trained"):
        check_backbone(run, record)
