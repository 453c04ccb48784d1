"""The 95% interval of a mean over seeds: against a naive bootstrap, and where nothing can be said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from scipy.stats import t as student

from peftbench.metrics.bootstrap import draw_seed_weights
from peftbench.records.record import Record, load_records
from peftbench.tables.fields import FIELDS
from peftbench.tables.intervals import Interval, describe_ways, estimate_means
from peftbench.tables.row import Row, group_seeds
from tests.tables.test_claims import EXAMPLES, make_row

SCORES = [80.0, 82.0, 81.5]


def make_rows(folder: Path, keep_examples: bool = True) -> list[Row]:
    make_row(folder, SCORES, "adapter", 2, keep_examples=keep_examples)
    return group_seeds(load_records(folder)[0], "mean")


def estimate(row: Row, resamples: int = 2000) -> Interval | None:
    return estimate_means([row], FIELDS["score"], True, resamples).get(id(row))


def test_against_a_naive_bootstrap(tmp_path: Path) -> None:
    (row,) = make_rows(tmp_path)
    found = estimate(row, resamples=60)
    examples, weights = np.random.default_rng(0), draw_seed_weights(3, 60, seed=1 + 0 + 1 + 2)
    means = []
    for index in range(60):
        drawn = examples.integers(0, EXAMPLES, EXAMPLES)
        scores = [100 * fmean(example < score * EXAMPLES / 100 for example in drawn) for score in SCORES]
        means.append(sum(share * score for share, score in zip(weights[index], scores, strict=True)))
    assert found is not None and found.over == "seeds and examples" and found.seeds == 3
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert found.half == pytest.approx((found.high - found.low) / 2)


def test_the_width_is_that_of_seeds_and_examples(tmp_path: Path) -> None:
    """The variance of a mean of three accuracies, of which all seeds have most hits in common."""
    (row,) = make_rows(tmp_path)
    found = estimate(row)
    share = fmean(SCORES) / 100
    variance = 1e4 * share * (1 - share) / EXAMPLES + stdev(SCORES) ** 2 / 3
    assert found is not None and found.half == pytest.approx(1.96 * variance**0.5, rel=0.08)


def test_without_examples_it_is_students(tmp_path: Path) -> None:
    (row,) = make_rows(tmp_path, keep_examples=False)
    found = estimate(row)
    half = student.ppf(0.975, 2) * stdev(SCORES) / 3**0.5
    assert found is not None and found.over == "seeds"
    assert (found.low, found.high) == pytest.approx((fmean(SCORES) - half, fmean(SCORES) + half))


def test_of_a_number_that_is_not_the_score_the_seeds_alone_are_drawn(tmp_path: Path) -> None:
    (row,) = make_rows(tmp_path)
    found = estimate_means([row], FIELDS["seed"], False)[id(row)]
    assert found.over == "seeds" and found.low + found.high == pytest.approx(2.0)


def test_if_one_run_lacks_its_examples_none_are_drawn(tmp_path: Path) -> None:
    (row,) = make_rows(tmp_path)
    (row.records[1].folder / "examples.npz").unlink()
    found = estimate(row)
    assert found is not None and found.over == "seeds"


@pytest.mark.parametrize(
    "change",
    [
        lambda runs: runs[:1],
        lambda runs: [runs[0], replace(runs[1], point="another")],
        lambda runs: [runs[0], replace(runs[1], seed=runs[0].seed)],
        lambda runs: [runs[0], replace(runs[1], data={**runs[1].data, "scored_on": "other"})],
        lambda runs: [runs[0], replace(runs[1], status="diverged")],
    ],
    ids=["one seed", "two points", "one seed twice", "other examples", "one that diverged"],
)
def test_nothing_is_said(change: Callable[[tuple[Record, ...]], list[Record]], tmp_path: Path) -> None:
    (row,) = make_rows(tmp_path)
    assert estimate(row) is not None
    assert estimate(Row(tuple(change(row.records)))) is None


def test_rows_of_one_table_share_their_draws(tmp_path: Path) -> None:
    make_row(tmp_path, SCORES, "adapter", 2)
    make_row(tmp_path, SCORES, "lora", 2)
    rows = group_seeds(load_records(tmp_path)[0], "mean")
    one, other = estimate_means(rows, FIELDS["score"], True).values()
    assert one == other == estimate(rows[0])


def test_what_was_drawn_is_told() -> None:
    drawn, students = Interval(1, 2, 3, "seeds and examples"), Interval(1, 2, 2, "seeds")
    assert describe_ways([]) == ""
    assert describe_ways([drawn, drawn]) == "a bootstrap over 3 seeds and the examples"
    assert describe_ways([students, replace(students, seeds=5), drawn]) == (
        "a bootstrap over 3 seeds and the examples or Student's t over 2 to 5 seeds, for these examples only"
    )
    assert describe_ways([drawn, replace(drawn, seeds=2)]) == "a bootstrap over 2 or 3 seeds and the examples"
