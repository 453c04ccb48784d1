"""The picture of scores against costs: what is drawn, and that files come out whole."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from peftbench.cli.plot import main
from peftbench.records.record import Record, RecordedCounts, Score, load_records
from peftbench.tables.curves import draw_curves, list_curves, place_curves
from peftbench.tables.fields import FIELDS
from peftbench.tables.figure import COLOURS
from peftbench.tables.intervals import estimate_means
from peftbench.tables.plot import APART, draw_scores, list_marks, place_scores
from peftbench.tables.row import Row, group_seeds, make_rows
from peftbench.utils.errors import UserError, describe_os_error
from tests.tables.test_claims import make_row
from tests.tables.test_results import run
from tests.tables.test_table import saved

SIZES = {"lora": (1_000, 10_000), "mam": (3_000, 30_000)}


def runs(folder: Path = Path("outputs")) -> list[Record]:
    """Two methods at two sizes with two seeds, and full fine-tuning."""
    found = []
    for index, (method, sizes) in enumerate(SIZES.items()):
        for size in sizes:
            for seed in (1, 2):
                counts = RecordedCounts(backbone=100_000, trained=size, stored=size, head=0, paper=None)
                name = f"{method}-{size}"
                score = 60 + 5 * index + size / 10_000 + seed
                made = run(method, seed, score, folder / f"{name}-{seed}", counts=counts, point=name)
                found.append(made)
    return [*found, run("full", 1, 80.0, folder / "full")]


def drawn(rows: Sequence[Row], **options: Any) -> Figure:
    return draw_scores(place_scores(rows, **options))


def test_every_line_and_mark_is_where_the_records_say() -> None:
    figure = drawn(group_seeds(runs(), "mean"))
    (axes,) = figure.axes
    lines = {container.get_label(): container[0].get_xydata().tolist() for container in axes.containers}
    assert lines == {"lora": [[1000, 61.6], [10_000, 62.5]], "mam": [[3000, 66.8], [30_000, 69.5]]}
    others = {line.get_label(): line.get_ydata() for line in axes.get_lines() if not line.get_label().startswith("_")}
    assert list(others["full fine-tuning"]) == [80, 80]
    # LoRA's larger size is dearer than MAM's smaller one, and worse
    assert list(others["Pareto front"]) == [61.6, 66.8, 69.5]
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "accuracy"
    assert [word.get_text() for word in figure.legends[0].get_texts()] == [
        "full fine-tuning",
        "Pareto front",
        "lora",
        "mam",
    ]


def test_another_axis_and_other_lines() -> None:
    (axes,) = drawn(group_seeds(runs(), "mean"), x="percent", y="f1", by="functional_form").axes
    assert axes.get_xlabel() == "stored parameters, % of the backbone" and axes.get_ylabel() == "f1"
    assert {container.get_label() for container in axes.containers} == {"identity", "relu + softmax"}


def read_bars(figure: Figure, panel: int = 0) -> dict[str, list[tuple[float, float, float]]]:
    """By line: place, lower and upper end of each bar."""
    found = {}
    for container in figure.axes[panel].containers:
        (bars,) = container.lines[2]
        found[container.get_label()] = [(one[0][0], one[0][1], one[1][1]) for one in bars.get_segments()]
    return found


def test_bars_are_deviations_or_intervals(tmp_path: Path) -> None:
    rows = group_seeds(runs(tmp_path), "mean")
    rows[-1] = group_seeds(
        [replace(rows[-1].first, run=f"full{seed}", seed=seed, score=80.0 + seed) for seed in (1, 2)], "mean"
    )[0]
    ends = {key: (one.low, one.high) for key, one in estimate_means(rows, FIELDS["score"], True).items()}
    for interval, note in ((False, "bars: standard deviation over seeds"), (True, "bars: 95% interval of the mean")):
        figure = drawn(rows, interval=interval)
        (axes,) = figure.axes
        bars = [bar[1:] for line in read_bars(figure).values() for bar in line]
        spreads = [(row.score - row.spread(FIELDS["score"]), row.score + row.spread(FIELDS["score"])) for row in rows]
        expected = [ends[id(row)] for row in rows] if interval else spreads
        assert np.allclose(bars, expected[:4])
        (band,) = axes.patches  # of full fine-tuning
        box = band.get_extents().transformed(axes.transData.inverted())
        assert (box.y0, box.y1) == pytest.approx(expected[4])
        assert figure.legends[0].get_title().get_text().replace("\n", " ").startswith(note)
    assert "Student's t over 2 seeds" in figure.legends[0].get_title().get_text().replace("\n", " ")
    labels = [word.get_text() for word in figure.legends[0].get_texts()]
    assert labels == ["full fine-tuning", "lora", "mam"]  # a front of means would say more than the intervals


def test_panels_whose_bars_were_made_otherwise_are_told_apart(tmp_path: Path) -> None:
    """Of one of two tasks it is known what each example contributed."""
    make_row(tmp_path / "rte", [80, 82, 81.5], "lora", 2, task="rte")
    make_row(tmp_path / "sst2", [70, 71], "lora", 2, task="sst2", keep_examples=False)
    figure = drawn(group_seeds(load_records(tmp_path)[0], "mean"), interval=True)
    told = " ".join(figure.legends[0].get_title().get_text().split()).removeprefix("bars: ").split("; ")
    assert told == [
        "95% interval of the mean, a bootstrap over 3 seeds and the examples (rte with bart-mini)",
        "95% interval of the mean, Student's t over 2 seeds, for these examples only (sst2 with bart-mini)",
        "marks of one size stand side by side",
    ]


def test_no_bar_hides_another(tmp_path: Path) -> None:
    """Lines of one size stand around it, as far from each other as a bar is wide, in every panel."""
    alike = []
    for index, method in enumerate(("a", "b", "c")):
        for seed in (1, 2):
            for task in ("sst2", "rte"):
                of = run("lora", seed, 60.0 + index + seed, point=method + task, task=task)
                alike.append(replace(of, method=method))
    figure = drawn(group_seeds(alike, "mean"), interval=True, x="percent")
    figure.draw_without_rendering()
    points = 72 / figure.dpi
    for panel, axes in enumerate(figure.axes):
        to_points = axes.transData.transform
        places = [points * to_points((bars[0][0], 60))[0] for bars in read_bars(figure, panel).values()]
        assert places == sorted(places) and min(b - a for a, b in pairwise(places)) > 0.7 * APART
        assert fmean(places) == pytest.approx(points * to_points((1.0, 60))[0])
    marks = list_marks(place_scores(group_seeds(alike, "mean"), interval=True, x="percent"))
    assert {mark["percent"] for mark in marks} == {1.0}  # what is written to the file is not moved


def test_one_long_bar_leaves_room_for_the_others() -> None:
    wild = [run("mam", seed, score, point="wild") for seed, score in ((1, 60.0), (2, 90.0))]
    (axes,) = drawn(group_seeds([*runs()[:4], *wild], "mean"), interval=True).axes
    low, high = axes.get_ylim()
    assert high - low < 100 and low < 60 and high > 75  # the bar itself is 381 long


def test_panels_share_their_shares_and_their_colours() -> None:
    smaller = RecordedCounts(backbone=1_000_000, trained=1, stored=1_000, head=0, paper=None)
    there = [replace(run("mam", seed, 50.0 + seed, counts=smaller), task="sst2") for seed in (1, 2)]
    for x, shared in (("percent", True), ("stored", False)):
        one, other = drawn(group_seeds([*runs(), *there], "mean"), x=x).axes
        assert (one.get_xlim() == other.get_xlim()) is shared
    (first,) = (c for c in one.containers if c.get_label() == "mam")
    (second,) = other.containers
    assert first[0].get_color() == second[0].get_color() and second.get_label() == "mam"


def test_a_scale_that_panels_differ_in_is_no_other_line() -> None:
    """MAM's scale depends on the task; in one panel, two scales are two lines."""

    def rescale(record: Record, **changes: Any) -> Record:
        axes = [replace(record.axes[0], scale=2.0), *record.axes[1:]]
        return replace(record, axes=axes, point=f"{record.point} 2", **changes)

    elsewhere = [rescale(record, task="sst2") for record in runs() if record.method == "mam"]
    names = place_scores(group_seeds([*runs(), *elsewhere], "mean")).names
    assert names == ["lora", "mam"]
    here = [rescale(record) for record in runs() if record.method == "mam"]
    names = place_scores(group_seeds([*runs(), *here], "mean")).names
    assert names == ["lora", "mam · scaled 2 + gated", "mam · scaled 4 + gated"]


