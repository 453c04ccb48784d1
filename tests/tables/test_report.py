"""`peftbench report`: the one HTML file holds all runs, needs nothing else, and lets no text of a run act as HTML."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftbench.cli.report import main
from peftbench.config.identity import to_plain
from peftbench.records.record import Axes, Failure, RecordedCounts, Score, load_records
from peftbench.records.recording import start_record
from peftbench.records.run_files import write_predictions
from peftbench.tables.report.content import LONGEST, POINTS, SAMPLES
from peftbench.tables.select import read_records
from peftbench.utils.errors import UserError
from peftbench.utils.files import write_lines
from tests.records.test_record import RUN
from tests.tables.test_results import LORA
from tests.tables.test_table import FFN, HEADS
from tests.tables.test_table import record as make_record

EVIL = '</script><script>alert(1)</script><img src=x onerror=alert(2)> & "quotes" <!-- Δ λ \ud800'
BACKBONE = 1_000_000
FORMS: dict[str, list[Axes]] = {
    "lora": [LORA],
    "mam": [FFN, HEADS],
    "prefix": [HEADS],
    "parallel_adapter": [FFN],
    "full": [],
}
SIZES = (1000, 4000, 16_000, 64_000)


def make_runs(folder: Path, count: int = 30, steps: int = 40) -> None:
    """Runs of five methods, four sizes and several seeds, half of them on another task, each with all its files."""
    config = to_plain(RUN)
    for index in range(count):
        method = list(FORMS)[index % 5]
        task = ("doctopic", "sst2")[index // 5 % 2]
        size = SIZES[index // 10 % 4]
        seed = 1 + index // 40
        stored = BACKBONE if method == "full" else size
        score = 70 + 3 * math.log10(stored) + 2 * (method == "mam") + math.sin(index)
        record = make_record(
            score,
            *(replace(axes, bottleneck=size // 100) for axes in FORMS[method]),
            run=f"{index:08x}",
            point=f"{method} {task} {size}",
            method=method,
            task=task,
            seed=seed,
            examples=500,
            unfreeze="all" if method == "full" else "none",
            overrides=[f"method={method}", f"task={task}", f"seed={seed}"],
            counts=RecordedCounts(BACKBONE, trained=2 * stored, stored=stored, head=10, paper=None),
            tokens_per_s=9000.0 - index,
            peak_memory_bytes=2**30 + stored * 100,
            timings={"total_s": 60.5 + index},
            device="NVIDIA H200",
            folder=folder / task / f"{index:04}",
        )
        record.folder.mkdir(parents=True)
        config["task"]["name"], config["method"], config["seed"], config["bottleneck"] = task, method, seed, size // 100
        config["trainer"]["learning_rate"] = 1e-3 if method == "full" else 5e-4
        (record.folder / "config.yaml").write_text(yaml.safe_dump(config))
        logged: list[dict[str, Any]] = [
            *({"stage": "train", "step": step, "loss": 3 / step + index / 99} for step in range(1, steps + 1)),
            *({"stage": "train", "step": step, "eval_accuracy": 60.0 + step} for step in (steps // 2, steps)),
            {"stage": "train", "step": steps, "train_runtime": 1.0},
            {"stage": "train the head alone", "step": 1, "loss": 99.0},
        ]
        write_lines(record.folder / "metrics.jsonl", logged)
        words = ["positive", "negative"]
        write_predictions(
            record.folder,
            ({"index": i, "prediction": words[(i * index) % 2], "reference": words[i % 2]} for i in range(500)),
        )
        if index % 29 == 28:
            record.status, record.score = "failed", None
            record.error = Failure("OutOfMemoryError", "CUDA out of memory")
        record.save()


class Page(HTMLParser):
    """The elements of a page, and the text of its scripts, as a browser takes them apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data

    @property
    def content(self) -> Any:
        return json.loads(self.scripts[0])


def report(folder: Path, *words: str) -> Page:
    file = folder.parent / "new" / "report.html"
    assert main([str(folder), *words, "--out", str(file)]) == 0
    return Page(file.read_text(encoding="utf-8"))


def cells(content: Any, key: str) -> list[Any]:
    at = [column["key"] for column in content["columns"]].index(key)
    return [run["cells"][at] for run in content["runs"]]


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    make_runs(tmp_path / "outputs")
    return tmp_path / "outputs"


