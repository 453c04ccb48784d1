"""docs/reproduction.md, README.md and its picture show what the records say; the records are small."""

from __future__ import annotations

import html
import importlib
import json
import re
import shutil
import statistics
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from peftbench.cli.claims import main as claims
from peftbench.records.choice import compute_objective
from peftbench.records.record import Record, load_records
from peftbench.tables.claims import CellFindings, Finding, count_seeds_needed, judge_records, read_claims
from peftbench.tables.plot import list_marks, place_scores
from peftbench.tables.row import Row, group_seeds, is_trial
from peftbench.tables.searches import StudyFinding, find_studies
from peftbench.tables.select import read_records, select_records
from tests.tables.test_searches import make_all

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "outputs" / "reference" / "reproduction"
BY_CATEGORY = FOLDER.with_name("by_category")
MOST_BYTES = 25_000_000


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`python scripts/claims_page.py`, which brings all of it up to date."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("claims_page")


def test_the_page_is_up_to_date(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.write_page(page)
    with pytest.raises(ValueError, match="lacks the line"):
        script.replace_part(page.replace(script.END, ""), script.BEGIN, "")


def test_the_readme_is_up_to_date(script: ModuleType) -> None:
    readme = script.README.read_text(encoding="utf-8")
    assert readme == script.write_readme(readme)


def read_marks(picture: Path) -> list[dict[str, Any]]:
    """What a picture shows, as its file says; the drawing itself differs by the version of matplotlib."""
    text = picture.read_text(encoding="utf-8")
    (marks,) = re.findall(r"<dc:description>(.*?)</dc:description>", text, re.DOTALL)
    found: list[dict[str, Any]] = json.loads(html.unescape(marks))
    return found


def test_the_picture_is_up_to_date(script: ModuleType) -> None:
    records = read_records([*script.find_cells(script.RECORDS), *script.ROWS])
    expected = list_marks(place_scores(group_seeds(records, "mean"), x="percent", interval=True))
    shown = read_marks(script.PICTURE)
    assert f"]({script.PICTURE.relative_to(ROOT)})" in script.README.read_text(encoding="utf-8")
    assert len(shown) == len(expected)
    for one, other in zip(shown, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(one[key] == pytest.approx(other[key], rel=1e-5) for key in one if key not in ("panel", "line"))
        assert (one["panel"], one["line"]) == (other["panel"], other["line"])


def test_the_picture_of_the_curves_is_up_to_date(script: ModuleType, tmp_path: Path) -> None:
    script.draw_looks(tmp_path / "curves.svg")
    shown, expected = read_marks(script.CURVES), read_marks(tmp_path / "curves.svg")
    assert shown == expected and len({one["panel"] for one in shown}) == len(script.CELLS)
    assert f"]({script.CURVES.relative_to(ROOT / 'docs')})" in script.PAGE.read_text(encoding="utf-8")


def copy_cell(folder: Path, model: str, rows: tuple[str, ...]) -> None:
    """Copy the records of SST-2 of which the typed row begins so, as those of WebNLG with a backbone."""
    for file in FOLDER.glob("sst2/minilm-l6/*/*/record.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["seed"] in (1, 2, 42) and any(word.startswith(rows) for word in record["overrides"]):
            record |= {"task": "webnlg", "model": {**record["model"], "name": model}, "metric": "bleu"}
            record["score"] -= 10
            record["scores"]["report"]["metrics"] = {"bleu": record["score"]}
            made = folder / f"{model}-{record['run']}"
            made.mkdir(parents=True)
            (made / "record.json").write_text(json.dumps(record | {"run": made.name}), encoding="utf-8")


@pytest.mark.slow  # test_the_readme_is_up_to_date is the short form
def test_cells_are_shown_as_they_come(script: ModuleType, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "sst2" / "minilm-l6", tmp_path / "reproduction" / "sst2" / "minilm-l6")
    for file in list(tmp_path.rglob("record.json")):  # the same seeds in all rows and cells
        if json.loads(file.read_text(encoding="utf-8"))["seed"] not in (1, 2, 42):
            shutil.rmtree(file.parent)
    copy_cell(tmp_path / "reproduction" / "webnlg" / "bart-mini", "bart-mini", ("row=pa_ffn_200", "row=sa_ffn_200"))
    copy_cell(tmp_path / "reproduction" / "webnlg" / "smollm2-135m", "smollm2-135m", ("row=",))
    *table, _, below = script.write_scores(tmp_path).splitlines()
    head, _, *lines = (line.strip("| ").split(" | ") for line in table)
    names = list(script.CELLS.values())
    assert head == ["stored", "method", "at", f"{names[0]} accuracy", f"{names[1]} BLEU", f"{names[2]} BLEU"]
    assert len(lines) == 9
    known = {tuple(line[:3]): line[3:] for line in lines}
    records = [
        one for one in load_records(FOLDER / "sst2" / "minilm-l6")[0] if not is_trial(one) and one.seed in (1, 2, 42)
    ]
    rows = group_seeds(records, "mean")
    two = [row for row in rows if (row.first.method, row.first.budget) == ("adapter", "2%")]
    (row,) = (row for row in two if row.first.axes[0].modified_representation == "ffn")
    assert row.score is not None
    expected = [f"{row.score:.2f}", f"{row.score - 10:.2f}", f"{row.score - 10:.2f}"]
    assert [cell.partition(" ")[0] for cell in known["2%", "adapter", "ffn"]] == expected
    assert known["6.7%", "mam", "ffn + heads"][1] == ""
    drawn, students = "a bootstrap over 3 seeds and the examples", "Student's t over 3 seeds, for these examples only"
    ways = "; ".join(f"{drawn if name is names[0] else students} ({name})" for name in names)  # copies have no examples
    heads = [f"{name} {metric}" for name, metric in zip(names, ("accuracy", "BLEU", "BLEU"), strict=True)]
    for name, head in zip(names, heads, strict=True):
        below = below.replace(head, name)
    assert below == f"± is half the 95% interval of the mean: {ways}."
    verdicts = [line.strip("| ").split(" | ") for line in script.write_verdicts(tmp_path).splitlines()]
    assert verdicts[0] == ["claim", *script.CELLS.values()]
    assert verdicts[6][2:] == ["not tested", verdicts[6][3]] and verdicts[6][3].startswith("not confirmed: -10.36")
    assert verdicts[-1] == [f"Intervals: {ways}."]
    script.draw_picture(tmp_path / "scores.svg", tmp_path)
    counts = Counter(mark["panel"] for mark in read_marks(tmp_path / "scores.svg"))
    assert counts == {"sst2 with minilm-l6": 9, "webnlg with bart-mini": 3, "webnlg with smollm2-135m": 9}


def test_a_search_that_was_not_run_is_said_to_be_missing(tmp_path: Path, script: ModuleType) -> None:
    task, model, budget = script.PLANNED[1]
    make_all(tmp_path, [80, 81], [60, 61], [70, 71])
    for file in tmp_path.rglob("record.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        record |= {"task": task, "model": {**record["model"], "name": model}, "budget": budget}
        file.write_text(json.dumps(record), encoding="utf-8")
    told = script.write_searches(tmp_path)
    assert told.count("not run yet") == 3 and f"### {task} with {model} under budget={budget}: 2 trials" in told
    assert f"- {task} with {model} under budget={budget}: not run yet." not in told
    for file in tmp_path.rglob("record.json"):
        file.write_text(file.read_text(encoding="utf-8").replace('"study": "77aa"', '"study": null'), encoding="utf-8")
    assert script.write_searches(tmp_path).count("not run yet") == 4


def test_the_page_has_each_claim_as_the_data_has_it() -> None:
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    for claim in read_claims()[0]:
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {claim.says} ("))
        assert claim.source.partition(" and")[0].partition(",")[0] in line and line.endswith(f"| {claim.claimed} |")


@cache
def judge_cell(folder: str) -> CellFindings:
    """Return the findings of the records in a folder of one cell."""
    (cell,) = (one for one in judge_records(load_records(FOLDER / folder)[0], 2000) if one.findings)
    return cell


def read_section(title: str) -> str:
    """Return the words below a title of the page."""
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    return " ".join(page.split(f"### {title}\n")[1].split("\n### ")[0].split())


def test_the_prose_on_sst2_says_what_the_records_say() -> None:
    """Its numbers, in their order. The tables beside it are compared with the records above."""
    prose = read_section("SST-2 with MiniLM, all steps")
    records = [
        one
        for one in load_records(FOLDER / "sst2" / "minilm-l6")[0]
        if any(word.startswith("row=") for word in one.overrides)
    ]
    rows = group_seeds([one for one in records if not is_trial(one)], "mean")
    trials = len(records) - sum(len(row.scored) for row in rows)
    assert f"{len(rows)} rows, {len(records) - trials} runs and {trials} further trials of 3,600 steps each" in prose
    assert {one.steps for one in records} == {3600}

    pairs = {one.claim.name: one.comparisons for one in judge_cell("sst2/minilm-l6").findings}
    behind = {
        name: [-estimate.difference for one, estimate in pairs["heads"] if one.pair[0] == name]
        for name in ("prefix", "mh_pa")
    }
    assert f"prefix tuning is {min(behind['prefix']):.1f} to {max(behind['prefix']):.1f} points behind" in prose
    assert f"between {max(behind['mh_pa']):.1f} points behind and {-min(behind['mh_pa']):.1f} ahead" in prose
    assert {row.is_at_edge for row in rows if row.first.method == "mh_parallel_adapter" and is_small(row)} == {True}
    (small,) = (row for row in rows if row.first.method == "prefix" and row.first.budget == "0.1%")
    unlearned = [one for one in small.scored if one.score is not None and one.score < one.baselines["majority"] + 0.5]
    assert (len(unlearned), len(small.scored)) == (1, 5) and "one of its five seeds learned nothing" in prose
    widths = [one.high - one.low for name in ("insertion", "ffn", "scaling") for _, one in pairs[name]]
    assert f"the interval of one pair is about {statistics.median(widths) / 2:.1f} points to either side" in prose

    full = max(row.score for row in rows if row.first.method == "full")
    scores = [row.score for row in rows if row.first.budget == "2%"]
    near = sum(score > full - 1.5 for score in scores)
    assert f"of {len(scores)} rows that store 2%, {near} are within 1.5 points of full" in prose
    assert f"full fine-tuning ({full:.2f})" in prose
    best = max((row for row in rows if row.first.budget == "2%"), key=lambda row: row.score)
    assert best.first.axes[0].scale == 1 and f"the parallel adapter with a learned scale ({best.score:.2f})" in prose

    (unstable,) = (row for row in rows if row.first.method == "prefix" and row.first.budget == "6.7%")
    collapsed = ", ".join(f"{score:.1f}" for score in sorted((one.score for one in unstable.scored), reverse=True))
    assert f"at 6.7%**: {collapsed.rpartition(', ')[0]} and {collapsed.rpartition(', ')[2]} with one rate" in prose

    places = Counter(_place_rate(row.first) for row in rows)
    assert (
        f"{places[2]} keep their preset's rate, {places[3]} take three times as much, {places[4]} the highest" in prose
    )
    assert f"{places[1]} less than the preset's, and none the lowest. The {places[4]} are" in prose and not places[0]


def is_small(row: Row) -> bool:
    """Whether a row has one of the two sizes at which heads are claimed to be best."""
    return row.first.budget in ("0.1%", "0.5%")


def test_the_prose_on_webnlg_with_bart_says_what_the_records_say() -> None:
    steps = "`insertion`, `mam`, `heads`, `saturation` and `scaling`"
    prose = read_section(f"WebNLG with a BART of 23M parameters, the steps {steps}")
    records = load_records(FOLDER / "webnlg" / "bart-mini")[0]
    rows = group_seeds([one for one in records if not is_trial(one)], "mean")
    runs = sum(len(row.scored) for row in rows)
    assert f"{len(rows)} rows, {runs} runs and {len(records) - runs} further trials of 3,396 steps each" in prose
    assert {one.steps for one in records} == {3396}
    large = {row.first.method: row for row in rows if row.first.budget not in ("2%", "0.1%")}
    mam, full, plain, scaled = (large[name] for name in ("mam", "full", "parallel_adapter", "scaled_parallel_adapter"))
    assert f"{mam.score:.1f} BLEU, where full fine-tuning has {full.score:.1f}" in prose
    assert f"the plain parallel adapter of 6.7% has {plain.score:.1f}" in prose

    seen, unseen = (_compare_groups(records, group) for group in ("seen", "unseen"))
    assert f"On the seen categories MAM is {-seen['mam_full']:.1f} BLEU behind full fine-tuning" in prose
    assert f"on the unseen ones it is {unseen['mam_full']:.1f} ahead" in prose
    assert f"Parallel adapters lead by {seen['insertion']:.1f} BLEU on the seen ones" in prose
    assert f"and are {-unseen['insertion']:.1f} behind on the unseen ones" in prose
    scores = [_average_groups(records, group) for group in ("seen", "unseen")]
    assert "({:.1f} and {:.1f}); on".format(*(scores[0][name] for name in ("mam", "full"))) in prose
    assert "({:.1f} and {:.1f}), as are".format(*(scores[1][name] for name in ("mam", "full"))) in prose
    behind = [name for name, score in scores[1].items() if score < scores[1]["full"]]
    assert len(scores[1]) == 7 and behind == ["prefix"] and "all other rows of 6.7% but prefix tuning" in prose
    (known,) = {tuple(one.data["groups"]["seen"]) for one in records if "groups" in one.data}
    (examples,) = {one.scores["report"].examples for one in select_records(plain_runs(records), ["group=unseen"])}
    assert f"Of its 1,862 examples, {examples} are of five categories" in prose and len(known) == 10

    unscaled_at, scaled_at = (dict(list_trials(row, records)) for row in (plain, scaled))
    assert f"from {unscaled_at[5e-4]:.1f} to {scaled_at[5e-4]:.1f} BLEU (seed 42)" in prose
    assert {row.first.search.chosen["trainer.learning_rate"] for row in (plain, scaled) if row.first.search} == {1.5e-3}
    assert f"s = 1 has {unscaled_at[1.5e-3]:.1f} and s = 4 has {scaled_at[1.5e-3]:.1f}" in prose

    pairs = {one.claim.name: one.comparisons for one in judge_cell("webnlg/bart-mini").findings}
    scaling = {(pair.pair[0], pair.a.first.budget): one.difference for pair, one in pairs["scaling"]}
    told = "s = 4 is {:.1f} BLEU behind for that adapter, {:.1f} ahead for the one of 2%, and {:.1f} behind for LoRA"
    differences = -scaling["scaled_pa_ffn", "6.7%"], scaling["scaled_pa_ffn", "2%"], -scaling["lora_ffn", "2%"]
    assert len(scaling) == 3 and told.format(*differences) in prose
    places = {(pair.a.first.method, pair.a.first.budget): one.difference for pair, one in pairs["ffn"]}
    told = (
        "ahead of the one at the attention with 2%, and {:.1f} with 6.7%. The sequential one is {:.1f} ahead with 2%."
    )
    assert len(places) == 3 and f"FFN is {places['parallel_adapter', '2%']:.1f} BLEU ahead" in prose
    assert told.format(places["parallel_adapter", "6.7%"], places["adapter", "2%"]) in prose

    of = {
        (row.first.method, row.first.budget): row.score for row in rows if row.first.axes[:1] and row.score is not None
    }
    prefixes = [of["prefix", budget] for budget in ("0.1%", "2%", "6.7%")]
    assert "it has {:.1f} BLEU with 0.1%, {:.1f} with 2% and {:.1f} with 6.7%.".format(*prefixes) in prose
    beside = [of["parallel_adapter_attention", budget] for budget in ("2%", "6.7%")]
    assert "at the attention has {:.1f} with 2% and {:.1f} with 6.7%.".format(*beside) in prose
    told = "From 2 to 6.7% the prefix gains {:.1f} BLEU on the seen categories, and loses {:.1f} on the unseen ones."
    assert told.format(seen["prefix"], -unseen["prefix"]) in prose
    told = "has {:.1f} BLEU, LoRA at query and value {:.1f}, and the multi-head parallel adapter {:.1f}. The adapters"
    told = (
        f"With 0.1%, heads are no better than LoRA**: prefix tuning {told} at the attention have {{:.1f}} and {{:.1f}},"
    )
    methods = ("prefix", "lora", "mh_parallel_adapter", "adapter", "parallel_adapter_attention")
    assert told.format(*(of[method, "0.1%"] for method in methods)) in prose
    small = {row.first.method: row.first.counts.percent["stored"] for row in rows if row.first.budget == "0.1%"}
    assert {f"{small[method]:.2f}" for method in methods[3:]} == {"0.07"} and "smallest size is 0.07%" in prose
    found = {one.claim.name: one.verdict for one in judge_cell("webnlg/bart-mini").findings}
    assert found["prefix"] == "contradicted" and found["heads"] == "not confirmed"

    assert not any(row.is_at_edge for row in rows)
    small = [row for row in rows if row.first.budget == "2%" and row.first.axes[0].composition_function == "add"]
    beyond = [_find_loss_beyond(row) for row in small]
    assert len(small) == 4 and f"worse by {min(beyond):.1f} to {max(beyond):.1f} BLEU on the dev split" in prose

    lower = [_find_gain_below(row, records) for row in (full, mam, scaled)]
    assert "would have had {:.1f}, {:.1f} and {:.1f} BLEU more".format(*lower) in prose


def test_the_prose_on_webnlg_with_smollm2_says_what_the_records_say() -> None:
    prose = read_section("WebNLG with SmolLM2-135M, the steps `insertion` and `mam`")
    everything = load_records(FOLDER / "webnlg" / "smollm2-135m")[0]
    records = [one for one in everything if any(word.startswith("row=") for word in one.overrides)]
    points = [one for one in everything if one.study is not None]
    searched = [one for one in everything if one not in records and one not in points]
    named = len(plain_runs(searched))
    assert not any(one.studies for one in searched)
    assert f"axes, {named} runs and {len(searched) - named} trials of the named methods are trained, and" in prose
    tried = [one for one in points if one.seed == 42]
    assert f"and {len(tried)} points so far" in prose
    runs = plain_runs(records)
    rows = group_seeds(runs, "mean")
    assert f"{len(rows)} rows, {len(runs)} runs and {len(records) - len(runs)} further trials of 1,132 steps" in prose
    compiled = Counter(one.trainer["compile"] for one in runs)
    pruned = [one for one in points if one.search.pruned]
    assert {one.steps for one in everything if one not in pruned} == {1132}
    assert compiled["layers"] > compiled["none"] > 0

    of = {_name_place(row): row.score for row in group_seeds(plain_runs(everything), "mean")}
    four = sorted(of[name, at, "2%"] for name, at in ADAPTERS)
    assert f"the four adapters have between {four[0]:.1f} and {four[-1]:.1f} BLEU" in prose
    told = "the scaled parallel adapter has {:.1f} and LoRA at query and value {:.1f}."
    assert told.format(of["scaled_parallel_adapter", "ffn", "2%"], of["lora", "query_value", "2%"]) in prose
    gains = [
        of[name, "ffn", "6.7%"] - of[name, "ffn", "2%"] for name in ("parallel_adapter", "scaled_parallel_adapter")
    ]
    assert "the parallel adapter gains {:.1f} BLEU, and the scaled one {:.1f}.".format(*gains) in prose
    small = {_name_place(row)[:2]: row.first.search for row in rows if row.first.budget == "2%"}
    heads, lora = ({one.seed: one for one in plain_runs(searched) if _is_small(one, m)} for m in ("prefix", "lora"))
    assert heads.keys() == lora.keys() == {1, 2, 3}
    means = [statistics.mean(one.score for one in of_seed.values()) for of_seed in (heads, lora)]
    assert "prefix tuning has {:.1f} BLEU, and LoRA at query and value {:.1f}".format(*means) in prose
    groups = [_average_groups([*heads.values(), *lora.values()], group, "0.5%") for group in ("seen", "unseen")]
    behind, ahead = groups[0]["lora"] - groups[0]["prefix"], groups[1]["prefix"] - groups[1]["lora"]
    assert (
        f"Prefix tuning is {behind:.1f} behind on the seen categories, and {ahead:.1f} ahead on the unseen ones"
        in prose
    )
    found = {one.claim.name: one for one in judge_cell("webnlg/smollm2-135m").findings}
    assert found["heads"].verdict == "contradicted"
    tried = [{one.settings["trainer.learning_rate"]: one.value for one in small[key].trials} for key in ADAPTERS]
    best = [max(rates, key=lambda rate: rates[rate]) / 5e-4 for rates in tried]
    assert best == pytest.approx([3, 10, 30, 30])
    assert "with 30 times their preset's rate, the sequential ones with 3 and 10 times" in prose
    behind = sorted(tried[place][5e-4] - tried[place + 2][5e-4] for place in (0, 1))
    assert "parallel adapters are {:.1f} and {:.1f} BLEU behind".format(*behind) in prose

    seen, unseen = (_average_groups(records, group) for group in ("seen", "unseen"))
    assert len(seen) == len(unseen) == 5
    names = ("lora_ffn", "full", "mam", "scaled_parallel_adapter", "parallel_adapter")
    told = "LoRA has {:.1f} BLEU, full fine-tuning {:.1f}, MAM {:.1f}, the scaled parallel adapter {:.1f} and the plain"
    assert f"{told} one {{:.1f}}".format(*(seen[name] for name in names)) in prose
    names = ("full", "mam", "parallel_adapter", "scaled_parallel_adapter", "lora_ffn")
    told = "it has {:.1f} BLEU, MAM {:.1f}, the plain parallel adapter {:.1f}, the scaled one {:.1f} and LoRA {:.1f}"
    assert told.format(*(unseen[name] for name in names)) in prose
    cut = {row.first.method: [100 * one.cut_off["report"] for one in row.scored] for row in rows}
    assert round(statistics.mean(cut.pop("full"))) == 3 and "3% run into the longest length" in prose
    assert max(share for shares in cut.values() for share in shares) < 1

    tried = {name: {_get_rate(one): one for one in records if one.method == name and one.seed == 42} for name in names}
    preset, adapted = tried["full"][5e-5], tried["mam"][5e-4]
    (chosen,) = (one for one in runs if one.method == "full" and one.seed == 42)
    assert _get_rate(chosen) == pytest.approx(10 * _get_rate(preset))
    assert f"has {chosen.selection.value:.1f} BLEU there, and {chosen.score:.1f} on the test set" in prose
    told = "it has {:.1f} and {:.1f}, where MAM with its own preset's rate has {:.1f} and {:.1f} (seed 42)"
    values = preset.selection.value, preset.score, adapted.selection.value, adapted.score
    assert told.format(*values) in prose


def _is_small(record: Record, method: str) -> bool:
    return record.method == method and record.budget == "0.5%"


# The rows of the step `insertion`: the method and where it is.
ADAPTERS = (
    *(("adapter", "ffn"), ("adapter", "attention")),
    *(("parallel_adapter", "ffn"), ("parallel_adapter_attention", "attention")),
)


def _name_place(row: Row) -> tuple[str, str | None, str | None]:
    """Return the method of a row, where it is, and its share of the backbone."""
    axes = row.first.axes
    return row.first.method, axes[0].modified_representation if axes else None, row.first.budget


def read_insertion(title: str, folder: str) -> tuple[str, dict[tuple[str, str], float], dict[str, Finding]]:
    """Return the prose of a cell that has the step `insertion` alone, its scores, and its findings by claim."""
    prose, records = read_section(title), load_records(FOLDER / folder)[0]
    runs = plain_runs(records)
    rows = {_name_place(row)[:2]: row.score for row in group_seeds(runs, "mean")}
    assert {*rows} == {*ADAPTERS} and {len(row.scored) for row in group_seeds(runs, "mean")} == {3}
    assert f"4 rows, {len(runs)} runs and {len(records) - len(runs)} further trials of {records[0].steps:,}" in prose
    return prose, rows, {one.claim.name: one for one in judge_cell(folder).findings}


def test_the_prose_on_untrained_categories_says_what_the_records_say() -> None:
    title = "WebNLG with SmolLM2-135M, rates that untrained categories chose"
    prose, records = read_section(title), load_records(BY_CATEGORY)[0]
    runs = plain_runs(records)
    rows = group_seeds(runs, "mean")
    assert {one.steps for one in records} == {1132} and {one.trainer["compile"] for one in records} == {"layers"}
    assert f"{len(rows)} rows, {len(runs)} runs and {len(records) - len(runs)} further trials of 1,132 steps" in prose
    assert {row.first.method: len(row.scored) for row in rows if len(row.scored) < 3} == {
        "lora_ffn": 2,
        "parallel_adapter": 2,
    }
    (dealt,) = {json.dumps(one.data["splits"]["selection"]) for one in records}
    assert json.loads(dealt)["of"] == 552 and "of the training file, 552 of its 6,940 rows" in prose
    (seen,) = {tuple(one.data["groups"]["seen"]) for one in records}
    assert len(seen) == 8 and "So eight categories are seen, and seven are not." in prose

    before = {
        row.first.method: row
        for row in group_seeds(plain_runs(load_records(FOLDER / "webnlg" / "smollm2-135m")[0]), "mean")
        if any(word.startswith("row=") for word in row.first.overrides) and row.first.budget in (None, "6.7%")
    }
    of = {row.first.method: row.score for row in rows}
    assert f"{of['full']:.1f} BLEU on the whole test set, in place of {before['full'].score:.1f}." in prose
    (rate,) = {_get_rate(one) for one in runs if one.method == "full"}
    assert (rate, _get_rate(before["full"].first)) == pytest.approx((0.3 * 5e-5, 10 * 5e-5))
    page = " ".join((ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8").split())
    assert f"To full fine-tuning that was worth {of['full'] - before['full'].score:.1f} BLEU [above]" in page
    changes = [abs(of[name] - before[name].score) for name in of if name != "full"]
    assert f"No other row changes by more than {max(changes):.1f} BLEU." in prose

    found = {one.claim.name: one for one in _judge_one(runs).findings}
    by_group = [{one.claim.name: one for one in _judge_one(runs, group).findings} for group in ("seen", "unseen")]
    cells = [found, *by_group]
    assert [one["mam_full"].verdict for one in cells] == ["confirmed"] * 3
    told = "it is {:.1f} BLEU ahead, {:.1f} on the seen categories and {:.1f} on the unseen ones."
    assert told.format(*(one["mam_full"].estimate.difference for one in cells)) in prose
    assert [one["mam_best"].verdict for one in cells] == ["confirmed", "contradicted", "confirmed"]
    told = "it has {:.1f} BLEU, the plain parallel adapter {:.1f}, the scaled one {:.1f} and LoRA {:.1f}."
    names = ("mam", "parallel_adapter", "scaled_parallel_adapter", "lora_ffn")
    assert told.format(*(of[name] for name in names)) in prose
    leads = [estimate.difference for _, estimate in by_group[1]["mam_best"].comparisons]
    assert f"Its lead is on the unseen categories, by {min(leads):.1f} to {max(leads):.1f} BLEU." in prose
    (closest, behind), *others = by_group[0]["mam_best"].comparisons
    assert closest.pair[1] == "scaled_pa_ffn" and all(estimate.high > 0 for _, estimate in others)
    assert f"the scaled parallel adapter is {-behind.difference:.1f} ahead of it, by more than chance." in prose


def _judge_one(runs: list[Record], group: str | None = None) -> CellFindings:
    (cell,) = judge_records(select_records(runs, [f"group={group}"] if group else []), 2000)
    return cell


def test_the_prose_on_sst2_with_smollm2_says_what_the_records_say() -> None:
    prose = read_section("SST-2 with SmolLM2-135M, the steps `insertion` and `mam`")
    records = load_records(FOLDER / "sst2" / "smollm2-135m")[0]
    runs = plain_runs(records)
    rows = group_seeds(runs, "mean")
    assert {len(row.scored) for row in rows} == {3} and {one.steps for one in records} == {3600}
    assert {one.trainer["compile"] for one in records} == {"layers"}
    assert f"{len(rows)} rows, {len(runs)} runs and {len(records) - len(runs)} further trials of 3,600 steps" in prose
    found = {one.claim.name: one for one in judge_cell("sst2/smollm2-135m").findings}
    assert {one.verdict for one in found.values()} == {"not confirmed", "not tested"}
    told = "are {:.1f} points ahead of sequential ones, and those at the FFN {:.1f} ahead of those at the attention."
    assert told.format(*(found[name].estimate.difference for name in ("insertion", "ffn"))) in prose
    of = {_name_place(row): row.score for row in rows}
    assert f"MAM has {of['mam', 'ffn', '6.7%']:.1f} and full fine-tuning {of['full', None, None]:.1f}." in prose
    best = "parallel_adapter", "ffn", "2%"
    assert max(of, key=lambda key: of[key]) == best and f"at the FFN with 2% ({of[best]:.1f})." in prose
    (larger,) = (row for row in rows if _name_place(row) == ("parallel_adapter", "ffn", "6.7%"))
    told = "Of its three seeds with 6.7%, one has {:.1f} and the others {:.1f} and {:.1f}."
    assert told.format(*sorted(one.score or 0 for one in larger.scored)) in prose
    searched = {one.method: one.search for one in runs if one.budget != "2%" and one.search is not None}
    least = {one.value for name in ("mam", "lora_ffn") for one in searched[name].trials if one.value < 60}
    assert [f"{value:.1f}" for value in least] == ["55.3"] and "stay at 55.3 on the held-out tenth" in prose
    rates = {
        name: sorted(one.settings["trainer.learning_rate"] for one in searched[name].trials if one.value < 60)
        for name in ("mam", "lora_ffn")
    }
    assert rates == {"mam": [1.5e-3, 5e-3], "lora_ffn": [2e-3, 6e-3, 2e-2]}  # their presets' are 0.0005 and 0.002
    values = [one.selection.value or 0 for one in runs if one.selection is not None and one.seed == 42]
    assert f"all rows reach {min(values):.1f} to {max(values):.1f} with their best rate" in prose


def test_the_prose_on_mpnet_says_what_the_records_say() -> None:
    title = "SST-2 with MPNet of 109M parameters, the step `insertion`"
    prose, of, found = read_insertion(title, "sst2/mpnet-base")
    told = "adapter has {:.1f} at the FFN and {:.1f} at the attention, the sequential one {:.1f} and {:.1f}."
    assert told.format(*(of[key] for key in (*ADAPTERS[2:], *ADAPTERS[:2]))) in prose
    for name in ("insertion", "ffn"):
        differences = [one.difference for _, one in found[name].comparisons]
        assert len(differences) == 2 and min(differences) > 0 and found[name].verdict == "not confirmed"
    assert "All differences have the paper's sign, and none is certain" in prose
    assert f"mean lead ends at {abs(found['insertion'].estimate.low):.2f}, so that another seed may" in prose
    assert count_seeds_needed(found["insertion"].estimate, 0) == 4


def test_the_prose_on_nli_says_what_the_records_say() -> None:
    prose, of, found = read_insertion("NLI with MiniLM, the step `insertion`", "mnli/minilm-l6")
    selections = [one.selection for one in load_records(FOLDER / "mnli")[0]]
    most = max(one.value for one in selections if one is not None and one.value is not None)
    assert f"lower there ({max(of.values()):.1f} at best) than on the held-out tenth ({most:.1f})" in prose
    at_ffn, at_attention = ([of[key] for key in ADAPTERS[place::2]] for place in (0, 1))
    ahead = [one - other for one, other in zip(at_ffn, at_attention, strict=True)]
    told = "the parallel adapter is {1:.1f} points ahead of the one at the attention, and the sequential one {0:.1f}."
    assert told.format(*ahead) in prose and found["ffn"].verdict == "confirmed"
    estimate = found["insertion"].estimate
    told = f"is {estimate.difference:.2f} points, with an interval from {estimate.low:.2f} to {estimate.high:.2f}."
    assert told in prose and found["insertion"].verdict == "not confirmed"


def _get_rate(record: Record) -> float:
    assert record.search is not None
    return float(record.search.chosen["trainer.learning_rate"])


def plain_runs(records: list[Record]) -> list[Record]:
    return [one for one in records if not is_trial(one)]


def _compare_groups(records: list[Record], group: str) -> dict[str, float]:
    """Return the difference of each claim that is tested, on some of the examples."""
    (cell,) = judge_records(select_records(plain_runs(records), [f"group={group}"]), 100)
    return {one.claim.name: one.estimate.difference for one in cell.findings if one.estimate is not None}


def _find_interval(records: list[Record], group: str) -> tuple[float, float]:
    """Return the 95% interval of MAM's lead over full fine-tuning, on some of the examples."""
    compared = [one for one in plain_runs(records) if one.method in ("mam", "full")]
    (cell,) = judge_records(select_records(compared, [f"group={group}"]), 2000)
    (found,) = (one.estimate for one in cell.findings if one.claim.name == "mam_full")
    assert found is not None
    return found.low, found.high


def _average_groups(records: list[Record], group: str, budget: str = "6.7%") -> dict[str, float]:
    """Return the mean score of full fine-tuning, and of each method of a size, on some of the examples."""
    rows = group_seeds(select_records(plain_runs(records), [f"group={group}"]), "mean")
    of_size = [row for row in rows if row.first.budget in (budget, None)]
    return {row.first.method: row.score for row in of_size if row.score is not None}


def list_trials(row: Row, records: list[Record]) -> list[tuple[float, float]]:
    """Return the learning rates that were tried for a row, in order, with the score that each trial reported."""
    (searched,) = (one.search for one in row.records if one.search is not None and one.seed == one.search.seed)
    scores = {one.run: one.score for one in records}
    found = [(one.settings["trainer.learning_rate"], scores[one.run]) for one in searched.trials]
    return sorted((rate, score) for rate, score in found if score is not None)


def _find_loss_beyond(row: Row) -> float:
    """Return how much worse the trial with the highest rate is than the chosen one, which has the highest but one of
    six, on the selection split."""
    search = row.first.search
    assert search is not None and len(search.trials) == 6
    *_, chosen, highest = sorted(search.trials, key=lambda one: one.settings["trainer.learning_rate"])
    assert chosen.settings["trainer.learning_rate"] == _get_rate(row.first)
    assert chosen.value is not None and highest.value is not None
    return float(chosen.value - highest.value)


def _find_gain_below(row: Row, records: list[Record]) -> float:
    """Return by how much the trial with the rate below the chosen one has the better score."""
    rates, scores = zip(*list_trials(row, records), strict=True)
    assert row.first.search is not None
    place = rates.index(row.first.search.chosen["trainer.learning_rate"])
    return float(scores[place - 1] - scores[place])


def test_the_page_counts_the_rows_with_further_rates() -> None:
    rows = group_seeds([one for one in load_records(FOLDER)[0] if not is_trial(one)], "mean")
    searches = [(row.first.task, row.first.search) for row in rows if row.first.search is not None]
    further = [task for task, search in searches if len(search.trials) > 5]
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    assert {*further} == {"webnlg"} and len(further) == 12
    assert "of the records below, twelve rows of WebNLG have that" in page


def test_the_page_names_the_cells_without_a_run() -> None:
    lines = (ROOT / "scripts" / "reproduction.sh").read_text(encoding="utf-8").split("CELL is BACKBONE/TASK")[1]
    cells = re.findall(r"[\w.-]+/[\w.-]+", lines.split("# SHARED holds")[0])
    named = {"mnli": "nli", "wmt16_enro": "en_ro"}
    known: dict[str, list[Record]] = {}
    for one in load_records(FOLDER)[0]:
        known.setdefault(f"{one.model.name}/{named.get(one.task, one.task)}", []).append(one)
    without = [cell for cell in cells if cell not in known]
    trials = [cell for cell in cells if cell in known and all(map(is_trial, known[cell]))]
    page = " ".join((ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8").split())
    assert len(cells) == 10 and len(without) == 3
    listed = ", ".join(f"`{cell}`" for cell in without[:-1]) + f" and `{without[-1]}`"
    assert f"Three of the script's ten cells have no run yet: {listed}." in page
    assert len(trials) == 1 and f"`{trials[0]}` has trials alone." in page


def test_the_prose_on_the_searches_says_what_the_records_say() -> None:
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    prose = " ".join(page.split("**On SST-2, nothing is.**")[1].split("**On WebNLG")[0].split())
    small, large = find_studies(load_records(FOLDER / "sst2")[0], 2000)
    assert [(one.first.budget, one.is_better, len(one.trials)) for one in (small, large)] == [
        ("0.5%", False, 200),
        ("2%", False, 200),
    ]
    ahead = [one for one in small.named if one.score is not None and one.score > (small.leaders[0].score or 0)]
    assert len(ahead) == 0 and "is ahead of all named methods" in prose

    told = (
        "under 0.5% has {:.1f} with three other seeds, and is ahead of all named methods (2026-11-30, two H200, eight"
    )
    assert told.format(_tell_reported(small)[0]) in prose
    assert "MAM has {1:.1f}, LoRA {2:.1f}. The best of 200 under 2% has".format(*_tell_reported(small)) in prose
    assert "under 2% has {:.1f}, where MAM has {:.1f} and LoRA {:.1f}.".format(*_tell_reported(large)) in prose
    for found in (small, large):
        done = sorted((one for one in found.trials if one.selection), key=lambda one: -compute_objective(one.selection))
        forms = [one.axes[0].insertion_form for one in done]
        assert forms[:15] == ["parallel"] * 15 and "the fifteen best points of each are parallel" in prose


def test_the_prose_counts_the_points_that_were_drawn_at_random(tmp_path: Path) -> None:
    """By the journals: then, each point after an odd number of suggestions in vain was."""
    pytest.importorskip("optuna")
    from peftbench.sweeps.optuna_study import open_study
    from peftbench.sweeps.study import REASON, RUN_FOLDER

    points = random = 0
    for name in sorted({one.study for one in load_records(FOLDER / "sst2")[0] if one.study is not None}):
        journal, in_vain = FOLDER / ".sweeps" / f"{name}.study.jsonl", 0
        for trial in open_study(Path(shutil.copy(journal, tmp_path)), name, 1).get_trials(deepcopy=False):
            if REASON in trial.user_attrs:
                in_vain += 1
                continue
            assert RUN_FOLDER in trial.user_attrs
            points, random, in_vain = points + 1, random + in_vain % 2, 0
    page = " ".join((ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8").split())
    assert f"Of the {points} points, {random} were drawn at random, because the sampler repeated itself." in page


def test_the_prose_on_rte_says_what_the_records_say() -> None:
    prose = read_section("RTE with MiniLM, the first trials")
    records = load_records(FOLDER / "rte")[0]
    scores = sorted(one.score for one in records if one.score is not None)
    assert f"{len(records)} trials" in prose and len(scores) == len(records)
    assert f"between {scores[0]:.1f} and {scores[-1]:.1f}" in prose
    (majority,) = {one.baselines["majority"] for one in records}
    assert f"at the {majority:.1f} of the most frequent label" in prose
    assert sum(abs(score - majority) < 3 for score in scores) > len(scores) / 2


def test_the_readme_says_what_the_tuned_runs_say() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    cell = judge_cell("sst2/minilm-l6")
    verdicts = Counter(finding.verdict for finding in cell.findings)
    assert verdicts == {"contradicted": 1, "not confirmed": 6}
    (contradicted,) = (finding for finding in cell.findings if finding.verdict == "contradicted")
    assert contradicted.claim.name == "heads"
    behind = [-one.difference for pair, one in contradicted.comparisons if pair.pair[0] == "prefix"]
    sizes = {pair.a.first.budget for pair, _ in contradicted.comparisons}
    assert sizes == {"0.1%", "0.5%"} and "**SST-2**: at 0.1 and 0.5%, prefix tuning is" in readme
    told = f"prefix tuning is {min(behind):.1f} to {max(behind):.1f} points behind adapters and LoRA."
    assert f"{told} All else may be chance." in readme
    for task in ("sst2", "webnlg"):
        searches = find_studies(load_records(FOLDER / task)[0], 500)
        assert [(one.first.budget, one.is_better) for one in searches] == [("0.5%", False), ("2%", False)]
    assert "All else may be chance." in readme and "**Searches** of the axes found nothing better." in readme

    found = {finding.claim.name: finding for finding in judge_cell("webnlg/bart-mini").findings}
    verdicts = {name: finding.verdict for name, finding in found.items() if finding.verdict != "not tested"}
    contradicted = {name for name, verdict in verdicts.items() if verdict == "contradicted"}
    assert contradicted == {"mam_full", "mam_best", "prefix"}
    assert {name for name, verdict in verdicts.items() if verdict == "confirmed"} == {"insertion", "ffn"}
    assert "**WebNLG, BART**: parallel adapters and the FFN are better." in readme
    records = load_records(FOLDER / "webnlg" / "bart-mini")[0]
    seen = _compare_groups(records, "seen")["mam_full"]
    assert f"MAM is {-seen:.1f} BLEU behind full fine-tuning on seen categories." in readme
    assert _find_interval(records, "seen")[1] < 0
    low, high = _find_interval(records, "unseen")
    assert low < 0 < high and "On unseen ones it may be level." in readme

    records = load_records(FOLDER / "webnlg" / "smollm2-135m")[0]
    ahead = _compare_groups(records, "unseen")["mam_full"]
    assert f"**WebNLG, SmolLM2**: full fine-tuning is {ahead:.1f} behind MAM on unseen categories," in readme
    assert _find_interval(records, "unseen")[0] > 0
    chosen_there = _compare_groups(load_records(BY_CATEGORY)[0], "unseen")["mam_full"]
    assert f"on unseen categories, {chosen_there:.1f} if such categories choose the rates." in readme


def _place_rate(record: Record) -> int:
    """Return the place of the chosen learning rate among the five: 2 is the preset's."""
    assert record.search is not None
    rates = sorted(record.search.keys["trainer.learning_rate"])
    return rates.index(record.search.chosen["trainer.learning_rate"])


def test_the_records_are_small() -> None:
    sizes = [file.stat().st_size for file in (ROOT / "outputs" / "reference").rglob("*") if file.is_file()]
    assert sum(sizes) < MOST_BYTES
    assert not list((ROOT / "outputs" / "reference").rglob("predictions*"))


def test_the_tables_fit_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert claims([str(ROOT / "outputs" / "reference"), "--each"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    assert any(line.startswith("Parallel beats") and line.endswith("confirmed") for line in map(str.rstrip, lines))


def _tell_reported(found: StudyFinding) -> tuple[float, ...]:
    """Return the reported scores of the best point, MAM and LoRA."""
    return tuple(one.score or 0 for one in (found.leaders[0], found.rivals["mam"], found.rivals["lora"]))


def test_the_prose_on_the_searches_on_webnlg_says_what_the_records_say() -> None:
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    prose = " ".join(page.split("**On WebNLG with SmolLM2, nothing is so far.**")[1].split("<!--")[0].split())
    records = load_records(FOLDER / "webnlg" / "smollm2-135m")[0]
    small, large = find_studies(records, 2000)
    assert (small.is_better, large.is_better) == (False, False)
    assert f"have {len(small.trials)} points under 0.5% and {len(large.trials)} under 2%, of 200" in prose
    axes = [one.leaders[0].first.axes[0] for one in (small, large)]
    assert [(one.functional_form, one.modified_representation, one.insertion_form) for one in axes] == [
        ("identity", "ffn_weights", "sequential"),
        ("softmax", "ffn_weights", "parallel"),
    ]
    assert "under 0.5% is a linear bottleneck at the FFN's matrices, sequential, with s = 4." in prose
    assert (axes[0].composition_function, axes[0].scale) == ("scaled", 4)

    def tell_selection(found: StudyFinding) -> tuple[float, ...]:
        places = found.leaders[0], found.rivals["lora"], found.rivals["mam"]
        return tuple(one.selection.value for one in places if one.selection is not None and one.selection.value)

    told = "It has {:.1f} BLEU on the dev split, where LoRA has {:.1f} and MAM {:.1f}."
    assert told.format(*tell_selection(small)) in prose
    best, mam, lora = (f"{score:.1f}" for score in _tell_reported(small))
    assert best == mam and f"it has {best} on the test set, as MAM has. LoRA has {lora}, by more than chance," in prose
    larger = (small.rivals["lora"].stored or 0) / (small.leaders[0].stored or 1)
    assert f"but it stores {larger:.2f} times as much." in prose
    best, mam, lora = (f"{score:.1f}" for score in _tell_reported(large))
    assert f"{best} on the test set, where LoRA has {lora} and MAM {mam}, by more than chance." in prose
    assert f"It has {tell_selection(large)[0]:.1f} on the dev split and" in prose
    sure = [{name for name, one in of.rivals.items() if one.behind and one.behind.high < 0} for of in (small, large)]
    assert sure == [{"lora"}, {"mam"}] and (small.winners, large.winners) == ([], ["mam"])

    seen, unseen = (find_studies(select_records(records, [f"group={group}"]), 2000) for group in ("seen", "unseen"))
    ahead = [[of.rivals[name].behind for name in ("mam", "lora")] for of in (*seen, *unseen)]
    by = [estimate.difference for pair in ahead for estimate in pair if estimate is not None]
    told = "under 0.5% is {:.1f} BLEU ahead of MAM, by more than chance, and {:.1f} ahead of LoRA."
    assert told.format(*by[:2]) in prose and ahead[0][0] is not None and ahead[0][0].low > 0
    assert "On the unseen ones it is {:.1f} and {:.1f} behind.".format(*(-one for one in by[4:6])) in prose
    told = "Under 2% it is {:.1f} and {:.1f} ahead, then {:.1f} and {:.1f} behind."
    assert told.format(by[2], by[3], -by[6], -by[7]) in prose

    done = [
        sorted((one for one in of.trials if one.selection), key=lambda one: -compute_objective(one.selection))
        for of in (small, large)
    ]
    at_ffn = [[one.axes[0].modified_representation.startswith("ffn") for one in of] for of in done]
    assert [of.index(False) for of in at_ffn] == [7, 4] and "the seven best points under 0.5% are there" in prose
    forms = [one.axes[0].insertion_form for one in done[0]]
    assert forms[:5] == ["sequential"] * 5 and "the five best under 0.5% are sequential" in prose
