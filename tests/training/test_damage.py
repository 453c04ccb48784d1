"""What is left of a run that was stopped may be torn: it is passed over in a line, and the result is the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peftbench.cli.main import main
from peftbench.evaluation.partial import Partial
from peftbench.modification.state import load_tensors, write_tensors
from peftbench.training.checkpoint import NOTES, SEAL, TENSORS, Checkpoints, _seal
from peftbench.utils.errors import UserError

ZIPPED = "optimizer.pt"


def make_checkpoint(folder: Path, sealed: bool = True) -> Path:
    """Write what looks like a checkpoint at step 8, of which only some files matter here."""
    place = folder / "checkpoint-8"
    place.mkdir(parents=True)
    write_tensors({"a": torch.arange(1000.0)}, place / TENSORS)
    torch.save({"b": torch.arange(1000.0)}, place / ZIPPED)
    torch.save({"c": 1}, place / "scheduler.pt")
    (place / NOTES).write_text(json.dumps({"stamp": "mine", "seconds": 1.5, "best": None}))
    (place / "trainer_state.json").write_text(json.dumps({"global_step": 8}))
    if sealed:
        _seal(place)
    return place


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


HARMS: dict[str, Callable[[Path], Any]] = {
    "bit": flip,
    "short": cut,
    "empty": lambda file: file.write_bytes(b""),
    "null": lambda file: file.write_text("null"),
    "{}": lambda file: file.write_text("{}"),
    "deep": lambda file: file.write_text("[" * 100_000),
    "gone": lambda file: file.unlink(),
    "folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", [TENSORS, ZIPPED, NOTES, "trainer_state.json", SEAL])
def test_a_damaged_checkpoint_is_passed_over(name: str, harm: str, sealed: bool, tmp_path: Path) -> None:
    if not sealed and (name == SEAL or (name, harm) == (TENSORS, "bit")):
        pytest.skip("without a seal nobody can see that")
    place, said = make_checkpoint(tmp_path, sealed), list[str]()
    checkpoints = Checkpoints(tmp_path, 0, "mine")
    sound = checkpoints.take_up(said.append)
    assert sound is not None and sound.step == 8 and not said
    HARMS[harm](place / name)
    if (name, harm) == (SEAL, "gone"):  # as an earlier version leaves it
        assert checkpoints.take_up(said.append) is not None
        return
    assert checkpoints.take_up(said.append) is None and not place.exists()
    if (name, harm) != ("trainer_state.json", "gone"):  # which is how one looks that is being written
        assert len(said) == 1 and "is damaged" in said[0] and str(place) in said[0] and "NoneType" not in said[0]


def test_the_checkpoint_before_is_taken(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    later = shutil.copytree(tmp_path / "checkpoint-8", tmp_path / "checkpoint-9")
    (later / "trainer_state.json").write_text(json.dumps({"global_step": 9}))
    taken = Checkpoints(tmp_path, 0, "mine").take_up()
    assert taken is not None and taken.step == 8 and not later.exists()


def test_a_damaged_file_of_tensors_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_tensors({"a": torch.ones(9)}, file)
    for harm in (cut, HARMS["empty"], HARMS["null"], HARMS["folder"]):
        harm(file)
        with pytest.raises(UserError, match=r"a\.safetensors is damaged"):
            load_tensors(file)


@pytest.mark.parametrize("line", ["null", "[1]", '[1, "x", 3]', "[0, [5, 6], 1]", "\x00\xff", "[" * 100_000])
def test_rows_after_a_damaged_line_are_predicted_again(line: str, tmp_path: Path) -> None:
    file = tmp_path / "report.partial"
    Partial(file, "stamp").add([3, 4], [np.array([1, 2]), np.array([3])])
    assert {index: row.tolist() for index, row in Partial(file, "stamp").rows.items()} == {3: [1, 2], 4: [3]}
    first, second, third = file.read_text().splitlines()
    file.write_text("\n".join([first, second, line, third, ""]))
    assert list(Partial(file, "stamp").rows) == [3]
    file.write_text("\n".join([first, second.replace("[1, 2]", "[1, 9]"), third, ""]))
    assert not Partial(file, "stamp").rows


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A line, and the folder of the run that it has trained."""
    root = tmp_path_factory.mktemp("done")
    rows = [json.dumps({"text": f"the {'red' if i % 2 else 'blue'} thing {i}", "label": str(i % 2)}) for i in range(40)]
    (root / "rows.jsonl").write_text("\n".join(rows))
    line = ["task=text_classification", f"task.train_file={root / 'rows.jsonl'}", "model=mini", "method=lora"]
    line += ["debug=smoke", "trainer.max_steps=2", f"output_dir={root / 'out'}"]
    assert main(["train", *line]) == 0
    return line, next(file.parent for file in root.rglob("record.json"))


def test_checkpoints_of_a_run_that_is_done_are_cleared(done: tuple[list[str], Path]) -> None:
    """Its process was killed before it could do that itself."""
    line, folder = done
    make_checkpoint(folder / "checkpoints" / "train lora")
    before = (folder / "record.json").read_bytes()
    assert main(["train", *line]) == 0
    assert not (folder / "checkpoints").exists() and (folder / "record.json").read_bytes() == before


@pytest.mark.parametrize("command", ["evaluate", "merge"])
def test_an_adapter_that_is_not_the_runs_is_refused(
    command: str, done: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(done[1], tmp_path / "run")
    flip(folder / "adapter" / "adapter.safetensors")
    assert main([command, str(folder), *(["--out", str(tmp_path / "out")] if command == "merge" else [])]) == 2
    assert "is not as the run stored it" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "a", "seed: {", "seed: x"])
def test_a_damaged_config_is_named(
    text: str, done: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(done[1], tmp_path / "run")
    (folder / "config.yaml").write_text(text)
    assert main(["rescore", str(folder)]) == 2
    assert "config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["7", "null", "[]", '{"a": 1}', '"no label of this task"'])
@pytest.mark.parametrize("key", ["prediction", "reference"])
def test_predictions_of_another_kind_are_named(
    key: str, value: str, done: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(done[1], tmp_path / "run")
    first, *others = (folder / "predictions.jsonl").read_text().splitlines()
    torn = json.dumps({**json.loads(first), key: json.loads(value)})
    (folder / "predictions.jsonl").write_text("\n".join([torn, *others, ""]))
    assert main(["rescore", str(folder)]) == 2
    assert "predictions.jsonl holds values that are no predictions of this task (row 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", [OSError(28, "No space left"), RuntimeError("I/O error: File too large (os error 27)")]
)
def test_a_full_disk_is_a_sentence_when_a_model_is_merged(
    kind: Exception,
    done: tuple[list[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind  # as safetensors and tokenizers raise errors of the system

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    assert main(["merge", str(done[1]), "--out", str(tmp_path / "merged")]) == 1
    said = capsys.readouterr().err
    assert "No space left" in said or f"{tmp_path / 'merged'}: File too large" in said


def test_a_checkpoint_that_torch_cannot_write_is_a_sentence(
    done: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save raises this RuntimeError on a full disk; the run is interrupted, and goes on with space."""
    line = [*done[0][:-1], f"output_dir={tmp_path / 'out'}", "trainer.checkpoint_minutes=0", "seed=7"]

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 640 vs 598")

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", fail)
        assert main(["train", *line]) == 1
    assert "no space left, or a limit on the size of files" in capsys.readouterr().err
    (record,) = (tmp_path / "out").rglob("record.json")
    assert json.loads(record.read_text())["status"] == "interrupted"
    assert main(["train", *line]) == 0
