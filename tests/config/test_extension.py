"""The further values of a search: which they are, and which searches cannot have them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peftbench.config.extension import find_next_value
from peftbench.config.identity import hash_run
from peftbench.config.schema import Run, Variation
from peftbench.config.search import (
    build_trials,
    check_searches,
    extend_search,
    find_search_faults,
    list_further_trials,
    list_values,
    split_trials,
)
from peftbench.utils.errors import UserError
from tests.config.test_search import points, searching


@pytest.mark.parametrize(
    ("tried", "best", "further"),
    [
        ([1.0, 0.3, 3.0, 0.1, 10.0], 10.0, [30.0, 100.0, 300.0]),
        ([1.0, 0.3, 3.0, 0.1, 10.0], 0.1, [0.03, 0.01, 0.003]),
        ([1e-4, 3e-5, 3e-4], 3e-4, [1e-3, 3e-3]),
        ([5e-5, 1.5e-5, 1.5e-4, 5e-6, 5e-4], 5e-4, [1.5e-3, 5e-3]),
        ([1.0, 0.3, 3.0], 1.0, []),
        ([1.0, 3.0], 3.0, [9.0, 27.0]),
        ([1.0, 3.0], 1.0, [0.333333333333, 0.111111111111]),
        ([1.0, 3.0, 10.0, 10.0], 10.0, [30.0]),
        ([8, 4, 16], 16, [32, 64]),
        ([8, 4, 16], 4, [2, 1]),
        ([1, 2, 4], 1, []),  # there is no integer below it
        ([9, 20, 21], 9, [8, 4, 3, 2]),  # 9 times 20/21 would be rounded to 9
        ([1e300, 1e305, 1e308], 1e308, []),
        ([1e-320, 1e-200, 1.0], 1e-320, []),
    ],
)
def test_the_next_value_repeats_the_step_before_the_last(tried: list[Any], best: Any, further: list[Any]) -> None:
    found: list[Any] = []
    for _ in range(len(further) or 1):
        value = find_next_value([*tried, *found], [*tried, *found].index(found[-1] if found else best))
        if value is None:
            break
        found.append(value)
    assert found == further and [type(value) for value in found] == [type(best)] * len(found)


def extended(number: int, keys: dict[str, Variation] | None = None, **changes: Any) -> Run:
    run = searching(keys=keys)
    assert run.search is not None
    return replace(run, search=replace(run.search, extend=number, **changes))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (extended(-1), "search.extend=-1: it is a number of further values, at least 0"),
        (
            extended(1, {"trainer.learning_rate": Variation([1, 3]), "bottleneck": Variation([1, 2])}),
            "search.extend=1 is for a search over one key, and this one has 2: trainer.learning_rate, bottleneck",
        ),
        (extended(1, {"init": Variation(values=["bert", "lora"])}), "needs numbers, and init is tried at bert, lora"),
        (extended(1, {"bias": Variation(values=[True, False])}), "needs numbers, and bias is tried at True, False"),
        (
            extended(1, {"trainer.weight_decay": Variation(values=[0, 0.1])}),
            "needs values above 0, which have multiples, and trainer.weight_decay is tried at 0.0, 0.1",
        ),
        (extended(1, {"bottleneck": Variation([0.1, 0.2])}), "needs two different values.*bottleneck is tried at 1"),
        (extended(1, further=[3.0]), "search.further is set by peftbench; give search.extend"),
        (extended(1, further=["x"], trial=3), "search.extend=1 needs numbers, .*0.003, x"),
        (extended(1, further=[0.01], trial=4), "search.trial=4: search=lr3 has the trials 0 to 3"),
        (extended(1, trials=9), "search.extend=1 is for a search without search.trials"),
    ],
)
def test_what_cannot_be_extended_is_refused(run: Run, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_searches([([], run)])


def test_a_choice_is_made_once() -> None:
    with pytest.raises(UserError, match="extend=0,2: a search has one choice of its values; give one value of"):
        check_searches(points("method=lora,prefix", "search=lr3", "search.extend=0,2"))
    check_searches(points("search=lr3", "search.extend=1", "method=lora", "and", "search.extend=2", "method=prefix"))


def test_a_value_that_the_key_cannot_have_is_not_tried() -> None:
    run = extended(2, {"trainer.warmup": Variation(values=[0.1, 0.3, 0.9])})
    assert find_search_faults(run) == [] and extend_search(run, 2) is None
    lower = extend_search(run, 0)
    assert lower is not None and lower.search is not None
    assert lower.search.further == [0.0333333333333]


def test_values_are_added_in_turn() -> None:
    run: Run | None = extended(2)
    found = []
    for best in (2, 3, 4):
        assert run is not None and run.search is not None
        found.append(list_values(run, run.search)["trainer.learning_rate"])
        run = extend_search(run, best)
    assert found == [[1e-3, 3e-4, 3e-3], [1e-3, 3e-4, 3e-3, 1e-2], [1e-3, 3e-4, 3e-3, 1e-2, 3e-2]]
    assert run is None


@pytest.mark.parametrize("key", ["trainer.learning_rate", "bottleneck"])
def test_what_stands_for_a_further_trial_makes_it(key: str) -> None:
    """A launcher of Hydra's composes it anew from what is typed for it."""
    number = {"trainer.learning_rate": [1e-5, 3e-5, 1e-4], "bottleneck": [4, 8, 16]}[key]
    words = ["method=lora", "search=lr3", "search.extend=2", "seed=1", "search.seed=7"]
    ((overrides, run),) = split_trials(points(*words))[1]
    assert run.search is not None
    run = replace(run, search=replace(run.search, keys={key: Variation(values=number)}, further=[]))
    for best in (2, 3):
        longer = extend_search(run, best)
        assert longer is not None
        run = longer
    assert run.search is not None
    trials = list_further_trials((overrides, run))
    for place, (typed, trial) in enumerate(trials):
        assert trial.search is not None and trial.search.trial == 3 + place
        made = points(*typed)[0][1]
        assert made.search is not None and made.search.further == trial.search.further
        assert [type(value) for value in made.search.further] == [type(number[0])] * (place + 1)
        made = replace(made, search=replace(made.search, keys=run.search.keys))
        assert hash_run(build_trials(made)[3 + place]) == hash_run(build_trials(trial)[3 + place])
    assert build_trials(trials[1][1])[4].seed == 7


def test_a_search_that_does_not_go_on_is_called_what_it_was() -> None:
    assert hash_run(extended(0)) == hash_run(searching()) != hash_run(extended(1)) != hash_run(extended(2))


@pytest.mark.parametrize("name", ["lr3", "lr5"])
def test_the_shipped_searches_go_on_where_it_is_asked_for(name: str) -> None:
    ((_, run),) = points("method=lora", f"search={name}")
    assert run.search is not None and run.search.extend == 0 and extend_search(run, 2) is None
    ((_, run),) = points("method=lora", f"search={name}", "search.extend=2")
    assert find_search_faults(run) == [] and extend_search(run, len(build_trials(run)) - 1) is not None