def test_titles_have_the_version_where_only_that_differs() -> None:
    other = [replace(record, model=replace(record.model, content="fedcba987654")) for record in runs()]
    titles = [panel.title for panel in place_scores(group_seeds(runs(), "mean")).panels]
    assert titles == ["doctopic with mini"]
    titles = [panel.title for panel in place_scores(group_seeds([*runs(), *other], "mean")).panels]
    assert titles == ["doctopic with mini@01234567", "doctopic with mini@fedcba98"]


@pytest.mark.parametrize(("panels", "lines"), [(3, 8), (2, 3), (3, 60)])
def test_the_legend_of_several_panels_is_whole(panels: int, lines: int) -> None:
    many = [
        replace(
            run("lora", seed, 50.0 + i + seed, point=str(i)), method=f"parallel_adapter_{i:02}", task=f"task{panel}"
        )
        for panel in range(panels)
        for i in range(lines)
        for seed in (1, 2)
    ]
    figure = drawn(group_seeds(many, "mean"), interval=True)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == lines
    assert box.y0 >= 0 and box.x0 >= 0 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
    for axes in figure.axes:
        panel = axes.get_tightbbox()
        assert panel.y0 >= box.y1 or panel.x1 <= box.x0  # below all panels, or next to them
        assert axes.get_window_extent().width > 2 * figure.dpi
    assert figure.get_figwidth() <= 9 or lines > 8  # not shrunk on a page, so that letters stay as large


