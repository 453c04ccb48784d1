"""`peftbench predict`: files and pipes of inputs without labels, labels with probabilities, numbers and texts."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from peftbench import load_run
from peftbench.cli.main import main
from peftbench.cli.predict import READ
from peftbench.evaluation import evaluator
from peftbench.tasks.inputs import FORMATS
from tests.chat import chatml
from tests.families import build
from tests.finished import make_run, save_backbone, save_tiny_bert

LABELS = ("good", "bad", "mixed")
TEXTS = ["A good film.", "", 'It is long, and it is "bad".', "Rain", "the sun came out over the town, and it stayed"]
CLASSIFY = ("model=bert_base", "method=lora", "task=text_classification", "task.text_columns=[text]")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"model.path={save_tiny_bert(tmp_path_factory.mktemp('bert'))}"


@pytest.fixture(scope="module")
def classifier(bert: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("classifier"), *CLASSIFY, bert, labels=LABELS)


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def probabilities(run: Path, *texts: str) -> list[dict[str, float]]:
    """Of each text by itself, by the model that `load_run` gives."""
    model, tokenizer = load_run(run)
    found = []
    for text in texts:
        encoded = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = model(encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[0]
        found.append(dict(zip(LABELS, logits.double().softmax(-1).tolist(), strict=True)))
    return found


def test_a_pipe_of_lines(classifier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for each, in order, an empty one too; nothing else on standard output."""
    pipe(monkeypatch, "".join(f"{text}\n" for text in TEXTS).encode())
    assert main(["predict", str(classifier), "-"]) == 0
    told = capsys.readouterr()
    lines = [line.split("\t") for line in told.out.splitlines()]
    wanted = probabilities(classifier, *TEXTS)
    assert [label for label, _ in lines] == [max(one, key=one.__getitem__) for one in wanted]
    assert [float(share) for _, share in lines] == pytest.approx([max(one.values()) for one in wanted], abs=1e-4)
    assert "predict" in told.err
    assert len({share for _, share in lines}) == len(TEXTS)


