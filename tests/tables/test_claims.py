"""`peftbench claims`: verdicts of records that are made for them, and the bootstrap against a naive one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student

from peftbench.cli.claims import main
from peftbench.metrics.bootstrap import draw_differences, draw_seed_weights, score_drawn_examples
from peftbench.metrics.measure import compute_statistics
from peftbench.metrics.statistics import average
from peftbench.records.record import load_records
from peftbench.records.run_files import METRICS_FILE
from peftbench.tables.claims import Estimate, count_seeds_needed, judge_records, read_claims
from peftbench.tables.examples import write_examples
from peftbench.tables.flatness import find_steepest, measure_last_gain
from peftbench.utils.errors import UserError
from peftbench.utils.files import write_lines

REFERENCE = Path(__file__).resolve().parents[2] / "outputs" / "reference"
# Folders have no order: Python 3.13 lists them otherwise than 3.11.
TEMPLATE = json.loads(min((REFERENCE / "grid").rglob("adapter/*/record.json")).read_text(encoding="utf-8"))
EXAMPLES = 400


def make_row(
    folder: Path,
    scores: Sequence[float],
    method: str,
    percent: float,
    *,
    representation: str = "ffn",
    budget: str | None = None,
    keep_examples: bool = True,
    **changes: Any,
) -> None:
    """Write the records of a row, a seed for each score: shares of the examples, in percent, that are right."""
    for seed, score in enumerate(scores):
        name = f"{method}-{representation}-{percent}-{seed}"
        record = json.loads(json.dumps(TEMPLATE))
        record |= {"method": method, "seed": seed, "run": name, "point": name[:-2], "metric": "accuracy"}
        record |= {"score": score, "budget": budget, **changes}
        record["axes"][0] |= {"modified_representation": representation}
        record["counts"] |= {"backbone": 1_000_000, "stored": int(percent * 10_000), "trained": 1}
        record["scores"] = {"report": {"split": "test", "examples": EXAMPLES, "metrics": {"accuracy": score}}}
        (folder / name).mkdir(parents=True)
        (folder / name / "record.json").write_text(json.dumps(record), encoding="utf-8")
        if keep_examples:  # all rows have their hits at the same examples, as far as they go
            rows = np.arange(EXAMPLES)[:, None] < score * EXAMPLES / 100
            write_examples(rows.astype(float), folder / name)


@pytest.fixture
def judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, dict[str, Any]]]:
    def judge(*words: str) -> dict[str, dict[str, Any]]:
        assert main([str(tmp_path), *words, "--json"]) == 0
        (cell,) = json.loads(capsys.readouterr().out)
        return {claim["name"]: claim for claim in cell["claims"]}

    return judge


def test_each_verdict(tmp_path: Path, judged: Callable[..., dict[str, dict[str, Any]]]) -> None:
    make_row(tmp_path, [80, 80.5, 81], "parallel_adapter", 2, budget="2%")
    make_row(tmp_path, [60, 60.5, 61], "adapter", 2, budget="2%")
    make_row(tmp_path, [80, 80.5, 82], "parallel_adapter_attention", 2, representation="attention", budget="2%")
    make_row(tmp_path, [60, 60.5, 61], "prefix", 2, representation="heads", budget="2%")
    make_row(tmp_path, [70, 70.5, 71], "prefix", 6, representation="heads", budget="6.7%")
    found = judged()
    assert {name: claim["verdict"] for name, claim in found.items()} == {
        "insertion": "confirmed",
        "ffn": "not confirmed",
        "heads": "not tested",
        "scaling": "not tested",
        "prefix": "contradicted",
        "mam_full": "not tested",
        "mam_best": "not tested",
    }
    assert found["insertion"]["runs"] == 6 and found["insertion"]["estimate"]["difference"] == pytest.approx(20)
    assert found["prefix"]["estimate"]["difference"] == pytest.approx(10)
    assert found["heads"]["change"].startswith("2 seeds or more of prefix, pa_attention")
    assert judged("method=adapter,parallel_adapter")["ffn"]["verdict"] == "not tested"


def test_saturation_is_a_question_about_two_large_prefixes(
    tmp_path: Path, judged: Callable[..., dict[str, dict[str, Any]]]
) -> None:
    """What 2% gain over 0.1% says nothing about it; it was half of the mean in earlier versions."""
    for score, size in ((50, 0.1), (70, 2.0), (70, 6.0)):
        make_row(tmp_path, [score, score + 0.25, score + 0.5], "prefix", size, representation="heads")
    found = judged()["prefix"]
    assert found["runs"] == 6 and found["estimate"]["difference"] == 0


@pytest.mark.parametrize(
    ("sizes", "scores", "verdict"),
    [
        ((2.0, 1.7), (80, 60), "not confirmed"),
        ((1.9, 1.7), (80, 60), "confirmed"),
        ((2.0, 1.7), (60, 80), "contradicted"),
        ((1.7, 2.0), (60, 80), "not confirmed"),
        ((1.7, 2.0), (80, 60), "confirmed"),
    ],
)
def test_a_row_that_stores_clearly_more_shows_nothing_where_it_is_better(
    sizes: tuple[float, float],
    scores: tuple[int, int],
    verdict: str,
    tmp_path: Path,
    judged: Callable[..., dict[str, dict[str, Any]]],
) -> None:
    """Rows of one budget: the next bottleneck of the other one was too large. It counted for A in earlier versions."""
    for method, size, score in zip(("parallel_adapter", "adapter"), sizes, scores, strict=True):
        make_row(tmp_path, [score, score + 0.5, score + 1], method, size, budget="2%")
    found = judged()["insertion"]
    assert found["verdict"] == verdict
    told = {(2.0, 1.7): "pa_ffn stores more than sa_ffn, which cannot confirm", (1.7, 2.0): "which can only hide"}
    assert told.get(sizes, "The interval ends") in found["change"]


def test_a_mean_is_not_confirmed_against_one_of_its_pairs(
    tmp_path: Path, judged: Callable[..., dict[str, dict[str, Any]]]
) -> None:
    make_row(tmp_path, [90, 90, 90.5], "parallel_adapter", 2)
    make_row(tmp_path, [50, 50, 50.5], "adapter", 2)
    make_row(tmp_path, [60, 60, 60.5], "parallel_adapter_attention", 2, representation="attention")
    make_row(tmp_path, [70, 70, 70.5], "adapter", 2, representation="attention")
    found = judged()["insertion"]
    assert found["estimate"]["low"] > 0 and found["verdict"] == "not confirmed"
    assert (
        found["change"] == "pa_attention against sa_attention contradicts it. The mean alone would have it confirmed."
    )


def test_the_best_of_its_size_is_above_each(tmp_path: Path, judged: Callable[..., dict[str, dict[str, Any]]]) -> None:
    make_row(tmp_path, [80, 80, 80.5], "mam", 6.7)
    make_row(tmp_path, [60, 60, 60.5], "parallel_adapter", 6.7)
    assert judged()["mam_best"]["verdict"] == "confirmed"
    make_row(tmp_path, [79.75, 80.25, 80], "lora", 6.5)  # all alike
    found = judged()["mam_best"]
    assert found["verdict"] == "not confirmed" and found["change"].startswith("Closest: lora_attention.")
    make_row(tmp_path, [95, 95, 95.5], "prefix", 9.2, representation="heads")  # which stores more
    assert judged()["mam_best"]["verdict"] == "not confirmed"
    make_row(tmp_path, [95, 95, 95.5], "prefix_lora_ffn", 6.7)
    found = judged()["mam_best"]
    assert found["verdict"] == "contradicted" and found["runs"] == 15


def test_sizes_are_matched(tmp_path: Path) -> None:
    for percent, budget in ((0.10, "0.1%"), (2.37, None), (6.09, None)):
        make_row(tmp_path, [80, 81], "parallel_adapter", percent, budget=budget)
    for percent, budget in ((0.07, "0.1%"), (3.56, None), (9.9, None)):  # 1.5 times, and 1.6
        make_row(tmp_path, [80, 81], "adapter", percent, budget=budget)
    (cell,) = judge_records(load_records(tmp_path)[0], 100)
    pairs = [(one.a.first.counts, one.b.first.counts) for one, _ in cell.findings[0].comparisons]
    assert [(a.percent["stored"], b.percent["stored"]) for a, b in pairs if a and b] == [(0.1, 0.07), (2.37, 3.56)]


def test_one_seed_in_common_tests_nothing(tmp_path: Path, judged: Callable[..., dict[str, dict[str, Any]]]) -> None:
    make_row(tmp_path, [80, 81, 82], "parallel_adapter", 2)
    make_row(tmp_path, [60], "adapter", 2)
    assert judged()["insertion"]["verdict"] == "not tested"


def test_the_seeds_of_each_pair_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of those whose mean has fewer, because another pair has."""
    make_row(tmp_path, [80, 81, 82], "parallel_adapter", 2)
    make_row(tmp_path, [60, 61, 62], "adapter", 2)
    make_row(tmp_path, [50, 51], "adapter", 2, representation="attention")
    for short in ([], ["--short"]):
        assert main([str(tmp_path), *short]) == 0
        assert "Intervals: a bootstrap over 2 or 3 seeds and the examples" in " ".join(capsys.readouterr().out.split())


