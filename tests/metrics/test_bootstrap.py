"""The paired bootstrap against scipy's, against what it must do by chance, and example scores against the metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peftbench.metrics.bootstrap import bootstrap_pairs
from peftbench.metrics.entities import ENTITY_SCORES
from peftbench.metrics.measure import DEFINITIONS, compute_statistics, measure
from peftbench.metrics.statistics import Statistics
from peftbench.utils.errors import UserError

PREDICTIONS = ["The cats sat on a mat. It rained.", "", "Prices rose again", "a b c"]
REFERENCES = ["It was raining. A cat sat on the mat.", "Nothing was said.", "Prices rose again", "a b c"]


def mean(values: np.ndarray) -> dict[str, Statistics]:
    """A score that is 100 x the mean of `values` (examples,)."""
    return {"score": Statistics(values[:, None], lambda sums, n: 100 * sums[..., 0] / n)}


def sample(metric: str, examples: int, seed: int) -> tuple[list[str], list[Any], list[str]]:
    """Predictions, references and labels that the metric can be of."""
    draw = np.random.default_rng(seed)
    if metric in ("accuracy", "f1", "macro_f1", "matthews"):
        labels = ["no", "yes"] if metric == "f1" else ["no", "yes", "maybe", "never"]  # the last one is nowhere
        right = [labels[code] for code in draw.integers(0, min(3, len(labels)), examples)]
        ours = [word if draw.random() < 0.6 else labels[0] for word in right]
        return ours, right, labels
    if metric in ENTITY_SCORES:
        labels = ["O", "B-PER", "I-PER", "B-LOC"]
        words = draw.choice(labels, (examples, 5))
        guessed = np.where(draw.random(words.shape) < 0.6, words, "O")
        return list(map(" ".join, guessed)), list(map(" ".join, words)), labels
    if metric in ("final_number", "choice"):
        answers = ["#### 7", "so it is 1,200", "#### 8"] if metric == "final_number" else ["true", "option2", "false"]
        right = [answers[code] for code in draw.integers(0, 3, examples)]
        return [text if draw.random() < 0.6 else "nothing" for text in right], right, []
    if metric in ("pearson", "spearman"):
        numbers = draw.integers(0, 6, examples) + 1000.0  # ties, far from nought
        return (
            list(map(repr, (numbers + draw.normal(0, 2, examples)).round(1).tolist())),
            list(map(repr, numbers.tolist())),
            [],
        )
    chosen = draw.integers(0, len(PREDICTIONS), examples)
    right = [[REFERENCES[i], PREDICTIONS[i][:9]] if i % 2 else [REFERENCES[i]] for i in chosen]
    return [PREDICTIONS[i] for i in chosen], right, []


@pytest.mark.parametrize("metric", DEFINITIONS)
def test_of_their_mean_the_score_is_the_metric(metric: str) -> None:
    """Of all examples and, with the very statistics of all, of examples drawn from them; Spearman's ranks stay."""
    ours, right, labels = sample(metric, 60, seed=1)
    found = compute_statistics(metric, ours, right, labels)
    drawn = np.random.default_rng(2).integers(0, 60, 60)
    for chosen in (np.arange(60), drawn):
        scores = {name: float(one.score(one.rows[chosen].sum(axis=0), 60)) for name, one in found.items()}
        expected = measure(metric, [ours[i] for i in chosen], [right[i] for i in chosen], labels).scores
        assert scores.keys() == expected.keys()
        if chosen is drawn and "spearman" in scores:
            assert scores.pop("spearman") == pytest.approx(expected.pop("spearman"), abs=3)
        assert scores == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("metric", ["rougeL", "bleu", "exact_match"])
@pytest.mark.parametrize(
    "texts", [["Мама мыла раму.", "Шёл дождь."], ["猫在窗台上睡觉。", "天晴。"], ["猫が寝ている。", "雨です。"]]
)
def test_texts_of_other_scripts_are_scored_alike(metric: str, texts: list[str]) -> None:
    ours, right = [texts[0], texts[1][:3], ""], [[texts[0]], [texts[1], texts[0]], [texts[1]]]
    found = compute_statistics(metric, ours, right)
    scores = {name: float(one.score(one.rows.sum(axis=0), len(ours))) for name, one in found.items()}
    assert scores == pytest.approx(measure(metric, ours, right).scores, abs=1e-9)
    assert scores[metric] > 20


