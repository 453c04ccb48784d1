"""`peftbench compare`: which runs it takes for its sides, what it refuses, and what it says of their settings."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftbench.cli.compare import main
from peftbench.config.schema import FunctionalForm, Modification, Trainer
from peftbench.records.location import locate_run
from peftbench.records.record import Score, Searched, find_record, load_records
from peftbench.records.recording import record_run
from peftbench.records.run_files import write_predictions
from peftbench.tables.comparison import find_differing_settings
from peftbench.tables.row import make_rows
from peftbench.utils.errors import UserError
from tests.records.test_record import RUN

REFERENCES = ["yes", "no"] * 50


def trained(root: Path, right: int, references: list[str] = REFERENCES, **changes: Any) -> Path:
    """The folder of a run whose first `right` predictions of a hundred are right."""
    run = replace(RUN, output_dir=str(root), **changes)
    folder = locate_run(run)
    with record_run(run, folder, []) as record:
        record.scores["report"] = Score("test", len(references), {"accuracy": 100 * right / len(references)})
        record.score = record.scores["report"].metrics["accuracy"]
        record.versions = {"python": "3.11"}
        write_predictions(
            folder,
            (
                {"index": i, "prediction": word if i < right else "maybe", "reference": word}
                for i, word in enumerate(references)
            ),
        )
    return folder


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    for seed in (1, 2, 3):
        trained(tmp_path, 80 + seed, method="mam", seed=seed)
        trained(tmp_path, 60 + seed, method="lora", bottleneck=9, trainer=Trainer(learning_rate=5e-3), seed=seed)
    return tmp_path


def compared(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main([str(argument) for argument in [*arguments, "--resamples", 500, "--json"]]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_two_settings_over_their_seeds(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(capsys, "method=mam", "method=lora", "--folder", outputs)
    assert len(found["a"]) == len(found["b"]) == 3
    accuracy = found["metrics"]["accuracy"]
    assert (accuracy["a"], accuracy["b"], accuracy["difference"]) == pytest.approx((82, 62, 20))
    assert 10 < accuracy["low"] < 20 < accuracy["high"] < 30 and accuracy["p"] < 0.01
    assert found["settings"] == {
        "bottleneck": [4, 9],
        "method": ["mam", "lora"],
        "trainer.learning_rate": [1e-3, 5e-3],
    }


def test_a_further_modification_is_told_by_what_is_its_own(tmp_path: Path) -> None:
    mix = replace(Modification(), bottleneck=7, bias=True, functional_form=FunctionalForm("relu"))
    folders = [trained(tmp_path, 50), trained(tmp_path, 50, mix={**RUN.mix, "other": mix})]
    a, b = (make_rows(load_records(folder)[0])[0] for folder in folders)
    assert find_differing_settings(a, b) == {
        "mix.other.functional_form.name": [None, "relu"],
        "mix.other.bottleneck": [None, 7],
        "mix.other.bias": [None, True],
    }


def test_what_only_counting_reads_is_no_setting(tmp_path: Path) -> None:
    models = [replace(RUN.model, architecture={"d_model": width}) for width in (16, 32)]
    folders = [trained(tmp_path / str(index), 50, model=model) for index, model in enumerate(models)]
    a, b = (make_rows(load_records(folder)[0])[0] for folder in folders)
    assert find_differing_settings(a, b) == {}


def test_a_debug_run_says_so(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for record in load_records(outputs)[0]:
        if record.method == "mam":
            record.debug = "smoke"
            record.save()
    assert main(["method=mam", "method=lora", "--folder", str(outputs)]) == 0
    assert "A: mam (debug=smoke), " in capsys.readouterr().out


def test_the_trials_of_a_search_stand_back(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trial = find_record(trained(outputs, 99, method="mam", trainer=Trainer(learning_rate=1e-2), seed=1))
    assert trial is not None
    trial.search = Searched("lr3", "trial", 1, {"trainer.learning_rate": [1e-2, 1e-3]}, {"trainer.learning_rate": 1e-2})
    trial.save()
    assert compared(capsys, "method=mam", "method=lora", "--folder", outputs)["metrics"]["accuracy"]["a"] == 82
    with pytest.raises(UserError, match=r"A=method=mam trials=true matches 2 settings"):
        main(["method=mam trials=true", "method=lora", "--folder", str(outputs)])
    assert compared(capsys, "method=mam trials=true score>90", "method=lora seed=1", "--folder", outputs)["a"]


def test_runs_by_folder_and_by_the_start_of_their_name(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (next(outputs.glob(f"*/*/{method}/*")) for method in ("mam", "lora"))
    by_folder = compared(capsys, one, other)
    assert compared(capsys, one.name[:5], other.name, "--folder", outputs) == by_folder
    assert by_folder["a"] == [one.name]


def test_what_is_printed(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["method=mam", "method=lora", "--folder", str(outputs), "--resamples", "200"])
    text = capsys.readouterr().out
    assert "doctopic, 100 test examples" in text and "A: mam" in text and "+20.00" in text
    assert "so few seeds say little" in text and "trainer.learning_rate" in text
    main(["method=mam seed=1", "method=mam seed=2", "--folder", str(outputs), "--resamples", "200"])
    text = capsys.readouterr().out
    assert "one seed does not show" in text and "The settings do not differ." in text and "-1.00" in text


def _other_task(root: Path) -> None:
    trained(root, 50, method="full", task=replace(RUN.task, name="sst2"))


def _other_examples(root: Path) -> None:
    trained(root, 50, ["no", "yes"] * 50, method="full")


def _other_number(root: Path) -> None:
    trained(root, 5, ["yes"] * 10, method="full")


def _other_data(root: Path) -> None:
    """Other texts with the same labels, which the predictions do not tell."""
    trained(root, 90, method="full")
    for record in load_records(root)[0]:
        record.data["scored_on"] = ("b" if record.method == "full" else "a") * 64
        record.save()


def _two_settings(root: Path) -> None:
    for bottleneck in (8, 16):
        trained(root, 50, method="full", bottleneck=bottleneck)


def _without_predictions(root: Path) -> None:
    (trained(root, 50, method="full") / "predictions.jsonl").unlink()


def _torn_predictions(root: Path) -> None:
    (trained(root, 50, method="full") / "predictions.jsonl").write_text('{"index": 0, "pred')


def _foreign_predictions(root: Path) -> None:
    (trained(root, 50, method="full") / "predictions.jsonl").write_text('{"reference": "yes"}\n[1]\n')


def _failed(root: Path) -> None:
    file = trained(root, 50, method="full") / "record.json"
    file.write_text(file.read_text().replace('"status": "done"', '"status": "failed"'))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_other_task, "they differ in task: doctopic and sst2"),
        (_other_examples, "not scored on the same examples: 100 of 100 differ"),
        (_other_data, "they differ in data: aaaaaaaa and bbbbbbbb"),
        (_other_number, "they differ in examples: 100 and 10"),
        (_two_settings, "B=method=full matches 2 settings, which differ in bottleneck; choose one"),
        (_without_predictions, "predictions.jsonl is missing"),
        (_torn_predictions, "predictions.jsonl cannot be read"),
        (_foreign_predictions, "predictions.jsonl cannot be read: line 1 has no reference and prediction."),
        (_failed, "B=method=full has no score to compare: it is failed"),
    ],
)
def test_sides_that_cannot_be_compared(outputs: Path, spoil: Callable[[Path], None], sentence: str) -> None:
    spoil(outputs)
    with pytest.raises(UserError, match=sentence):
        main(["method=mam", "method=full", "--folder", str(outputs)])


def test_a_side_that_is_nothing(outputs: Path) -> None:
    with pytest.raises(UserError, match="A=xyz is neither the folder of a run nor the first digits of one below"):
        main(["xyz", "method=mam", "--folder", str(outputs)])
    with pytest.raises(UserError, match="method=mma is unknown; did you mean mam"):
        main(["method=mma", "method=mam", "--folder", str(outputs)])
    with pytest.raises(UserError, match="--resamples 0"):
        main(["method=mam", "method=lora", "--folder", str(outputs), "--resamples", "0"])


def test_comparing_imports_no_torch() -> None:
    code = (
        "import sys, peftbench.cli.compare; from peftbench.metrics.measure import compute_statistics; "
        "[compute_statistics(metric, ['a'], ['a']) for metric in ('rouge1', 'f1', 'bleu_ro')]; "
        "compute_statistics('pearson', ['1'], ['2']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_how_texts_were_read_is_a_difference(tmp_path: Path) -> None:
    """A run of an earlier version beside one of this."""
    a, b = (make_rows(load_records(trained(tmp_path, 50, seed=seed))[0])[0] for seed in (1, 2))
    b.first.data["reading"] = {"pair_separator": "\n"}
    assert find_differing_settings(a, b) == {"(reading.pair_separator)": [None, "\n"]}