def test_runs_that_diverged_or_were_cut_off_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_row(tmp_path, [80, 81], "parallel_adapter", 2, cut_off={"report": 0.06})
    make_row(tmp_path, [60, 61, 62], "adapter", 2)
    file = tmp_path / "adapter-ffn-2-2" / "record.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record |= {"status": "diverged", "score": None, "scores": {}, "diverged": {"what": "loss", "step": 3}}
    file.write_text(json.dumps(record), encoding="utf-8")
    assert main([str(tmp_path)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Diverged, and in no mean: 1 of 5 runs." in told and "5% of the texts cut off: 2 of 5 runs." in told
    assert "bootstrap over 2 seeds" in told


def search_rate(chosen: float) -> dict[str, Any]:
    """What a record says of a search of three rates."""
    selection = {"split": "validation", "examples": 9, "metric": "accuracy", "value": 1.0}
    search = {"name": "lr3", "role": "final", "seed": 42, "keys": {"trainer.learning_rate": [0.1, 0.3, 1.0]}}
    return {**search, "chosen": {"trainer.learning_rate": chosen}, "selection": selection, "trials": []}


@pytest.mark.parametrize(
    ("rates", "verdict", "change"),
    [
        ((0.3, 0.3, 0.3, 0.3), "confirmed", ""),
        ((1.0, 0.3, 1.0, 0.3), "confirmed", ""),  # what may be better still is what is better already
        ((0.3, 1.0, 0.3, 0.3), "confirmed", "The best rate of sa_ffn is the outermost that was tried, so it may"),
        (
            (0.3, 1.0, 0.3, 0.1),
            "not confirmed",
            "The best rate of sa_ffn and sa_attention is the outermost that was tried, so they may be better. "
            "The mean alone would have it confirmed.",
        ),
    ],
)
@pytest.mark.parametrize("better", ["parallel", "sequential"])
def test_no_verdict_rests_on_a_loser_at_the_edge(
    better: str,
    rates: tuple[float, ...],
    verdict: str,
    change: str,
    tmp_path: Path,
    judged: Callable[..., dict[str, dict[str, Any]]],
) -> None:
    """The pair with such a loser is left out; without any other pair there is no verdict."""
    methods = [("parallel_adapter", "ffn"), ("adapter", "ffn")]
    methods += [("parallel_adapter_attention", "attention"), ("adapter", "attention")]
    if better == "sequential":
        methods = [methods[index] for index in (1, 0, 3, 2)]
        verdict = verdict.replace("confirmed", "contradicted") if verdict == "confirmed" else verdict
        change = change.replace("sa_", "pa_").replace("confirmed", "contradicted")
    for (method, representation), score, rate in zip(methods, (80, 60, 80, 60), rates, strict=True):
        scores = [score, score + 0.5, score + 1]
        make_row(tmp_path, scores, method, 2, representation=representation, search=search_rate(rate))
    found = judged()["insertion"]
    assert found["verdict"] == verdict and found["change"].startswith(change)
    assert ("outermost" in found["change"]) == ("outermost" in change)


def test_the_best_of_its_size_is_above_those_that_are_tuned(
    tmp_path: Path, judged: Callable[..., dict[str, dict[str, Any]]]
) -> None:
    make_row(tmp_path, [80, 80, 80.5], "mam", 6.7, search=search_rate(0.3))
    make_row(tmp_path, [60, 60, 60.5], "parallel_adapter", 6.7, search=search_rate(1.0))
    found = judged()["mam_best"]
    assert found["verdict"] == "not confirmed"
    assert "The best rate of pa_ffn is the outermost that was tried, so it may be better." in found["change"]
    make_row(tmp_path, [90, 90, 90.5], "prefix_lora_ffn", 6.7, search=search_rate(1.0))
    assert judged()["mam_best"]["verdict"] == "contradicted"


def test_a_seed_that_learned_nothing_and_rates_at_the_edge_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method, scores, rate in (("parallel_adapter", [80, 20], 1.0), ("adapter", [60, 61], 0.3)):
        make_row(tmp_path, scores, method, 2, search=search_rate(rate))
    assert main([str(tmp_path)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Standard deviation over seeds: 21.57 (median of rows), 42.43 at most (parallel_adapter)." in told
    assert "Outermost of the values that were tried: the best one of 1 of 2 rows." in told


@pytest.mark.parametrize(
    ("gpus", "told"),
    [
        (("one", "one"), "1.0 h of NVIDIA H200."),
        (("one", "other"), "2.0 h of NVIDIA H200."),
        ((None, None), "1.0 h of NVIDIA H200; GPUs of one kind count as one where a record does not say which."),
    ],
)
def test_hours_of_gpus(
    gpus: tuple[str | None, str | None], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs that share a GPU share its hours; two GPUs of one kind have hours of their own."""
    times = {"created": "2026-11-29T20:00:00.000+00:00", "finished": "2026-11-29T21:00:00.000+00:00"}
    for gpu, method in zip(gpus, ("parallel_adapter", "adapter"), strict=True):
        attempt = {"started": times["created"], "host": "here", "step": 0, "gpu": gpu}
        make_row(tmp_path, [80, 81], method, 2, attempts=[attempt], device="NVIDIA H200", **times)
    assert main([str(tmp_path)]) == 0
    assert " ".join(capsys.readouterr().out.split()).endswith(f"4 runs and 0 trials of searches, {told}")


@pytest.mark.parametrize(
    ("looks", "gain"),
    [
        ([("accuracy", 60.0), ("accuracy", 75.0), ("accuracy", 80.0)], 5.0),  # at steps 3, 6 and 9
        ([("loss", 3.0), ("loss", 2.0), ("loss", 1.5)], 0.5),
        ([("accuracy", 60.0)], None),
        ([], None),
    ],
)
def test_what_the_last_third_of_the_steps_gained(
    looks: list[tuple[str, float]], gain: float | None, tmp_path: Path
) -> None:
    make_row(tmp_path, [80], "adapter", 2)
    ((record,), _) = load_records(tmp_path)
    lines = [{"stage": "train the head alone", "step": 9, "eval_accuracy": 1.0}]
    for index, (metric, value) in enumerate(looks, start=1):
        lines += [{"stage": "train adapter", "step": 3 * index, f"eval_{metric}": value}]
        lines += [{"stage": "train adapter", "step": 3 * index + 1, "loss": 7.0}]
    write_lines(record.folder / METRICS_FILE, lines)
    assert measure_last_gain(record) == gain
    assert find_steepest([record]) == (None if gain is None else (gain, gain, "adapter"))


def test_without_examples_the_interval_is_students(
    tmp_path: Path, judged: Callable[..., dict[str, dict[str, Any]]]
) -> None:
    ours, theirs = [80.0, 82.0, 81.5], [70.0, 73.0, 71.5]
    make_row(tmp_path, ours, "parallel_adapter", 2)
    make_row(tmp_path, theirs, "adapter", 2, keep_examples=False)
    found = judged()["insertion"]["estimate"]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    half = student.ppf(0.975, 2) * stdev(differences) / 3**0.5
    assert (found["low"], found["high"]) == pytest.approx((fmean(differences) - half, fmean(differences) + half))
    assert found["by_examples"] is None


def test_seeds_needed() -> None:
    assert count_seeds_needed(Estimate(1.0, -1, 3, 2, None, 0.25), 0) == 5  # t of 4 is 2.78: 2.78 x sqrt(0.5 / 5) < 1
    assert count_seeds_needed(Estimate(1.0, -1, 3, 2, 0.2, 0.25), 0) == 9  # 1.96 x sqrt(0.2 + 0.5 / 9) < 1
    assert count_seeds_needed(Estimate(1.0, -1, 3, 2, 0.3, 0.25), 0) is None  # the examples alone: 1.96 x sqrt(0.3) > 1


def test_the_bootstrap_against_a_naive_one() -> None:
    """BLEU of two rows of three seeds: the same draws, in loops, scored anew from the texts."""
    rng, words, resamples = np.random.default_rng(3), ["a", "b", "c", "d", "e"], 40

    def write() -> list[str]:
        return [" ".join(rng.choice(words, 6)) for _ in range(12)]

    references = write()
    texts = [[write() for _ in range(3)] for _ in range(2)]
    runs = [[compute_statistics("bleu", one, references)["bleu"] for one in side] for side in texts]
    scores = score_drawn_examples([run for side in runs for run in side], resamples, seed=5)
    weights = draw_seed_weights(3, resamples, seed=7)
    found = draw_differences(scores[:3], scores[3:], weights)

    examples, seeds = np.random.default_rng(5), np.random.default_rng(7).integers(0, 3, (resamples, 2))
    for index in range(resamples):
        drawn = examples.integers(0, 12, 12)
        sides = []
        for side in texts:
            of_seeds = [side[seed] for seed in seeds[index]]
            again = [
                compute_statistics("bleu", [one[i] for i in drawn], [references[i] for i in drawn]) for one in of_seeds
            ]
            sides.append(fmean(one["bleu"].score_all() for one in again))
        assert found[index] == pytest.approx(sides[0] - sides[1], abs=1e-9)
    assert draw_differences(scores[:3], scores[3:], None) == pytest.approx(
        scores[:3].mean(axis=0) - scores[3:].mean(axis=0)
    )


def test_the_variance_is_that_of_seeds_and_examples() -> None:
    """Var(mean of n seeds) = s^2 / n, and of accuracies on N examples p (1 - p) / N."""
    hits = [np.arange(400) < right for right in (200, 220, 240, 230)]
    scores = score_drawn_examples([average(one.astype(float)) for one in hits], 4000)
    none = np.zeros_like(scores)
    fixed = draw_differences(scores, none, None)
    mean_hit = np.mean(hits, axis=0)
    assert np.var(fixed) == pytest.approx(1e4 * np.var(mean_hit) / 400, rel=0.1)
    exact = np.array([one.mean() * 100 for one in hits])[:, None].repeat(4000, axis=1)
    drawn = draw_differences(exact, none, draw_seed_weights(4, 4000))
    assert np.var(drawn) == pytest.approx(np.var(exact[:, 0], ddof=1) / 4, rel=0.1)


def test_the_claims_name_points_that_are_there() -> None:
    claims, points = read_claims()
    assert len(claims) == 7
    for claim in claims:
        assert {name for pair in claim.pairs for name in pair} <= points.keys()
        assert (claim.above is None) != (claim.below is None)


def test_on_the_records_that_came_with_peftbench(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(REFERENCE / "grid")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "1,698 steps, learning rates not searched, seeds 1, 42" in told
    assert "Student's t over 2 seeds, for these examples only" in told and "2 seeds say little" in told
    assert "40 runs and 0 trials of searches" in told


def test_rates_that_another_split_chose_are_another_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A split with other domains prefers other rates, so that its rows are compared among themselves only."""
    for split, better in (("validation", 80), ("held_out", 50)):
        changes = {"search": search_rate(0.3), "data": json.loads(json.dumps(TEMPLATE["data"]))}
        for part in (changes["search"]["selection"], changes["data"]["splits"]["selection"]):
            part |= {"split": split, "examples": 300}
        make_row(tmp_path / split, [better, better + 1], "parallel_adapter", 2, point=f"p-{split}", **changes)
        make_row(tmp_path / split, [60, 61], "adapter", 2, point=f"s-{split}", **changes)
    assert main([str(tmp_path), "--short", "--markdown"]) == 0
    head, _, first = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[:3])
    verdicts = {name.rpartition(", ")[2]: cell.partition(" (")[0] for name, cell in zip(head, first, strict=True)}
    assert verdicts["chosen on validation"] == "**confirmed**: +20.00"
    assert verdicts["chosen on held_out"] == "**contradicted**: -10.00"
    assert main([str(tmp_path)]) == 0
    assert "the best learning rate of search=lr3 on 300 held_out examples" in " ".join(capsys.readouterr().out.split())


def test_one_table_of_all_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks, and one of them with two lengths of training: three columns with names of their own."""
    trainer = TEMPLATE["trainer"]
    for task, steps in (("sst2", 100), ("sst2", 200), ("rte", 100)):
        folder = tmp_path / f"{task}{steps}"
        changes = {"task": task, "steps": steps, "trainer": {**trainer, "max_steps": steps}}
        better = 80 if task == "sst2" else 50
        make_row(folder, [better, better + 0.5, better + 1], "parallel_adapter", 2, point=f"p{steps}", **changes)
        make_row(folder, [60, 60.5, 61], "adapter", 2, point=f"s{steps}", **changes)
    assert main([str(tmp_path), "--short", "--markdown"]) == 0
    head, _, first, *others = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[:9])
    model = TEMPLATE["model"]["name"]
    assert head == ["claim", f"rte with {model}", f"sst2 with {model}, 100 steps", f"sst2 with {model}, 200 steps"]
    assert first[0] == "Parallel beats sequential, > 0" and len(others) == 6
    assert [cell.partition(" (")[0] for cell in first[1:]] == [
        "**contradicted**: -10.00",
        "**confirmed**: +20.00",
        "**confirmed**: +20.00",
    ]
    assert {cell for line in others for cell in line[1:]} == {"not tested"}
    monkeypatch.setenv("COLUMNS", "80")  # room for two of three columns
    assert main([str(tmp_path), "--short"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and sum(line.startswith("Parallel beats") for line in lines) == 2
    for words in (["--each"], ["--searches"], ["--json"]):
        with pytest.raises(UserError, match="--short is one table of all verdicts"):
            main([str(tmp_path), "--short", *words])