def test_macro_f1_is_over_the_labels_that_occur_in_either() -> None:
    for ours, right in ((["a", "b"], ["a", "b"]), (["a", "c"], ["a", "b"])):
        found = compute_statistics("macro_f1", ours, right, ["a", "b", "c"])["macro_f1"]
        expected = measure("macro_f1", ours, right, ["a", "b", "c"]).scores["macro_f1"]
        assert float(found.score(found.rows.sum(axis=0), 2)) == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["f1", "macro_f1", "matthews", "pearson"])
def test_where_all_predictions_are_one_the_score_is_the_metric(metric: str) -> None:
    _, right, labels = sample(metric, 60, seed=1)
    ours = [right[0]] * 60
    found = compute_statistics(metric, ours, right, labels)
    scores = {name: float(one.score(one.rows.sum(axis=0), len(ours))) for name, one in found.items()}
    assert scores == pytest.approx(measure(metric, ours, right, labels).scores, abs=1e-6)


def test_predictions_that_are_nearly_one() -> None:
    """Far from the true numbers and close together, as those of a head that has learned little."""
    draw = np.random.default_rng(1)
    right = draw.integers(0, 6, 60).astype(float)
    ours = list(map(repr, (40.0 + 1e-6 * (right + draw.normal(0, 2, 60))).tolist()))
    found = compute_statistics("pearson", ours, list(map(repr, right.tolist())))
    scores = {name: float(one.score(one.rows.sum(axis=0), len(ours))) for name, one in found.items()}
    assert scores == pytest.approx(measure("pearson", ours, list(map(repr, right.tolist()))).scores, abs=1e-4)


@pytest.mark.parametrize("metric", DEFINITIONS)
def test_scores_of_several_seeds_at_once(metric: str) -> None:
    _, right, labels = sample(metric, 20, seed=1)
    runs = [compute_statistics(metric, sample(metric, 20, seed)[0], right, labels) for seed in (1, 2)]
    for name in runs[0]:
        sums = np.stack([run[name].rows.sum(axis=0) for run in runs])
        alone = [float(run[name].score(one, 20)) for run, one in zip(runs, sums, strict=True)]
        assert runs[0][name].score(sums, 20).tolist() == pytest.approx(alone)


def test_bleu_of_many_draws_is_sacrebleus_of_each() -> None:
    """Of texts that are shorter than their references, and longer, with n-grams of each length that are right."""
    right = ["the cat sat on the mat again", "prices rose again in the spring", "it was cold and it rained all day"]
    ours = ["the cat sat on the mat", "prices rose again in the spring of last year", "it was cold and it rained today"]
    found = compute_statistics("bleu", ours, right)["bleu"]
    sums = np.random.default_rng(1).integers(1, 9, (50, 3)) @ found.rows
    assert len(set(sums[:, 0] < sums[:, 1])) == 2 and sums.all()
    assert found.score(sums, 3).tolist() == pytest.approx([found.score(one, 3).item() for one in sums])


def test_of_several_references_the_closest_counts() -> None:
    (score, *_) = compute_statistics("rouge1", ["a b"], [["x y", "a b", "a"]]).values()
    assert score.rows.item() == 1


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(UserError, match="comet cannot be compared example by example; metrics that can: accuracy"):
        compute_statistics("comet", [], [])


@pytest.mark.parametrize("metric", DEFINITIONS)
def test_the_scores_that_are_compared_are_the_metrics_to_the_last_digit(metric: str) -> None:
    """`compare` prints what the records hold, though the sums over a draw are rounded in another way."""
    _, right, labels = sample(metric, 40, seed=1)
    sides = [[sample(metric, 40, seed)[0] for seed in seeds] for seeds in ((2, 3), (4,))]
    found = bootstrap_pairs(
        *([compute_statistics(metric, ours, right, labels) for ours in side] for side in sides),
        paired_seeds=False,
        resamples=2,
    )
    a, b = ([measure(metric, ours, right, labels).scores for ours in side] for side in sides)
    assert {name: one.a for name, one in found.items()} == {name: (a[0][name] + a[1][name]) / 2 for name in a[0]}
    assert {name: one.b for name, one in found.items()} == b[0]


