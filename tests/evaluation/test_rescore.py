"""A finished run scored again, from its adapter and from its predictions: equal to the last digit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartForSequenceClassification

from peftbench import load_run
from peftbench import train as train_module
from peftbench.cli.main import main
from peftbench.evaluation import predict as predict_module
from peftbench.metrics.measure import measure
from peftbench.modification.state import FILE_NAME
from peftbench.records.run_files import read_metrics
from peftbench.records.saved import find_run_folder
from peftbench.utils.errors import UserError
from peftbench.utils.files import write_lines
from tests.tables.test_table import record

SMOKE = ("model=mini", "debug=smoke", "trainer.max_steps=3", "method=mam")


def trained(folder: Path, *overrides: str) -> Path:
    """The folder of a run of a few steps."""
    assert main(["train", *SMOKE, *overrides, f"output_dir={folder / 'outputs'}"]) == 0
    (file,) = (folder / "outputs").rglob("record.json")
    return file.parent


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """A folder as `task=mnli` reads it: 40 pairs to train, 20 matched, 10 mismatched."""
    names = ("entailment", "neutral", "contradiction")
    rows = [{"premise": f"it rained {i} times", "hypothesis": "rain", "label": names[i % 3]} for i in range(40)]
    for name, count in (("train", 40), ("dev_matched", 20), ("dev_mismatched", 10)):
        write_lines(tmp_path / f"{name}.jsonl", rows[:count])
    return f"task.data_dir={tmp_path}"


@pytest.fixture
def texts(tmp_path: Path) -> str:
    rows = [{"document": f"Text {i} is about rain. It has an end.", "summary": f"Rain {i}."} for i in range(24)]
    for name in ("train", "validation", "test"):
        write_lines(tmp_path / f"{name}.jsonl", rows)
    return f"task.data_dir={tmp_path}"


def scored(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def recorded(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "record.json").read_text())
    return record


@pytest.mark.slow
def test_mnli_reports_both_dev_sets_in_full(pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, "task=mnli", pairs, "task.max_eval=null", "task.max_selection=null")
    scores = recorded(run)["scores"]
    assert [scores[role]["examples"] for role in ("report", "report_validation_mismatched")] == [20, 10]
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 20
    assert len((run / "predictions.validation_mismatched.jsonl").read_text().splitlines()) == 10
    again = scored(capsys, "evaluate", str(run))
    assert {entry["role"]: entry["metrics"] for entry in again} == {
        role: scores[role]["metrics"] for role in ("report", "report_validation_mismatched")
    }
    (other,) = scored(capsys, "evaluate", str(run), "task.split=validation_mismatched")
    assert other["metrics"] == scores["report_validation_mismatched"]["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mam", "pfeiffer", "full"])
def test_a_run_is_loaded_in_python_without_its_data(pairs: str, method: str, tmp_path: Path) -> None:
    """The logits of `load_run` choose the labels that the run predicted; transformers' own class, no peftbench call."""
    rows = [{"premise": name * 9, "hypothesis": "so", "label": name} for name in ("neutral", "contradiction") * 16]
    for name in ("train", "dev_matched", "dev_mismatched"):
        write_lines(tmp_path / f"{name}.jsonl", rows)
    settings = ("trainer.learning_rate=0.003", "trainer.max_steps=30", "trainer.batch_size=8")
    run = trained(tmp_path, "task=mnli", pairs, f"method={method}", *settings)
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    model, tokenizer = load_run(run)
    assert type(model) is BartForSequenceClassification and not model.training
    batch = tokenizer([r["premise"] for r in rows], [r["hypothesis"] for r in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        chosen = model(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1)
    predicted = [json.loads(line)["prediction"] for line in (run / "predictions.jsonl").read_text().splitlines()]
    labels = recorded(run)["data"]["labels"]
    assert [labels[index] for index in chosen][: len(predicted)] == predicted
    assert len(set(predicted)) > 1
    with pytest.raises(UserError, match=r"model\.path=/nowhere is not a folder"):
        load_run(run, "model.path=/nowhere")
    with pytest.raises(UserError, match="has no run"):
        load_run(tmp_path)


def test_a_part_of_a_split_is_called_one(pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, "task=mnli", pairs, "task.max_eval=16")
    assert recorded(run)["scores"]["report"] | {"metrics": {}} == {
        "split": "validation_matched",
        "examples": 16,
        "of": 20,
        "metrics": {},
    }
    assert "on 16 of 20 validation_matched" in " ".join(capsys.readouterr().out.split())


def test_a_further_split_without_a_file_is_left_out_and_noted(pairs: str, tmp_path: Path) -> None:
    (tmp_path / "dev_mismatched.jsonl").unlink()
    run = trained(tmp_path, "task=mnli", pairs)
    assert recorded(run)["data"]["notes"][0] == "validation_mismatched is not scored: there is no file for it."
    assert "report_validation_mismatched" not in recorded(run)["scores"]


def test_generated_text_is_scored_again(texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The adapter writes the same texts; the metrics of the saved ones are the record's, and others can be had."""
    run = trained(tmp_path, "task=xsum", texts, "task.metric=rougeL")
    report = recorded(run)["scores"]["report"]
    file = tmp_path / "again.jsonl"
    (again,) = scored(capsys, "evaluate", str(run), "--predictions", str(file))
    assert again["metrics"] == report["metrics"]
    assert file.read_text() == (run / "predictions.jsonl").read_text()
    (from_file,) = scored(capsys, "rescore", str(run))
    assert from_file["metrics"] == report["metrics"]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    (bleu,) = scored(capsys, "rescore", str(run), "bleu")
    expected = measure("bleu", [row["prediction"] for row in rows], [row["reference"] for row in rows]).scores
    assert bleu["metrics"] == expected and "tok:13a" in bleu["signatures"]["bleu"]
    assert main(["rescore", str(run)]) == 0
    printed = capsys.readouterr().out
    assert f"rougeL       {report['metrics']['rougeL']!r}" in printed and "as in the record" in printed


def test_how_texts_were_read_is_in_the_record(texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And scoring a run says that an earlier version read its texts otherwise, or nothing."""
    run = trained(tmp_path, "task=xsum", texts, "task.prompt='<s></s>{source}'", "task.max_source_length=10")
    shown = " ".join(capsys.readouterr().out.split())
    assert "Sources are truncated to 10 tokens (task.max_source_length=10): 100.0% of train" in shown
    record = recorded(run)
    assert record["data"]["reading"] == {"special_tokens": ["<s>", "</s>"]}
    assert record["data"]["limits"]["sources"] == 10 and record["data"]["cut"]["train"] == {"sources": 1, "targets": 0}
    assert record["data"]["signatures"]["rouge2"].startswith("tok:rouge_score|stem:porter|version:")
    assert main(["evaluate", str(run)]) == 0
    assert "read in another way" not in " ".join(capsys.readouterr().out.split())
    del record["data"]["reading"]
    (run / "record.json").write_text(json.dumps(record))
    assert main(["evaluate", str(run)]) == 0
    assert 'read in another way (special_tokens ["<s>", "</s>"])' in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_generation_that_was_stopped_goes_on(
    texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written before is not generated again, and the end is the same; another adapter begins anew."""
    run = trained(tmp_path, "task=xsum", texts)
    file, arguments = tmp_path / "again.jsonl", ["evaluate", str(run), "trainer.eval_batch_size=5"]
    generate, sizes = predict_module._generate, []

    def stopped(model: Any, batch: dict[str, Any], *others: Any) -> Any:
        sizes.append(len(batch["input_ids"]))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return generate(model, batch, *others)

    monkeypatch.setattr(predict_module, "_generate", stopped)
    assert main([*arguments, "--predictions", str(file)]) == 130
    assert not file.exists()
    partial = tmp_path / "again.jsonl.partial"
    kept = partial.read_text().splitlines()
    assert len(kept) == 1 + 10
    partial.write_text("\n".join([*kept, "[3, [0, 1"]))  # torn where it stopped
    sizes.clear()
    sizes += [0, 0, 0]
    capsys.readouterr()
    assert main([*arguments, "--predictions", str(file)]) == 0
    assert sum(sizes) == 16 - 10
    assert file.read_text() == (run / "predictions.jsonl").read_text() and not partial.exists()

    partial.write_text("\n".join(['"another run"', *kept[1:], ""]))
    sizes[:] = [0, 0, 0]
    assert main([*arguments, "--predictions", str(file)]) == 0
    assert sum(sizes) == 16


@pytest.mark.slow
@pytest.mark.parametrize("files", [("train",), ("train", "test"), ("train", "validation", "test")])
def test_a_split_of_ones_own_files_is_the_one_that_the_run_had(
    files: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file of the split that was reported on is not that of another one that is now."""
    for number, name in enumerate(files):
        rows = [{"text": f"{name} {i}", "label": "ab"[i % 2]} for i in range(60 - 20 * number)]
        write_lines(tmp_path / f"{name}.jsonl", rows)
    given = [f"task.{name}_file={tmp_path / name}.jsonl" for name in files]
    whole = ("task.max_train=null", "task.max_selection=null", "task.max_eval=null")
    run = trained(tmp_path, "task=text_classification", "task.metric=macro_f1", *whole, *given)
    record = recorded(run)
    for role, split in (("selection", "validation"), ("report", "test")):
        (again,) = scored(capsys, "evaluate", str(run), f"task.split={split}")
        assert {**again, "role": role}.items() >= {**record["data"]["splits"][role], "role": role}.items()
        assert again["metrics"] == record["scores"][role]["metrics"]
    (again,) = scored(capsys, "evaluate", str(run), "task.split=train")
    assert again["examples"] == record["data"]["splits"]["train"]["examples"]
    assert main(["evaluate", str(run), "task.split=dev"]) == 2
    assert "task.split=dev is unknown. Choices: train, validation, test." in capsys.readouterr().err


def test_labels_that_were_found_keep_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the training file is gone, and where another split has only some of them."""
    rows = [{"text": f"text {i}", "label": ("b", "a", "c")[i % 3]} for i in range(30)]
    for name in ("train", "dev", "test"):
        write_lines(tmp_path / f"{name}.jsonl", rows)
    run = trained(tmp_path, "task=text_classification", f"task.data_dir={tmp_path}", "task.metric=macro_f1")
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").unlink()
    metrics = recorded(run)["scores"]["report"]["metrics"]
    assert [entry["metrics"] for entry in scored(capsys, "evaluate", str(run))] == [metrics]
    assert [entry["metrics"] for entry in scored(capsys, "rescore", str(run))] == [metrics]


@pytest.mark.slow
def test_files_that_are_not_read_need_not_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On another machine a run may find the file that it reports on and no other; one that it reads is asked for."""
    rows = [{"text": f"text {i}", "label": ("b", "a", "c")[i % 3]} for i in range(60)]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "validation", "test")}
    for file in files.values():
        write_lines(file, rows)
    given = {name: f"task.{name}_file={file}" for name, file in files.items()}
    whole = trained(tmp_path / "whole", "task=text_classification", "task.metric=macro_f1", *given.values())
    dealt = trained(tmp_path / "dealt", "task=text_classification", "task.metric=macro_f1", given["train"])
    for name in ("train", "validation"):
        files[name].unlink()
    (again,) = scored(capsys, "evaluate", str(whole))
    assert again["metrics"] == recorded(whole)["scores"]["report"]["metrics"]
    for arguments, missing in (
        ([str(whole), "task.split=validation"], f"task.validation_file={files['validation']}"),
        ([str(dealt)], f"task.train_file={files['train']}"),
        ([str(dealt), "task.split=validation"], f"task.train_file={files['train']}"),
    ):
        assert main(["evaluate", *arguments]) == 2
        assert f"{missing} is not a file; give the path of an existing one." in capsys.readouterr().err
        key = missing.partition("=")[0]  # which mends it
        assert main(["evaluate", *arguments, f"{key}={files['test']}"]) == 0
    # What was dealt from the training file needs it no more where it has a file.
    (own,) = scored(capsys, "evaluate", str(dealt), f"task.test_file={files['test']}")
    assert own["examples"] == 16 and own["of"] == 60


@pytest.mark.slow
def test_a_further_split_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its file may have gone, as that of mismatched MNLI; where a folder had it, it is named and left out."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "validation", "test", "more"):
        write_lines(data / f"{name}.jsonl", [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)])
    task = ("task=text_classification", "task.further_splits=[more]")
    files = [f"task.{name}_file={data}/{name}.jsonl" for name in ("train", "test")]
    named = trained(tmp_path / "named", *task, *files, f"+task.data_files.more={data}/more.jsonl")
    found = trained(tmp_path / "found", *task, f"task.data_dir={data}")
    assert [entry["split"] for entry in scored(capsys, "evaluate", str(named))] == ["test", "more"]
    (data / "more.jsonl").unlink()
    for overrides, sentence in (
        ([], f"task.data_files.more={data}/more.jsonl is not a file"),
        (["~task.data_files.more"], "~task.data_files.more: a saved run loses no key; give it another value."),
    ):
        assert main(["evaluate", str(named), *overrides]) == 2
        assert sentence in capsys.readouterr().err
    for run, overrides in ((named, ["task.further_splits=[]"]), (found, [])):
        assert main(["evaluate", str(run), *overrides]) == 0
        printed = capsys.readouterr().out
        assert "as in the record" in printed and "more, " not in printed
        assert ("more is not scored: there is no file for it." in printed) is (run is found)


def test_a_run_is_scored_on_a_file_that_it_has_not_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
    for name in ("train", "test"):
        write_lines(tmp_path / f"{name}.jsonl", rows[:8])
    write_lines(tmp_path / "new.jsonl", rows)
    files = [f"task.{name}_file={tmp_path / name}.jsonl" for name in ("train", "test")]
    run = trained(tmp_path, "task=text_classification", *files)
    (new,) = scored(capsys, "evaluate", str(run), f"+task.data_files.new={tmp_path}/new.jsonl", "task.split=new")
    assert (new["split"], new["examples"], new["of"]) == ("new", 16, 20)
    assert main(["evaluate", str(run), "task.labels=[b,a]"]) == 2
    assert "task.labels=[b,a]: the run was trained on the labels a, b" in capsys.readouterr().err
    assert main(["evaluate", str(run), "task.labels=[a,b]"]) == 0
    assert "other rows" not in capsys.readouterr().out
    write_lines(tmp_path / "test.jsonl", rows[8:16])
    assert main(["evaluate", str(run)]) == 0
    assert "These are other rows of the test split than the run was scored on." in capsys.readouterr().out


def test_a_run_goes_by_the_first_digits_of_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_run_folder("3f2a") == Path("3f2a")  # without outputs
    folders = [Path("outputs", name) for name in ("3f2a91c0", "3f77d01b")]
    for folder in folders:
        folder.mkdir(parents=True)
        record(50.0, run=folder.name, folder=folder).save()
    assert find_run_folder("3f2") == find_run_folder(str(folders[0])) == folders[0] and find_run_folder("abc") == Path(
        "abc"
    )
    assert main(["rescore", "3f"]) == 2
    assert "3f matches 2 runs: outputs/3f2a91c0, outputs/3f77d01b; give one." in capsys.readouterr().err


def test_what_cannot_be_scored_is_refused(texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, "task=xsum", texts)
    capsys.readouterr()
    for arguments, sentence in (
        (["evaluate", str(tmp_path)], "has no run; give the folder that peftbench train named"),
        (["rescore", str(tmp_path / "nowhere")], "has no run"),
        (
            ["evaluate", str(run), "bottleneck=3"],
            "bottleneck=3: a saved run takes task.KEY, trainer.KEY, model.KEY only",
        ),
        (["evaluate", str(run), "task.splt=train"], "task.splt is not a key of the config (in task)"),
        (["evaluate", str(run), "task.split=dev"], "has no file for the dev split"),
        (
            ["evaluate", str(run), "task.split=test,train"],
            "task.split=test,train names several values, and a saved run",
        ),
        (["evaluate", str(run), "trainer.max_grad_norm=${oc.env:PATH}"], "trainer.max_grad_norm: While dereferencing"),
        (["evaluate", str(run), "model.path=${nokey}"], "model.path: Interpolation key 'nokey' not found."),
        (["rescore", str(run), "accuracy"], "metric=accuracy is unknown. Choices: rouge1"),
    ):
        assert main(arguments) == 2
        assert sentence in capsys.readouterr().err
    assert main(["evaluate", str(run), "--predictions", "/nowhere/file"]) == 2
    assert "--predictions /nowhere/file: /nowhere is not a folder." in capsys.readouterr().err
    predictions = (run / "predictions.jsonl").read_text()
    for content, sentence in (
        (predictions + '{"prediction": "to', "predictions.jsonl cannot be read: line 17 is incomplete."),
        (predictions.partition("\n")[2], "predictions.jsonl holds 15 predictions, and the run made 16"),
    ):
        (run / "predictions.jsonl").write_text(content)
        assert main(["rescore", str(run)]) == 2
        assert sentence in capsys.readouterr().err
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("seed: 42", "seed: ${nokey}"))
    for command in ("evaluate", "rescore"):
        assert main([command, str(run)]) == 2
        assert "config.yaml cannot be read: Interpolation key 'nokey' not found" in capsys.readouterr().err
    (run / "config.yaml").write_text(config)
    record = recorded(run)
    (run / "record.json").write_text(json.dumps({**record, "status": "failed"}))
    assert main(["evaluate", str(run)]) == 2
    assert "has a run that is not done" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_was_stopped_while_it_generated_goes_on(
    texts: str,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is not trained again, what was generated before is not either, and the end is that of a run undisturbed."""
    words = ("task=xsum", texts, "trainer.keep=last", "trainer.eval_batch_size=5")
    outputs = tmp_path_factory.mktemp("outputs")  # not in the folder of the data, whose content names a run
    whole = trained(outputs / "whole", *words)
    generate, fit = predict_module._generate, train_module.fit_model
    sizes: list[int] = []
    trainings: list[int] = []

    def stopped(model: Any, batch: dict[str, Any], *others: Any) -> Any:
        sizes.append(len(batch["input_ids"]))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return generate(model, batch, *others)

    def counted(*given: Any, **more: Any) -> Any:
        trainings.append(1)
        return fit(*given, **more)

    monkeypatch.setattr(predict_module, "_generate", stopped)
    monkeypatch.setattr(train_module, "fit_model", counted)
    line = ["train", *SMOKE, *words, f"output_dir={outputs / 'stopped'}"]
    assert main(line) == 130
    assert (sum(sizes), sizes[-1], len(trainings)) == (15, 5, 1)
    sizes[:] = [0, 0, 0]
    capsys.readouterr()
    assert main(line) == 0
    assert (sum(sizes), len(trainings)) == (16 - 10, 1)
    assert "train mam: has ended before" in capsys.readouterr().out
    (file,) = (outputs / "stopped").rglob("record.json")
    for name in ("predictions.jsonl", f"adapter/{FILE_NAME}"):
        assert (file.parent / name).read_bytes() == (whole / name).read_bytes()
    before, after = recorded(whole), recorded(file.parent)
    assert after["scores"] == before["scores"] and after["adapter_bytes"] == before["adapter_bytes"]
    assert after["steps"] == before["steps"] and len(read_metrics(file.parent)) == len(read_metrics(whole))
    assert after["timings"]["earlier_s"] > 0 and not (file.parent / "checkpoints").exists()