def test_all_runs_are_in_it_with_what_their_records_say(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = report(outputs).content
    assert capsys.readouterr().out.strip().endswith("report.html")
    records = {record.run: record for record in load_records(outputs)[0]}
    assert len(content["runs"]) == len(records) == 30
    for run, score, stored, seconds in zip(
        content["runs"], cells(content, "score"), cells(content, "stored"), cells(content, "time"), strict=True
    ):
        record = records[run["run"]]
        assert record.counts is not None
        assert (score, stored, seconds) == (record.score, record.counts.stored, record.timings["total_s"])
        assert len(run["axes"]) == len(record.axes) and run["folder"] == str(record.folder)
    assert {len(group) for group in content["runs"][0]["predictions"]} == {3}
    # what differs between the runs, and nothing else, with each run's own value
    keys, values = content["settings"]["keys"], content["settings"]["values"]
    assert sorted(keys) == ["bottleneck", "method", "task.name", "trainer.learning_rate"]
    at = keys.index("method")
    assert [values[at][run["settings"][at]] for run in content["runs"]] == [run["method"] for run in content["runs"]]


def test_groups_are_what_may_be_compared_and_delta_is_within_them(outputs: Path) -> None:
    content = report(outputs).content
    tasks = {(run["group"], task) for run, task in zip(content["runs"], cells(content, "task"), strict=True)}
    assert len(tasks) == 2 == len(content["groups"])
    assert all("accuracy on 500 test examples" in group for group in content["groups"])
    for group, _ in tasks:
        inside = [
            (run, score, delta)
            for run, score, delta in zip(content["runs"], cells(content, "score"), cells(content, "delta"), strict=True)
            if run["group"] == group and score is not None
        ]
        best = max(score for run, score, _ in inside if run["full"])
        assert [delta for *_, delta in inside] == pytest.approx([score - best for _, score, _ in inside])


def test_debug_runs_are_the_last_group_and_say_what_they_are(outputs: Path) -> None:
    """The page opens on the first group, whatever is larger."""
    for record in load_records(outputs)[0]:
        if record.task == "doctopic":
            record.debug = "smoke"
            record.save()
        elif record.seed == 1 and record.method == "lora":
            record.status, record.score = "interrupted", None
            record.save()
    content = report(outputs).content
    assert ["(debug=smoke)" in name for name in content["groups"]] == [False, True]
    assert "interrupted" in cells(content, "status")
    assert next(column for column in content["columns"] if column["key"] == "status")["shown"]


def test_filters_are_those_of_results(outputs: Path) -> None:
    content = report(outputs, "method=mam,lora", "task=sst2", "status=done").content
    assert {run["method"] for run in content["runs"]} == {"mam", "lora"}
    assert len(content["runs"]) == len(read_records([str(outputs), "method=mam,lora", "task=sst2", "status=done"]))
    with pytest.raises(UserError, match="did you mean lora"):
        report(outputs, "method=lroa")


def test_several_sets_and_their_average_are_columns(outputs: Path) -> None:
    for record in load_records(outputs / "sst2")[0]:
        further = {"a": 40.0, "b": 60.0} if record.status == "done" else {}
        record.scores |= {f"report_{name}": Score(name, 9, {record.metric: score}) for name, score in further.items()}
        record.save()
    content = report(outputs).content
    scores, averages = cells(content, "score"), cells(content, "average")
    for task, score, average, second in zip(cells(content, "task"), scores, averages, cells(content, "b"), strict=True):
        there = task == "sst2" and score is not None
        assert second == (60.0 if there else None)
        assert average == (pytest.approx((score + 100.0) / 3) if there else None)
    (column,) = (column for column in content["columns"] if column["key"] == "average")
    assert column["shown"] and column["better"] == "higher"


def test_it_needs_no_other_file(outputs: Path) -> None:
    page = report(outputs)
    sources = [value for _, attributes in page.elements for key in ("src", "href") if (value := attributes.get(key))]
    assert sources == ["data:,"]
    assert not any("http" in script for script in page.scripts[1:])
    (policy,) = [
        attributes["content"]
        for tag, attributes in page.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None and "default-src 'none'" in policy and "'sha256-" in policy
    assert [tag for tag, _ in page.elements].count("script") == 2
    # the only ways by which text could become HTML or code
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(", page.scripts[1])


def test_text_of_runs_stays_text(tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    record = start_record(replace(RUN, method=EVIL.replace("\ud800", "")), folder / "run", [f"method={EVIL}"])
    write_predictions(record.folder, [{"id": EVIL, "prediction": EVIL, "reference": EVIL * 50}])
    record.fail(RuntimeError(EVIL))
    page = report(folder)
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert "img" not in {tag for tag, _ in page.elements}
    (run,) = page.content["runs"]
    assert run["method"] == record.method and EVIL in run["error"] and run["overrides"] == [f"method={EVIL}"]
    ((name, reference, prediction),) = run["predictions"]
    assert name == prediction == EVIL
    assert reference.endswith(" …") and len(reference) == LONGEST + 2


def test_what_is_torn_is_named_and_left_out(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn, foreign = outputs / "sst2" / "torn" / "record.json", outputs / "x" / "record.json"
    for file, text in ((torn, '{"schema_version": 1, "run'), (foreign, '["of another program"]')):
        file.parent.mkdir()
        file.write_text(text)
    first = outputs / "doctopic" / "0000"
    (first / "predictions.jsonl").write_text(
        '5\n{"index": 1, "prediction": "a", "reference": "b"}\n{"other": 1}\n{"index": 2, "pre'
    )
    with (first / "metrics.jsonl").open("a") as lines:
        lines.write('[1]\n{"loss": 1}\n{"stage": "train", "step": "last", "loss": 1}\n{"stage": "tr')
    (outputs / "doctopic" / "0001" / "predictions.jsonl").unlink()
    binary, configs = outputs / "doctopic" / "0002", [outputs / "doctopic" / f"000{index}" for index in range(3)]
    for name in ("predictions.jsonl", "metrics.jsonl"):
        (binary / name).write_bytes(b"\xff\xfe\n")
    for place, text in zip(configs, (b"a: [1,", b"- 1", b"\xff\xfe\x00"), strict=True):
        (place / "config.yaml").write_bytes(text)
    content = report(outputs).content
    errors = capsys.readouterr().err
    assert f"{torn} is left out: it is incomplete" in errors and f"{foreign} is left out" in errors
    assert all(f"{place / 'config.yaml'} is left out: " in errors for place in configs)
    assert errors.count("\n") == 5
    runs = {run["folder"].rpartition("/")[2]: run for run in content["runs"]}
    assert len(runs) == 30 and runs["0000"]["predictions"] == [["1", "b", "a"]] and runs["0001"]["predictions"] == []
    assert runs["0000"]["curves"][0]["steps"] == list(range(1, 41))
    assert runs["0002"]["predictions"] == [] and runs["0002"]["curves"] == []


def test_curves_are_thinned_evenly_and_hold_the_last_step(tmp_path: Path) -> None:
    make_runs(tmp_path / "outputs", count=1, steps=250)
    (run,) = report(tmp_path / "outputs").content["runs"]
    loss, accuracy = run["curves"]
    assert list(loss["values"]) == ["loss"] and list(accuracy["values"]) == ["eval_accuracy"]
    assert len(loss["steps"]) <= POINTS and loss["steps"][-1] == 250
    assert {b - a for a, b in zip(loss["steps"], loss["steps"][1:], strict=False)} == {3}
    assert loss["values"]["loss"] == pytest.approx([3 / step for step in loss["steps"]], rel=1e-3)
    assert accuracy["values"]["eval_accuracy"] == [185.0, 310.0] and accuracy["steps"] == [125, 250]


def test_samples_can_be_left_out(tmp_path: Path) -> None:
    make_runs(tmp_path / "outputs", count=2)
    assert {len(run["predictions"]) for run in report(tmp_path / "outputs").content["runs"]} == {SAMPLES}
    private = report(tmp_path / "outputs", "--predictions", "0")
    assert {len(run["predictions"]) for run in private.content["runs"]} == {0}


def test_a_score_that_is_no_number_is_none(tmp_path: Path) -> None:
    make_runs(tmp_path / "outputs", count=2)
    file = tmp_path / "outputs" / "doctopic" / "0000" / "record.json"
    values = json.loads(file.read_text())
    values["score"] = math.nan
    file.write_text(json.dumps(values))
    content = report(tmp_path / "outputs").content
    assert sorted(score is None for score in cells(content, "score")) == [False, True]


def test_refusals(outputs: Path) -> None:
    for arguments, sentence in (
        (["--out", str(outputs)], "is a folder; give the name of a file"),
        (["--predictions", "-1"], "--predictions -1: it must be a whole number"),
    ):
        with pytest.raises(UserError, match=sentence):
            main([str(outputs), *arguments])
    with pytest.raises(UserError, match="is not a folder"):
        main([str(outputs / "nowhere")])