def test_a_method_has_a_line_for_each_of_the_axes_it_was_tried_with() -> None:
    tried = []
    for index, place in enumerate(("ffn", "attention")):
        for record in (record for record in runs() if record.method == "lora"):
            axes = [replace(one, modified_representation=place) for one in record.axes]
            tried.append(replace(record, axes=axes, point=f"{record.point} {place}", score=record.score + 10 * index))
    (axes,) = drawn(group_seeds([*runs()[4:], *tried], "mean")).axes
    lines = {container.get_label(): container[0].get_xydata().tolist() for container in axes.containers}
    assert lines == {
        "lora · attention": [[1000, 71.6], [10_000, 72.5]],
        "lora · ffn": [[1000, 61.6], [10_000, 62.5]],
        "mam": [[3000, 66.8], [30_000, 69.5]],
    }


def test_what_may_not_be_compared_has_panels_of_its_own() -> None:
    other = run("lora", 1, 50.0, task="sst2")
    other.scores["report"] = Score("dev", 872, {"accuracy": 50.0, "mcc": 10.0})
    assert len(drawn(group_seeds([*runs(), other], "mean")).axes) == 2
    (axes,) = drawn(group_seeds([*runs(), other], "mean"), y="mcc").axes
    assert axes.get_title(loc="left").startswith("sst2")


def test_more_methods_than_colours_are_still_told_apart() -> None:
    many = [replace(run("lora", 1, 50.0 + i, point=str(i)), method=f"m{i:02}") for i in range(2 * len(COLOURS))]
    (axes,) = drawn(group_seeds(many, "mean")).axes
    looks = {(c[0].get_color(), c[0].get_marker(), c[0].get_linestyle()) for c in axes.containers}
    assert len(looks) == 2 * len(COLOURS)


@pytest.mark.parametrize("number", [3, 60])
def test_the_legend_is_whole(number: int) -> None:
    many = [replace(run("lora", 1, 50.0 + i, point=str(i)), method=f"method_{i:02}") for i in range(number)]
    figure = drawn(group_seeds(many, "mean"))
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    box, panel = legend.get_window_extent(), axes.get_window_extent()
    assert box.y0 >= 0 and box.x1 <= figure.bbox.x1 + 1 and len(legend.get_texts()) == number
    assert panel.x1 < box.x0 and panel.width > 3 * figure.dpi