def test_no_lines(classifier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"")
    assert main(["predict", str(classifier), "-"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("ending", ["txt", "csv", "tsv", "jsonl"])
def test_files_of_every_format(ending: str, classifier: Path, tmp_path: Path) -> None:
    """The same predictions whatever is read and written; ids come along, labels that are there are not read."""
    texts = [text for text in TEXTS if "," not in text or ending != "tsv"]
    file, out = tmp_path / f"inputs.{ending}", tmp_path / f"out.{ending}"
    if ending == "txt":
        file.write_text("\r\n".join(texts))  # Windows' ends, and none at the end
    elif ending == "jsonl":
        rows = [{"id": f"n{i}", "text": text, "label": "unheard of"} for i, text in enumerate(texts)]
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        with file.open("w", newline="") as opened:
            dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if ending == "tsv" else {}
            csv.writer(opened, **dialect).writerows(
                [["id", "text"], *([f"n{i}", text] for i, text in enumerate(texts))]
            )
    assert main(["predict", str(classifier), str(file), "--out", str(out)]) == 0
    wanted = probabilities(classifier, *texts)
    labels = [max(one, key=one.__getitem__) for one in wanted]
    lines = out.read_text().splitlines()
    if ending == "jsonl":
        found = [json.loads(line) for line in lines]
        assert [(one["id"], one["prediction"]) for one in found] == [(f"n{i}", x) for i, x in enumerate(labels)]
        for one, other in zip(found, wanted, strict=True):
            assert one["probabilities"] == pytest.approx(other, abs=1e-4)
    elif ending == "txt":
        assert [line.split("\t")[0] for line in lines] == labels
    else:
        header, *rows = csv.reader(lines, delimiter="\t" if ending == "tsv" else ",")
        assert header == ["index", "id", "prediction", *(f"probability of {label}" for label in LABELS)]
        assert [row[2] for row in rows] == labels
        assert [float(row[3]) for row in rows] == pytest.approx([one["good"] for one in wanted], abs=1e-4)
    assert not list(tmp_path.glob("*.partial"))


def test_pairs(bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts on a line, with a tab between them."""
    run = make_run(tmp_path / "run", *CLASSIFY[:3], bert, "task.text_columns=[a,b]", labels=LABELS)
    pipe(monkeypatch, b"one\ttwo\nthree\tfour\n")
    assert main(["predict", str(run), "-"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    pipe(monkeypatch, b"one\ttwo\nthree\n")
    assert main(["predict", str(run), "-"]) == 2
    assert capsys.readouterr().err == (
        "peftbench: standard input:2 must have two texts with a tab between them, a and b; it has 1: 'three'.\n"
    )


def test_numbers(
    bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", *CLASSIFY[:2], bert, "task=stsb")
    pipe(monkeypatch, b'{"sentence1": "a", "sentence2": "b"}\n{"sentence1": "c", "sentence2": "d"}\n')
    assert main(["predict", str(run), "-", "--read", "jsonl", "--write", "jsonl"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [sorted(one) for one in found] == [["index", "prediction"]] * 2
    assert all(isinstance(one["prediction"], float) for one in found)


def test_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As `generate` writes them; a line break in a text stays on its line."""
    run = make_run(tmp_path / "run", "model=mini", "method=lora", "task=docsum", "task.prompt=null", *SHORT)
    pipe(monkeypatch, b"a text\na longer text about rain\n")
    assert main(["predict", str(run), "-"]) == 0
    found = capsys.readouterr().out.splitlines()
    model, tokenizer = load_run(run)
    wanted = []
    for text in ("a text", "a longer text about rain"):
        ids = model.generate(
            **tokenizer(text, return_tensors="pt", return_token_type_ids=False),
            num_beams=1,
            max_length=6,
            min_length=2,
            no_repeat_ngram_size=3,
        )
        wanted.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    assert found == [text.replace("\n", r"\n") for text in wanted]


@pytest.fixture(scope="module")
def chat_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = chatml()
    return save_backbone(tmp_path_factory.mktemp("chat"), build("llama", vocab_size=len(tokenizer)), tokenizer)


SHORT = ("task.generation.num_beams=1", "task.generation.max_length=6", "task.generation.min_length=2")


@pytest.mark.parametrize("kind", ["source and target", "conversations"])
def test_chat(
    kind: str, chat_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line is a user's turn in both; conversations of several turns end with the user's, or with one to replace."""
    more = (
        ["task=chat"]
        if kind == "conversations"
        else ["task=text_to_text", "task.chat=true", "task.max_target_length=8"]
    )
    run = make_run(tmp_path / "run", f"model.path={chat_backbone}", "model=smollm2_135m", "method=lora", *SHORT, *more)
    pipe(monkeypatch, b"Who wrote Hamlet?\nWhen?\n")
    assert main(["predict", str(run), "-"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    if kind == "source and target":
        return
    asked = [{"role": "user", "content": "Who wrote Hamlet?"}]
    answered = [*asked, {"role": "assistant", "content": "Shakespeare did, as far as we know."}]
    shared = [{"from": "human", "value": "Who wrote Hamlet?"}]
    cells = [asked, answered, shared, [*answered, {"role": "user", "content": "When?"}]]
    pipe(monkeypatch, "\n".join(json.dumps({"messages": cell}) for cell in cells).encode())
    assert main(["predict", str(run), "-", "--read", "jsonl"]) == 0
    found = capsys.readouterr().out.splitlines()
    assert found[:3] == [lines[0]] * 3 and len(found) == 4


def test_words_that_the_backbone_does_not_know_are_no_reason_to_refuse(
    classifier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, "映画\n\nfilm\n".encode())
    assert main(["predict", str(classifier), "-"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", "review\nfine\n", "a.csv: task.text_columns=text is unknown"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}', "a.jsonl:2: column text holds None, not text."),
        ("a.doc", "a", "its extension must be one of .txt, .tsv"),
        ("a.txt", b"a\n\xff", "a.txt:2 is not UTF-8 text"),
        ("b.txt", None, "b.txt cannot be read: No such file or directory."),
    ],
)
def test_inputs_that_cannot_be_read(
    name: str,
    content: str | bytes | None,
    sentence: str,
    classifier: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["predict", str(classifier), str(tmp_path / name), "--out", str(tmp_path / "out.txt")]) == 2
    told = capsys.readouterr()
    assert sentence in told.err and len(told.err.splitlines()) == 1
    assert not (tmp_path / "out.txt").exists()


def test_what_was_predicted_before_a_stop_is_not_predicted_again(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after two batches and after two more; the result is that of one go, and each input was predicted once."""
    file, seen = tmp_path / "inputs.txt", []
    file.write_text("".join(f"{'word ' * (i % 7)}{i}\n" for i in range(40)))
    words = ["predict", str(classifier), str(file), "trainer.eval_batch_size=8", "--out"]
    assert main([*words, str(tmp_path / "whole.jsonl")]) == 0
    predict = evaluator.predict

    def stop_after(batches: int) -> Any:
        def stopping(*args: Any, on_batch: Any, **more: Any) -> Any:
            left = iter(range(batches))

            def count(examples: int) -> None:
                on_batch(examples)
                seen.append(examples)
                next(left)

            return predict(*args, on_batch=count, **more)

        return stopping

    for batches in (1, 2, 9):  # a batch that is the last before a stop is stored
        monkeypatch.setattr(evaluator, "predict", stop_after(batches))
        try:
            assert main([*words, str(tmp_path / "out.jsonl")]) == 0
        except (StopIteration, RuntimeError):
            assert not (tmp_path / "out.jsonl").exists()
    assert seen == [8, 8, 16, 8, 8, 32, 8]  # the first of a later go: what is there
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.slow
def test_ten_thousand_lines_killed_twice(classifier: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "inputs.txt", tmp_path / "out.jsonl"
    file.write_text("".join(f"{'film ' * (i % 5)}{i}\n" for i in range(10_000)))
    kept = out.with_name("out.jsonl.partial")
    command = [sys.executable, "-m", "peftbench", "predict", str(classifier), str(file), "--out", str(out)]
    command.append("trainer.eval_batch_size=16")
    done: list[int] = []
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        before, ends = done[-1] if done else 0, time.monotonic() + 120
        while time.monotonic() < ends and process.poll() is None:
            lines = kept.read_bytes().count(b"\n") if kept.is_file() else 0
            if lines > before + 600:
                break
            time.sleep(0.01)
        process.kill()
        process.communicate()
        done.append(kept.read_bytes().count(b"\n"))
        assert not out.exists()
    assert 600 < done[0] < done[1] < 10_000
    finished = subprocess.run(command, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (0, "")
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["index"] for one in found] == list(range(10_000))
    whole = tmp_path / "whole.jsonl"
    assert main(["predict", str(classifier), str(file), "--out", str(whole), command[-1]]) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not kept.exists()


@pytest.mark.slow
def test_in_a_shell_pipe(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("a film\t1\nanother one\t2\n")
    line = f"cut -f1 x.tsv | {sys.executable} -m peftbench predict {classifier} - > y"
    subprocess.run(line, shell=True, check=True, cwd=tmp_path, capture_output=True, env={**os.environ})
    lines = (tmp_path / "y").read_text().splitlines()
    assert len(lines) == 2 and all(line.split("\t")[0] in LABELS for line in lines)


def test_the_command_offers_the_formats_that_are_read() -> None:
    assert sorted(READ) == sorted(FORMATS)
