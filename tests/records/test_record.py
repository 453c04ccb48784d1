"""A record says truly how its run ended, whole or not at all, and can be read again."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from peftbench.config.schema import (
    Composition,
    CompositionFunction,
    FunctionalForm,
    Init,
    Insertion,
    InsertionForm,
    Model,
    Modification,
    ModifiedRepresentation,
    Representation,
    Run,
    Task,
    TaskKind,
    Trainer,
)
from peftbench.records.record import (
    APART,
    FILE,
    Axes,
    Divergence,
    Record,
    RecordedCounts,
    Score,
    Selection,
    find_finished,
    find_record,
    load_records,
)
from peftbench.records.recording import record_run, start_record
from peftbench.records.run_files import append_metrics, write_predictions
from peftbench.tables.select import read_records
from peftbench.utils.errors import UserError
from peftbench.utils.files import resolve_folder, write_lines
from tests.live_files import refuse_scan

RUN = Run(
    method="mam",
    functional_form=FunctionalForm("softmax"),
    modified_representation=ModifiedRepresentation(Representation.heads, layers=[-1]),
    insertion_form=InsertionForm(Insertion.parallel),
    composition_function=CompositionFunction(Composition.gated),
    bottleneck=4,
    mix={
        "ffn": Modification(
            FunctionalForm("relu"),
            ModifiedRepresentation(Representation.ffn),
            InsertionForm(Insertion.parallel),
            CompositionFunction(Composition.scaled, scale=4),
            bottleneck=8,
            init=Init.bert,
        )
    },
    model=Model(name="mini", hub_id="some/model", revision="abc"),
    task=Task(name="doctopic", kind=TaskKind.classification, metric="accuracy"),
    trainer=Trainer(learning_rate=1e-3),
    sizes={"mini": {"mam": 4}},
)


def on_disk(folder: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads((folder / "record.json").read_text())
    return values


def test_a_run_that_ends_well_is_done(tmp_path: Path) -> None:
    with record_run(RUN, tmp_path, ["method=mam"]) as record:
        assert on_disk(tmp_path)["status"] == "running"
        assert find_finished(tmp_path) is None
        record.counts = RecordedCounts(backbone=1000, trained=60, stored=50, head=10, paper=None)
        record.scores["report"] = Score("test", 100, {"accuracy": 63.0})
        record.score = 63.0
    assert find_finished(tmp_path) == record
    assert record.status == "done"
    assert record.error is None
    assert record.finished is not None
    assert record.timings["total_s"] >= 0
    assert record.counts.percent == {"trained": 6.0, "stored": 5.0}
    assert {"python", "peftbench", "torch"} <= record.versions.keys()


def test_axes_are_recorded_with_the_options_that_differ(tmp_path: Path) -> None:
    heads, ffn = start_record(RUN, tmp_path, []).axes
    assert (heads.prefix, heads.functional_form, heads.bottleneck) == ("", "softmax", 4)
    assert heads.options == {"modified_representation.layers": [-1]}
    assert (ffn.prefix, ffn.composition_function, ffn.scale) == ("mix.ffn.", "scaled", 4.0)
    assert ffn.options == {"init": "bert"}


def test_the_resolved_config_stands_beside_it(tmp_path: Path) -> None:
    start_record(RUN, tmp_path, [])
    config = OmegaConf.merge(OmegaConf.structured(Run), OmegaConf.load(tmp_path / "config.yaml"))
    assert config.mix.ffn.bottleneck == 8
    assert config.sizes is None


def test_ctrl_c_is_recorded_as_interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), record_run(RUN, tmp_path, []):
        raise KeyboardInterrupt
    assert on_disk(tmp_path)["status"] == "interrupted"
    assert find_finished(tmp_path) is None


def test_a_run_that_diverges_has_no_score(tmp_path: Path) -> None:
    with record_run(RUN, tmp_path, []) as record:
        record.scores["report"] = Score("test", 8, {"accuracy": 50.0})
        record.score = 50.0
        record.diverge(Divergence("loss", 12))
    read_again = find_record(tmp_path)
    assert read_again == record and record.status == "diverged" and record.outcome == "diverged: step 12"
    assert read_again.score is None and not read_again.scores and find_finished(tmp_path) is not None


def test_a_search_compares_what_has_no_finite_score_on_the_report_split(tmp_path: Path) -> None:
    with record_run(RUN, tmp_path, []) as record:
        record.selection = Selection("validation", 8, "accuracy", 50.0)
        record.diverge(Divergence("score", 12))
    read_again = find_record(tmp_path)
    assert read_again is not None and read_again.status == "diverged"
    assert read_again.compared == Selection("validation", 8, "accuracy", 50.0)
    read_again.diverge(Divergence("weights", 12))
    assert read_again.compared is None


@pytest.mark.parametrize(
    ("score", "selection", "what"),
    [
        (math.nan, None, "score"),
        (math.inf, None, "score"),
        (50.0, Selection("validation", 8, "accuracy", None), "selection score"),
        (math.nan, Selection("validation", 8, "accuracy", None), "selection score"),
    ],
)
def test_what_an_earlier_version_called_done_is_shown_as_diverged(
    score: float, selection: Selection | None, what: str, tmp_path: Path
) -> None:
    with record_run(RUN, tmp_path, []) as record:
        record.scores["report"] = Score("test", 8, {"accuracy": score})
        record.score, record.selection = score, selection
    values = json.dumps({key: value for key, value in record.to_json().items() if key != "diverged"})
    (tmp_path / FILE).write_text(values)
    (shown,), _ = load_records(tmp_path)
    assert (shown.status, shown.outcome, shown.diverged) == ("diverged", "diverged", Divergence(what))
    assert shown.score is None and not shown.scores
    assert (tmp_path / FILE).read_text() == values  # reading writes nothing


def test_records_and_logs_are_json_for_any_program(tmp_path: Path) -> None:
    """NaN and infinity are no JSON. A metric beside the main one may still be none."""
    with record_run(RUN, tmp_path, []) as record:
        record.scores["report"] = Score("test", 8, {"accuracy": 50.0, "pearson": math.nan})
        record.score = 50.0
        append_metrics(tmp_path, {"stage": "train", "step": 1, "loss": math.inf})
        write_predictions(tmp_path, [{"prediction": math.nan}])
    for file in (FILE, "metrics.jsonl", "predictions.jsonl"):
        json.loads((tmp_path / file).read_text(), parse_constant=pytest.fail)
    again = find_record(tmp_path)
    assert again is not None and again.status == "done" and math.isnan(again.scores["report"].metrics["pearson"])


def test_an_exception_is_recorded_as_failed_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), record_run(RUN, tmp_path, []):
        _ = 1 / 0
    values = on_disk(tmp_path)
    assert values["status"] == "failed"
    assert values["error"] == {"name": "ZeroDivisionError", "message": "division by zero"}
    assert "1 / 0" in (tmp_path / "error.txt").read_text()


def test_a_second_try_starts_clean(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), record_run(RUN, tmp_path, []):
        append_metrics(tmp_path, {"step": 1})
        _ = 1 / 0
    with record_run(RUN, tmp_path, []):
        append_metrics(tmp_path, {"step": 2})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "metrics.jsonl", "record.json"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2}\n'


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = start_record(RUN, tmp_path, [])

    def disk_full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", disk_full)
    with pytest.raises(OSError, match="no space"):
        record.finish()
    with pytest.raises(OSError, match="no space"):
        write_predictions(tmp_path, [{"text": "a"}])
    assert on_disk(tmp_path)["status"] == "running"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "record.json"]


def test_predictions_hold_any_text(tmp_path: Path) -> None:
    rows = [{"text": "Δh \udc80 \u2028 </s>"}, {"text": "b"}]
    write_predictions(tmp_path, iter(rows))
    with (tmp_path / "predictions.jsonl").open(encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == rows


def test_records_survive_the_round_trip_and_unknown_keys(tmp_path: Path) -> None:
    with record_run(RUN, tmp_path / "a", ["seed=1"]) as record:
        record.baselines = {"majority": 20.0}
        record.score = 63  # JSON writes 63.0 this way too
    values = {**on_disk(tmp_path / "a"), "from_a_later_version": [1]}
    (tmp_path / "a" / "record.json").write_text(json.dumps(values))
    assert load_records(tmp_path) == ([record], [])
    assert load_records(tmp_path)[0][0].folder == tmp_path / "a"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ('{"schema_version": 1, "status"', "incomplete or not JSON"),
        ("", "incomplete or not JSON"),
        ("[1, 2]", "not the record of a run"),
        ('{"name": "somebody else\'s"}', "not the record of a run"),
        ('{"schema_version": 0}', "schema_version is 0, not 1"),
        ('{"schema_version": 1}', "lacks axes, created"),
        ({"status": "asleep"}, "status is 'asleep'"),
        ({"score": "high"}, "score is 'high'"),
        ({"steps": 10**400}, "a number in it is too large"),
        ({"axes": [{"prefix": ""}]}, "axes[0] lacks bottleneck"),
        (
            {"scores": {"report": {"split": "test", "examples": "all", "metrics": {}}}},
            "scores.report.examples is 'all'",
        ),
        ({"created": "yesterday"}, "created is 'yesterday'"),
        ({"created": "2026-11-23T10:00:00"}, "created is '2026-11-23T10:00:00'"),  # in which zone?
        ({"finished": "2026-11-23T10:00:00+00:00%s"}, "finished is '2026-11-23T10:00:00+00:00%s'"),
        ({"finished": "2026-11-23T10:00:00"}, "finished is '2026-11-23T10:00:00'"),
        ({"timings": {"total_s": math.nan}}, "timings.total_s is 'nan'"),
        ({"data": {"scored_on": 7}}, "data.scored_on is '7'"),
        ({"data": {"splits": [1]}}, "data.splits is '[1]'"),
        ({"data": {"splits": {"train": 3}}}, "data.splits.train is '3'"),
        ({"schema_version": "1"}, "schema_version is '1', not 1"),
        ({"schema_version": 2}, "a newer peftbench wrote it (schema_version 2; this one reads 1)"),
        (b"\xff\xfe", "left out"),
    ],
)
def test_what_is_no_record_is_named_and_left_out(tmp_path: Path, change: object, complaint: str) -> None:
    for name in ("bad", "good"):
        start_record(RUN, tmp_path / name, [])
    bad = tmp_path / "bad" / "record.json"
    if isinstance(change, dict):
        change = json.dumps({**on_disk(tmp_path / "bad"), **change})
    bad.write_bytes(change if isinstance(change, bytes) else str(change).encode())
    records, left_out = load_records(tmp_path)
    assert [record.folder.name for record in records] == ["good"]
    assert len(left_out) == 1
    assert left_out[0].startswith(f"{bad} is left out: ")
    assert complaint in left_out[0]


def test_runs_that_are_kept_apart_are_no_rivals_of_ones_own(tmp_path: Path) -> None:
    """As outputs/reference is: it is read where it, or a folder in it, is named."""
    for place in ("task/own", "reference/grid/one", "reference/grid/two"):
        (tmp_path / place).mkdir(parents=True)
        start_record(RUN, tmp_path / place, []).finish()
    (tmp_path / "reference" / APART).touch()
    found = {folder: len(load_records(tmp_path / folder)[0]) for folder in ("", "reference", "reference/grid")}
    assert found == {"": 1, "reference": 2, "reference/grid": 2}
    (tmp_path / "task" / "own" / FILE).unlink()
    with pytest.raises(UserError, match=r"or show those in .*reference: peftbench results .*reference"):
        read_records([str(tmp_path)])


def test_folders_that_are_links_are_read_once_and_loops_end(tmp_path: Path) -> None:
    """outputs/TASK may lie on another disk."""
    start_record(RUN, tmp_path / "disk" / "run", []).finish()
    outputs = tmp_path / "outputs"
    start_record(RUN, outputs / "here" / "run", []).finish()
    for name, target in (("task", tmp_path / "disk"), ("same", outputs / "here"), ("loop", outputs)):
        (outputs / name).symlink_to(target, target_is_directory=True)
    records, left_out = load_records(outputs)
    assert [record.folder for record in records] == [outputs / "here" / "run", outputs / "task" / "run"]
    assert left_out == []


def test_folders_are_resolved_as_the_system_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    resolved: dict[str, str] = {}
    for folder in (".", "..", "/", "disk", "disk/", "disk/run", "link", "link/run", "link/../disk", tmp_path / "link"):
        assert resolve_folder(folder, resolved) == os.path.realpath(folder), folder


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_record(RUN, tmp_path / "mine", []).finish()
    (tmp_path / "theirs").mkdir()
    refuse_scan("theirs", PermissionError(13, "Permission denied"), monkeypatch)  # which root would not get
    records, left_out = load_records(tmp_path)
    assert len(records) == 1 and left_out == [f"{tmp_path / 'theirs'} is left out: Permission denied."]


def test_a_checkpoint_that_is_deleted_meanwhile_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_record(RUN, tmp_path / "run", []).finish()
    (tmp_path / "run" / "checkpoints" / "checkpoint-33").mkdir(parents=True)
    refuse_scan("checkpoint-33", FileNotFoundError(2, "No such file or directory"), monkeypatch)
    records, left_out = load_records(tmp_path)
    assert len(records) == 1 and not left_out


def test_a_missing_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_records(tmp_path / "nowhere")


def test_from_json_refuses_what_is_no_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the record"):
        Record.from_json(None, tmp_path)


def test_a_scale_that_is_trained_is_called_learned() -> None:
    fixed = Axes("", "relu", "ffn", "parallel", "scaled", 4.0, 8, {})
    assert fixed.composition == "scaled 4"
    assert replace(fixed, scale=1.0, options={"composition_function.learned": True}).composition == "scaled 1 learned"
    assert replace(fixed, composition_function="add").composition == "add"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_lines(pipe, [{"a": 1}])
    assert os.read(reader, 100) == b'{"a": 1}\n' and pipe.is_fifo()
    os.close(reader)


def test_a_clock_that_is_set_back_changes_no_duration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with record_run(RUN, tmp_path, []) as record:
        monkeypatch.setattr("peftbench.records.record.get_time", lambda: "2001-01-01T00:00:00+00:00")
    assert 0 <= record.timings["total_s"] < 60
    assert "clock" not in on_disk(tmp_path)


def test_an_interruption_while_a_run_begins_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record says running already; it must not say so for ever."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peftbench.records.recording.format_config", interrupt)
    with pytest.raises(KeyboardInterrupt), record_run(RUN, tmp_path, []):
        pytest.fail("the run began")
    assert on_disk(tmp_path)["status"] == "interrupted"


def test_what_a_killed_process_was_writing_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    left = [tmp_path / "record.json.0a1b.tmp", tmp_path / "adapter" / "adapter.safetensors.0a1b.tmp"]
    for file in left:
        file.write_text("half")
    start_record(RUN, tmp_path, [])
    assert not any(file.exists() for file in left)


def test_a_full_disk_interrupts_a_run(tmp_path: Path) -> None:
    """It is no failure of the run: with space again, the same line goes on with it, in a sweep too."""
    with pytest.raises(OSError, match="No space"), record_run(RUN, tmp_path / "full", []):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="odd"), record_run(RUN, tmp_path / "odd", []):
        raise OSError("an odd error of a library")
    assert [on_disk(tmp_path / name)["status"] for name in ("full", "odd")] == ["interrupted", "failed"]
