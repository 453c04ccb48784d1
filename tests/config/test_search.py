"""What a search tries, what it chooses and from what it looks away."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from peftbench.cli.results import main
from peftbench.cli.status import main as status
from peftbench.config.compose import TypedRun, compose_points
from peftbench.config.identity import hash_run
from peftbench.config.schema import LOSS, Init, Run, Search, Variation, find_conf_dir
from peftbench.config.search import build_trials, check_searches, find_search_faults, list_settings, split_trials
from peftbench.records.choice import describe_search_choice, find_best, settle_search, try_settle
from peftbench.records.location import locate_run
from peftbench.records.record import Failure, Score, Searched, Selection, Trial, find_record
from peftbench.records.recording import describe_run
from peftbench.sweeps.plan import Sweep
from peftbench.utils.errors import UserError
from tests.records.test_record import RUN as BARE
from tests.tables.test_table import record, saved

RUN = replace(BARE, model=replace(BARE.model, sizes="mini"), task=replace(BARE.task, sizes="mini"))


def searching(tmp_path: Path = Path("outputs"), seed: int = 1, keys: dict[str, Variation] | None = None) -> Run:
    """RUN with a search over the learning rate, or over other keys."""
    search = Search("lr3", keys or {"trainer.learning_rate": Variation(times=[1, 0.3, 3])})
    return replace(RUN, seed=seed, search=search, output_dir=str(tmp_path))


def ended(run: Run, value: float | None, report: float = 50.0, **changes: Any) -> None:
    """Write the record of a run that has come to an end, with a score on the selection split."""
    written = describe_run(run, locate_run(run), [], "done")
    written.folder.mkdir(parents=True)
    written.score, written.scores = report, {"report": Score("test", 1000, {"accuracy": report})}
    written.selection = Selection("validation", 500, "accuracy", value)
    splits = {role: {"split": role} for role in ("selection", "report")}
    replace(written, timings={"total_s": 10.0}, data={"splits": splits}, **changes).save()


def points(*words: str) -> list[TypedRun]:
    return compose_points(words, multirun=True)


def test_multiples_are_of_the_value_that_the_run_has() -> None:
    run = searching(keys={"trainer.learning_rate": Variation([1, 0.3, 3]), "bottleneck": Variation([0.1, 1, 2.4])})
    assert run.search is not None
    # RUN: learning rate 1e-3, bottleneck 4
    expected = [
        {"trainer.learning_rate": rate, "bottleneck": size} for rate, size in product([1e-3, 3e-4, 3e-3], [1, 4, 10])
    ]
    assert list_settings(run, run.search) == expected
    assert [(trial.trainer.learning_rate, trial.bottleneck) for trial in build_trials(run)] == [
        (one["trainer.learning_rate"], one["bottleneck"]) for one in expected
    ]


def test_a_trial_is_the_run_that_could_have_been_typed() -> None:
    (searched,) = points("method=lora", "search=lr3", "seed=7")
    (typed,) = points("method=lora", "trainer.learning_rate=0.003", "seed=7")
    assert locate_run(build_trials(searched[1])[2]) == locate_run(typed[1])


def test_a_part_of_a_mixture_can_be_searched() -> None:
    run = searching(keys={"mix.ffn.bottleneck": Variation(values=[2, 16])})
    assert [trial.mix["ffn"].bottleneck for trial in build_trials(run)] == [2, 16]
    assert RUN.mix["ffn"].bottleneck == 8


def test_a_choice_of_names_can_be_searched(tmp_path: Path) -> None:
    run = searching(tmp_path, keys={"init": Variation(values=["bert", "lora"])})
    assert find_search_faults(run) == [] and [trial.init for trial in build_trials(run)] == [Init.bert, Init.lora]
    ended(build_trials(run)[0], 2.0)
    ended(build_trials(run)[1], 1.0)
    note = settle_search(run)[1]
    assert (
        note is not None and note.chosen == {"init": "bert"} and json.dumps(note.keys) == '{"init": ["bert", "lora"]}'
    )


def test_points_that_differ_in_their_seed_share_trials() -> None:
    seeds = [([f"seed={seed}", "search=lr3"], searching(seed=seed)) for seed in (3, 1, 2)]
    others = [(["bottleneck=9", *words], replace(run, bottleneck=9)) for words, run in seeds]
    compared, final = split_trials([*seeds, *others])
    assert [(run.bottleneck, run.seed, run.search.seed) for _, run in final if run.search] == [
        (size, seed, 3) for size in (4, 9) for seed in (3, 1, 2)
    ]
    assert [(run.bottleneck, build_trials(run)[0].seed, run.search.trial) for _, run in compared if run.search] == [
        (size, 3, index) for size in (4, 9) for index in range(3)
    ]


def test_each_folder_has_the_trials_of_its_runs() -> None:
    compared, final = split_trials(points("method=lora", "search=lr3", "output_dir=a", "and", "output_dir=b"))
    assert [run.output_dir for _, run in compared] == ["a"] * 3 + ["b"] * 3
    assert [run.output_dir for _, run in final] == ["a", "b"]


def test_what_stands_for_a_job_makes_the_job() -> None:
    compared, final = split_trials(points("method=lora", "search=lr3"))
    for overrides, run in [compared[2], *final]:
        assert hash_run(points(*overrides)[0][1]) == hash_run(run)


def test_a_search_does_not_change_what_a_run_without_one_is_called() -> None:
    assert hash_run(searching()) != hash_run(replace(searching(), search=None)) == hash_run(replace(RUN, seed=1))


@pytest.mark.parametrize(
    ("values", "metric", "index"),
    [
        ([1.0, 3.0, 2.0], "accuracy", 1),
        ([1.0, 3.0, 2.0], LOSS, 0),
        ([2.0, 2.0, 1.0], "accuracy", 0),  # the first of equal ones
        ([2.0, 1.0, 1.0], LOSS, 1),
        ([math.nan, 1.0, None], "accuracy", 1),
        ([math.nan, 1.0, None], LOSS, 1),
        ([math.inf, -5.0], "accuracy", 1),
        ([None, math.nan], "accuracy", None),
        ([None, 0.0], "accuracy", 1),
    ],
)
def test_the_best(values: list[float | None], metric: str, index: int | None) -> None:
    assert find_best(values, metric) == index


def test_the_choice_never_looks_at_the_report_split(tmp_path: Path) -> None:
    run = searching(tmp_path)
    for trial, value, report in zip(build_trials(run), (60.0, 70.0, 65.0), (90.0, 10.0, 99.0), strict=True):
        ended(trial, value, report)
    chosen, note = settle_search(run)
    assert chosen.trainer.learning_rate == 3e-4 and chosen.search is None and note is not None
    assert note.chosen == {"trainer.learning_rate": 3e-4} and note.selection is not None
    assert (note.selection.split, note.selection.examples, note.selection.value) == ("validation", 500, 70.0)
    assert [trial.value for trial in note.trials] == [60.0, 70.0, 65.0]
    assert [trial.run for trial in note.trials] == [hash_run(trial) for trial in build_trials(run)]
    for seed in (1, 2):  # every seed takes what the trials' seed has chosen
        assert run.search is not None
        other = replace(run, seed=seed, search=replace(run.search, seed=1))
        assert hash_run(try_settle(other)) == hash_run(replace(build_trials(run)[1], seed=seed))


def test_trials_that_failed_or_diverged_are_the_worst_and_named(tmp_path: Path) -> None:
    run = searching(tmp_path)
    first, second, third = build_trials(run)
    ended(first, None)
    ended(second, 0.0)
    ended(third, None, status="failed", error=Failure("OutOfMemoryError", "CUDA"))
    chosen, note = settle_search(run)
    assert chosen.trainer.learning_rate == 3e-4 and note is not None
    assert [trial.status for trial in note.trials] == ["diverged", "done", "failed (OutOfMemoryError)"]


def test_where_all_failed_there_is_no_choice(tmp_path: Path) -> None:
    run = searching(tmp_path)
    for trial in build_trials(run):
        ended(trial, None)
    with pytest.raises(
        UserError, match=r"all 3 trials of method=mam on task=doctopic failed or diverged: .*0\.003: diverged"
    ):
        settle_search(run)
    assert try_settle(run) is run


def test_there_is_no_choice_before_the_last_trial(tmp_path: Path) -> None:
    run = searching(tmp_path)
    ended(build_trials(run)[0], 1.0)
    with pytest.raises(UserError, match="2 of 3 trials of method=mam on task=doctopic are not done"):
        settle_search(run)
    assert try_settle(run) is run


def test_a_rerun_trains_a_trial_that_is_chosen_once(tmp_path: Path) -> None:
    run = replace(searching(tmp_path), rerun=True)
    for trial, value in zip(build_trials(run), (1.0, 2.0, 3.0), strict=True):
        assert trial.rerun
        ended(trial, value)
    assert run.search is not None
    search = replace(run.search, seed=1)
    assert not settle_search(replace(run, search=search))[0].rerun
    assert settle_search(replace(run, seed=2, search=search))[0].rerun


def test_a_sweep_counts_its_trials_and_what_is_not_known_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [([f"seed={seed}", "search=lr3"], searching(tmp_path, seed)) for seed in (1, 2)]
    compared, final = split_trials(asked)
    sweep = Sweep(final, ["-m", "seed=1,2", "search=lr3"], compared)
    ended(build_trials(asked[0][1])[0], 1.0)

    def states() -> list[tuple[str, str]]:
        assert status([str(tmp_path), "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)  # one plan, however far the search has come
        keys = ("search", "seed", "trainer.learning_rate")
        return [(" ".join(run["settings"].get(key, "?") for key in keys), run["status"]) for run in found["runs"]]

    assert states() == [
        ("lr3 trial 1 0.001", "done"),
        ("lr3 trial 1 0.0003", "missing"),
        ("lr3 trial 1 0.003", "missing"),
        ("lr3 1 ?", "missing"),
        ("lr3 2 ?", "missing"),
    ]
    for trial, value in zip(build_trials(asked[0][1])[1:], (3.0, 2.0), strict=True):
        ended(trial, value)
    sweep.settle()
    assert states() == [
        ("lr3 trial 1 0.001", "done"),
        ("lr3 1 0.0003", "done"),  # this trial is the run
        ("lr3 trial 1 0.003", "done"),
        ("lr3 2 0.0003", "missing"),
    ]
    assert sweep.show() == 1
    assert "1 of 2 runs are done. 1 unfinished" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"trainer.learning_rat": Variation(values=[1])},
            "trainer.learning_rat is not a key .*did you mean learning_rate",
        ),
        (
            {"mix.prefix.bottleneck": Variation(values=[1])},
            "not a key of method=mam, whose mix has no prefix. Choices: ",
        ),
        ({"mix.ffn.botleneck": Variation(values=[1])}, "mix.ffn.botleneck is not a key .*did you mean bottleneck"),
        ({"task.max_eval": Variation(values=[1])}, "task.max_eval cannot be searched over"),
        ({"seed": Variation(values=[1, 2])}, "seed cannot be searched over"),
        ({"trainer.device": Variation(values=["cpu"])}, "trainer.device changes no result"),
        ({"trainer.max_steps": Variation(times=[1, 2])}, "trainer.max_steps is not a number for method=mam"),
        ({"init": Variation(values=["brt"])}, "init=brt is unknown; did you mean bert"),
        ({"init": Variation(times=[1, 2])}, "init is not a number for method=mam"),
        ({"trainer.epochs": Variation()}, "trainer.epochs needs either times"),
        ({"trainer.epochs": Variation(times=[1], values=[1])}, "trainer.epochs needs either times"),
        ({"trainer.epochs": Variation(values=["long"])}, "trainer.epochs=long: a number is expected"),
        ({"trainer.warmup": Variation(times=[1, 100])}, "trainer.warmup=6.0: it must be in"),
    ],
)
def test_what_means_nothing_is_refused(keys: dict[str, Variation], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_searches([([], searching(keys=keys))])


def test_only_the_training_is_searched_under_a_budget() -> None:
    run = replace(searching(keys={"bottleneck": Variation(times=[1, 2])}), budget="1%")
    (sentence_,) = find_search_faults(run)
    assert "with a budget, only trainer.* can be" in sentence_


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search=lr"], "search=lr is unknown; did you mean lr"),
        (
            ["search=lr3", "trainer.learning_rate=1e-3,1e-4"],
            "trainer.learning_rate is swept and is chosen by search=lr3",
        ),
        (["search=lr3", "search.trial=3"], "search=lr3 has the trials 0 to 2"),
        (["search.trial=0"], "search.trial=0 needs a search"),
    ],
)
def test_what_is_typed_wrong_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_searches(points(*words))


def test_the_same_value_of_a_searched_key_for_all_points_is_no_sweep() -> None:
    check_searches(points("method=lora,prefix", "search=lr3", "trainer.learning_rate=1e-3", "seed=1,2"))
    grids = ["search=lr3", "method=lora", "trainer.learning_rate=1e-3", "and", "method=prefix"]
    check_searches(points(*grids, "trainer.learning_rate=1e-2"))  # a value of its own for each method


def test_the_search_of_all_seeds_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Run] = []

    def check(run: Run) -> list[str]:
        checked.append(run)
        return [f"method={run.method} is wrong."]

    monkeypatch.setattr("peftbench.config.search.find_search_faults", check)
    with pytest.raises(UserError) as refused:
        check_searches(points("method=lora,prefix", "search=lr3", "seed=1,2,3"))
    assert [(run.method, run.seed) for run in checked] == [("lora", 1), ("prefix", 1)]
    assert refused.value.faults == ["method=lora is wrong.", "method=prefix is wrong."]


@pytest.mark.parametrize("name", [file.stem for file in (find_conf_dir() / "search").glob("*.yaml")])
def test_the_shipped_searches_are_sound(name: str) -> None:
    ((_, run),) = points("method=prompt", "task=docsum", f"search={name}")
    assert run.search is not None and run.search.name == name and find_search_faults(run) == []
    if run.search.trials is not None:  # a study, which has no trials before it begins
        return
    rates = [trial.trainer.learning_rate for trial in build_trials(run)]
    assert rates[0] == run.trainer.learning_rate and min(rates) < rates[0] < max(rates)


NOTE = Searched(
    "lr3",
    "final",
    1,
    {"trainer.learning_rate": [1e-3, 3e-4, 3e-3]},
    {"trainer.learning_rate": 3e-3},
    Selection("validation", 1500, "bleu", 41.5),
    trials=[
        Trial({"trainer.learning_rate": 1e-3}, "aaaaaaaa", 40.25, "done"),
        Trial({"trainer.learning_rate": 3e-4}, "bbbbbbbb", None, "diverged"),
        Trial({"trainer.learning_rate": 3e-3}, "cccccccc", 41.5, "done"),
    ],
)


def test_results_leave_trials_out_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trial = Searched("lr3", "trial", 1, NOTE.keys, {"trainer.learning_rate": 3e-4})
    for name, search in (("plain", None), ("final", NOTE), ("trial", trial)):
        saved(record(50.0, run=name, folder=tmp_path / name, search=search))
    assert (found := find_record(tmp_path / "final")) is not None and found.search == NOTE
    assert main([str(tmp_path), "--show", "run,search,searched", "--csv"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "1 trial of a search is left out; trials=true shows it.\n"
    lines = sorted(captured.out.splitlines()[1:])
    assert lines == ['final,lr3,"trainer.learning_rate 0.001: 40.25, 0.0003: diverged, 0.003: 41.50"', "plain,,"]
    assert main([str(tmp_path), "trials=true", "search=lr3", "--show", "run,searched", "--csv"]) == 0
    assert "trial,trial: trainer.learning_rate=0.0003" in capsys.readouterr().out.splitlines()


def test_a_line_says_what_was_searched() -> None:
    assert describe_search_choice(record(50.0, search=replace(NOTE, reported=True))) == (
        "search=lr3, mam, mini on doctopic (bleu on validation, 1,500 examples, seed 1) takes "
        "trainer.learning_rate=0.003; trainer.learning_rate 0.001: 40.25, 0.0003: diverged, 0.003: 41.50; the "
        "outermost trainer.learning_rate that was tried: the best may lie beyond it; chosen on the split that is "
        "reported on."
    )