def test_of_what_is_not_a_number_nothing_is_said() -> None:
    """A model that diverged predicts nan: its correlation is undefined, and so is the chance of the difference."""
    right = ["1.0", "2.0", "4.0"]
    a, b = ([compute_statistics("pearson", ours, right)] for ours in (["nan", "1.0", "2.0"], ["1.0", "2.5", "2.0"]))
    for found in bootstrap_pairs(a, b, paired_seeds=True, resamples=50).values():
        assert np.isnan([found.a, found.low, found.high, found.p]).all() and found.b > 0


def test_one_run_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(1)
    a = draw.normal(0.6, 0.2, 300)
    b = a + draw.normal(-0.02, 0.1, 300)  # paired: the difference varies less than either side
    ours = bootstrap_pairs([mean(a)], [mean(b)], paired_seeds=True, resamples=4000)["score"]

    def statistic(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        difference: np.ndarray = 100 * (x.mean(axis) - y.mean(axis))
        return difference

    options = {"paired": True, "method": "percentile", "n_resamples": 4000}
    theirs = stats.bootstrap((a, b), statistic, **options).confidence_interval
    assert ours.difference == pytest.approx(100 * (a.mean() - b.mean()))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.08)
    assert (ours.p < 0.05) == (not ours.low <= 0 <= ours.high)


def test_a_score_that_is_no_mean() -> None:
    """F1 of counts tp, fp, fn: over resamples it is computed from the counts, not averaged over examples."""
    draw = np.random.default_rng(2)
    right, guess = draw.random(200) < 0.3, draw.random(200) < 0.4
    counts = np.stack([right & guess, ~right & guess, right & ~guess], axis=1).astype(float)

    def f1(sums: np.ndarray, n: int) -> np.ndarray:
        tp, fp, fn = np.moveaxis(sums, -1, 0)
        score: np.ndarray = 2 * tp / (2 * tp + fp + fn)
        return score

    side = [{"f1": Statistics(counts, f1)}]
    zero = bootstrap_pairs(side, side, paired_seeds=True, resamples=100)["f1"]
    whole = counts.sum(axis=0)
    assert zero.a == pytest.approx(2 * whole[0] / (2 * whole[0] + whole[1] + whole[2]))
    assert (zero.difference, zero.low, zero.high, zero.p) == (0, 0, 0, 1)


def test_equal_models_differ_by_chance_one_time_in_twenty() -> None:
    draw = np.random.default_rng(3)
    tried = [
        bootstrap_pairs(
            [mean((draw.random(150) < 0.7).astype(float))],
            [mean((draw.random(150) < 0.7).astype(float))],
            paired_seeds=True,
            resamples=200,
        )["score"]
        for _ in range(200)
    ]
    assert 2 <= sum(not one.low <= 0 <= one.high for one in tried) <= 22  # 10 are expected


def test_seeds_add_their_own_chance() -> None:
    """Runs whose seeds differ by more than their examples: the interval is about as wide as the seeds' own spread."""
    draw = np.random.default_rng(4)
    offsets = np.array([-0.1, -0.05, 0, 0.05, 0.1])
    examples = draw.normal(0.5, 0.01, 400)
    a = [mean(examples + offset) for offset in offsets]
    b = [mean(examples) for _ in offsets]
    seeds = bootstrap_pairs(a, b, paired_seeds=True, resamples=2000)["score"]
    one = bootstrap_pairs(a[2:3], b[2:3], paired_seeds=True, resamples=2000)["score"]
    expected = 2 * 1.96 * 100 * offsets.std() / np.sqrt(len(offsets))
    assert seeds.high - seeds.low == pytest.approx(expected, rel=0.1)
    assert one.high - one.low < 0.01

    # The same seeds on both sides, with the same effect on both: paired it cancels, unpaired it does not.
    shifted = [mean(examples + offset + 0.02) for offset in offsets]
    paired = bootstrap_pairs(shifted, a, paired_seeds=True, resamples=500)["score"]
    unpaired = bootstrap_pairs(shifted, a, paired_seeds=False, resamples=500)["score"]
    assert paired.low == pytest.approx(2) == paired.high
    assert unpaired.low < 0 < unpaired.high