def test_a_method_has_a_line_for_each_length_of_training() -> None:
    longer = [
        replace(record, point=f"long {record.point}", score=record.score + 10, trainer={"epochs": 12.0})
        for record in runs()
        if record.method == "lora"
    ]
    short = [replace(record, trainer={"epochs": 3.0, "learning_rate": record.score}) for record in runs()]
    short[4:8] = [replace(record, trainer={"epochs": 3.0, "max_steps": 500}) for record in short[4:8]]
    (axes,) = drawn(group_seeds([*short, *longer], "mean")).axes
    lines = {container.get_label(): container[0].get_xydata().tolist() for container in axes.containers}
    assert list(lines) == ["lora · 12 epochs", "lora · 3 epochs", "mam"]
    assert lines["lora · 12 epochs"] == [[1000, 71.6], [10_000, 72.5]]
    elsewhere = [replace(record, task="sst2", trainer={"epochs": 1.0}) for record in runs() if record.method == "mam"]
    names = [{c.get_label() for c in axes.containers} for axes in drawn(group_seeds([*short, *elsewhere], "mean")).axes]
    assert names == [{"lora", "mam"}, {"mam"}]


def test_a_line_joins_runs_of_one_training_set_and_selection_split() -> None:
    def on(split: str, examples: int, points: str) -> list[Record]:
        splits = {"train": {"examples": examples}, "selection": {"split": split}}
        made = [record for record in runs() if record.method == "lora"]
        return [replace(one, point=f"{points} {one.point}", data={"splits": splits}) for one in made]

    for other, expected in (
        (on("held_out", 900, "b"), ["lora · 1,000 examples", "lora · 900 examples"]),
        (on("held_out", 1000, "b"), ["lora · chosen on held_out", "lora · chosen on validation"]),
        (on("validation", 1000, "a"), ["lora"]),
    ):
        (axes,) = drawn(group_seeds([*on("validation", 1000, "a"), *other], "mean")).axes
        assert [container.get_label() for container in axes.containers] == expected


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for made in runs(tmp_path / "outputs"):
        saved(made)
    png, svg = tmp_path / "new" / "a.png", tmp_path / "new" / "a.svg"
    assert main([str(tmp_path / "outputs"), "--out", str(png), "--out", str(svg)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000
    text = svg.read_text()
    assert all(f">{word}</text>" in text for word in ("lora", "mam", "full fine-tuning", "stored parameters", "2K"))
    assert capsys.readouterr().out.split() == [str(png), str(svg)]
    (marks,) = map(json.loads, re.findall(r"<dc:description>(.*?)</dc:description>", text, re.DOTALL))
    panel = {"panel": "doctopic with mini"}
    assert marks[0] == panel | {"line": "full fine-tuning", "stored": 100_000.0, "score": 80.0}
    assert marks[1] == panel | {"line": "lora", "stored": 1000.0, "score": 61.6, "low": 60.8929, "high": 62.3071}
    assert main([str(tmp_path / "outputs"), "--out", str(svg)]) == 0
    assert svg.read_text() == text  # the same data make the same file
    for arguments, sentence in (
        (["--out", "a.gif"], "the extension must be one of .png, .svg, .pdf"),
        (["--y", "accurcy"], "accurcy is not a column; did you mean accuracy"),
        (["--by", "methd"], "methd is not a column; did you mean method"),
        (["--x", "memory"], "None of these runs has both memory and score"),
        (["--interval", "--statistic", "median"], "--interval is that of a mean score; leave --statistic median out."),
        (["--interval", "--curves"], "--interval is for scores, and --curves draws each run over its steps"),
        (["--curves", "--x", "percent"], "--x is for scores, and --curves draws each run over its steps"),
        (["--curves", "--statistic", "mean"], "--statistic is for scores, and --curves draws each run"),
    ):
        with pytest.raises(UserError, match=sentence):
            main([str(tmp_path / "outputs"), *arguments])


def test_a_picture_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for made in runs(tmp_path / "outputs"):
        saved(made)

    def full(self: Figure, file: Path, **settings: object) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.png").write_bytes(b"whole")
    monkeypatch.setattr(Figure, "savefig", full)
    for name in ("a.png", "b.png"):
        with pytest.raises(OSError) as error:
            main([str(tmp_path / "outputs"), "--out", str(tmp_path / name)])
        assert describe_os_error(error.value) == f"{tmp_path / name}: No space left on device."
    assert [(file.name, file.read_bytes()) for file in tmp_path.glob("*.*")] == [("a.png", b"whole")]


def test_curves(tmp_path: Path) -> None:
    records = [run("lora", seed, folder=tmp_path / f"lora-{seed}") for seed in (1, 2)]
    records.append(run("mam", 1, folder=tmp_path / "mam"))
    for record in records:
        record.folder.mkdir()
        lines = [{"stage": "train x", "step": step, "loss": 10 / step} for step in (1, 2)]
        lines += [{"stage": "train x", "step": 2, "eval_accuracy": 50.0}]
        lines += [{"stage": "train the head alone", "step": step, "loss": 99.0} for step in (1, 2)]
        (record.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "tr')
    figure = draw_curves(place_curves(make_rows(records)))
    (axes,) = figure.axes
    assert [line.get_xydata().tolist() for line in axes.get_lines()] == [[[1, 10], [2, 5]]] * 3
    assert [word.get_text() for word in figure.legends[0].get_texts()] == ["lora", "mam"]
    (axes,) = draw_curves(place_curves(make_rows(records), y="eval_accuracy", by="seed")).axes
    assert [line.get_label() for line in axes.get_lines()] == ["1", "1", "2"]
    with pytest.raises(UserError, match="--y=los is unknown; did you mean loss"):
        place_curves(make_rows(records), y="los")
    with pytest.raises(UserError, match="has logged anything"):
        place_curves(make_rows([run("lora", 1, folder=tmp_path)]))


def test_looks_at_the_selection_split_by_the_metric_of_each_task(tmp_path: Path) -> None:
    records = [run(name, 1, folder=tmp_path / str(place)) for place, name in enumerate(("lora", "lora", "mam", "full"))]
    records[1].axes = [replace(records[1].axes[0], modified_representation="attention")]
    records[2].task, records[2].metric = "webnlg", "bleu"
    for record in records:
        saved(record)
        look = {"stage": "train x", "step": 2, f"eval_{record.metric}": 50.5, "eval_other": 1.0}
        lines = [{"stage": "train x", "step": 1, "loss": 3.0}, *([] if record.method == "full" else [look])]
        (record.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    curves = place_curves(make_rows(records), y="selection")
    labels = sorted(axes.get_ylabel() for axes in draw_curves(curves).axes if axes.get_title(loc="left"))
    assert labels == ["accuracy on the selection split", "bleu on the selection split"]
    points = list_curves(curves)
    assert sorted(one["line"] for one in points) == ["lora · attention", "lora · query_value", "mam"]
    assert [(one["step"], one["selection"]) for one in points] == [([2], [50.5])] * 3
    assert main([str(tmp_path), "--curves", "--out", str(tmp_path / "a.svg")]) == 0
    assert "lora · attention" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="--y=selections is unknown; did you mean selection"):
        place_curves(make_rows(records), y="selections")


def test_logged_values_that_are_no_numbers_are_gaps(tmp_path: Path) -> None:
    """A text would make matplotlib draw categories, and a half surrogate pair end it."""
    record = run("lora", 1, folder=tmp_path)
    values = [3.0, "\ud800", None, [1], 10, True]
    lines = [{"stage": "train x", "step": step, "loss": value} for step, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (axes,) = draw_curves(place_curves(make_rows([record]))).axes
    drawn = [value if value == value else None for value in axes.get_lines()[0].get_ydata().tolist()]
    assert drawn == [3.0, None, None, None, 10.0, None]
