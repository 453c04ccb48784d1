"""`budget=`: how it is read, that its solution is the largest that fits, and where it is refused."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from peftbench.backbones.load import build_meta_backbone, load_config
from peftbench.cli.main import main
from peftbench.config.budget import find_largest_sizes, parse_budget
from peftbench.config.compose import compose_points, compose_run
from peftbench.config.identity import hash_run
from peftbench.config.schema import Modification, Run, Unfreeze, list_modifications
from peftbench.counts import solve as solving
from peftbench.counts.resolve import resolve_sizes
from peftbench.counts.solve import Costs, solve_budget
from peftbench.modification.attach import attach
from peftbench.modification.counting import count
from peftbench.utils.errors import UserError
from tests.families import ALIKE, FAMILIES, MORE_FAMILIES, PRESETS, build, run_on, table

MIX = {  # several bottlenecks, in ratios that round in different ways
    "mam": PRESETS["mam"],
    "mam_as_in_the_paper": {
        "": replace(PRESETS["mam"][""], bottleneck=512),
        "mix.attention.": replace(PRESETS["mam"]["mix.attention."], bottleneck=30),
    },
    "equal": {
        "": replace(PRESETS["mam"][""], bottleneck=8),
        "mix.attention.": PRESETS["parallel_adapter_attention"][""],
    },
    "three": {
        "": replace(PRESETS["lora_ffn"][""], bottleneck=3),
        "mix.attention.": replace(PRESETS["prefix"][""], bottleneck=7),
        "mix.layer.": replace(PRESETS["pfeiffer"][""], bottleneck=2),
    },
}


@pytest.mark.parametrize(
    ("budget", "parameters"),
    [
        ("6.7%", 27_221_527),  # 27,221,527.55 are not all there
        ("100%", 406_291_456),
        ("0.5%", 2_031_457),
        (".5%", 2_031_457),
        ("120%", 487_549_747),
        ("599k", 599_000),
        ("599K", 599_000),
        ("27.4M", 27_400_000),
        ("0.0005M", 500),
        ("599232", 599_232),
        ("1000000.0", 1_000_000),  # 1e6, as Hydra reads it
    ],
)
def test_a_budget_is_a_share_or_a_number(budget: str, parameters: int) -> None:
    assert parse_budget(budget, 406_291_456) == parameters


@pytest.mark.parametrize("budget", ["6,7%", "-1", "lots", "", "%", "6.7 %", "1G", "1.2.3", "5%%", "5.%", "1e6", "0x10"])
def test_what_is_no_budget(budget: str) -> None:
    with pytest.raises(
        UserError, match=r"is not a budget; give a share of the backbone such as budget=6\.7%, or a number"
    ):
        parse_budget(budget, 100)


@pytest.mark.parametrize("budget", ["0.5", "1.5", "0.0001k"])
def test_half_a_parameter_is_no_budget(budget: str) -> None:
    with pytest.raises(UserError, match="is not a whole number of parameters; give a share of the backbone such as"):
        parse_budget(budget, 100)


@pytest.mark.parametrize("weights", [(1,), (96,), (16, 16), (512, 30), (3, 7, 2), (2, 3), (1, 1000)])
@pytest.mark.parametrize("most", [25, 26, 40, 333, 5_000, 77_777])
def test_sizes_are_the_largest_of_all_scale_factors(weights: tuple[int, ...], most: int) -> None:
    """Against every scale factor at which a size grows, in order."""
    costs, fixed = (7, 5, 3)[: len(weights)], 10
    best = None
    factors = {Fraction(2 * k + 1, 2 * w) for w in weights for k in range(most)} if most < 1000 else None
    if factors is None:  # too many to try all: those of the first weight, one after the other, are enough to bound it
        found = find_largest_sizes(weights, costs, fixed, most)
        assert found is not None and fixed + sum(map(int.__mul__, found, costs)) <= most
        grown = min(Fraction(2 * n + 1, 2 * w) for n, w in zip(found, weights, strict=True))
        after = [max(1, int(grown * w + Fraction(1, 2))) for w in weights]
        assert fixed + sum(map(int.__mul__, after, costs)) > most
        return
    for factor in sorted({Fraction(0), *factors}):
        sizes = [max(1, int(factor * w + Fraction(1, 2))) for w in weights]
        if fixed + sum(map(int.__mul__, sizes, costs)) > most:
            break
        best = sizes
    assert find_largest_sizes(weights, costs, fixed, most) == best


def test_sizes_that_tie_grow_together() -> None:
    """The 6 that are left would do for one of two equal sizes; neither takes it. A half is rounded up."""
    assert find_largest_sizes([16, 16], [6, 6], 0, 24) == find_largest_sizes([16, 16], [6, 6], 0, 30) == [2, 2]
    assert find_largest_sizes([2, 1], [1, 1], 0, 3) == [2, 1]
    assert find_largest_sizes([2, 1], [1, 1], 0, 5) == [3, 2]  # at 3/2 of the ratio 2 : 1


def stored(family: str, found: dict[str, Modification], sizes: tuple[int, ...], unfreeze: Unfreeze) -> int:
    """By attaching it all to a model with weights."""
    model = build(family)
    sized = {key: replace(m, bottleneck=size) for (key, m), size in zip(found.items(), sizes, strict=True)}
    attach(model, sized, unfreeze)
    return count(model).stored


def sizes_of(run: Run) -> tuple[int | None, ...]:
    return tuple(m.bottleneck for m in list_modifications(run).values())


@pytest.mark.parametrize(
    ("family", "preset"),
    [case for case in table([*FAMILIES, *MORE_FAMILIES], "bart", "llama") if len(PRESETS[case.values[1]]) == 1],
)
def test_one_bottleneck_is_the_largest_that_fits(family: str, preset: str, tmp_path: Path) -> None:
    """Budgets on both sides of a size's count, by counting on models with weights."""
    six, seven = (stored(family, PRESETS[preset], (n,), Unfreeze.none) for n in (6, 7))
    run = run_on(family, tmp_path, PRESETS[preset])
    assert six < seven
    measured: dict[str, Costs] = {}
    for budget, expected in ((seven - 1, 6), (seven, 7)):
        assert sizes_of(solve_budget(replace(run, budget=str(budget)), measured=measured)) == (expected,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mix", "unfreeze"),
    [
        pytest.param(family, mix, unfreeze, marks=() if family == "roberta" else pytest.mark.slow)
        for family in (*FAMILIES, *MORE_FAMILIES)
        for mix in (["three"] if family in ALIKE else MIX)  # the ratios are solved alike whatever the family
        for unfreeze in (Unfreeze.none, Unfreeze.norm)
    ],
)
def test_several_bottlenecks_keep_their_ratio(family: str, mix: str, unfreeze: Unfreeze, tmp_path: Path) -> None:
    """Against counting at every scale factor in order, on models with weights; the trained norms count too."""
    weights = [m.bottleneck or 0 for m in MIX[mix].values()]
    factors = sorted({Fraction(2 * k + 1, 2 * w) for w in weights for k in range(1, 40)})
    reached: list[tuple[int, ...]] = [(1,) * len(weights)]
    for factor in factors:
        sizes = tuple(max(1, int(factor * w + Fraction(1, 2))) for w in weights)
        if sizes != reached[-1] and len(reached) < 5:
            reached.append(sizes)
    counts = [stored(family, MIX[mix], sizes, unfreeze) for sizes in reached]
    assert counts == sorted(set(counts))
    run = run_on(family, tmp_path, MIX[mix], unfreeze=unfreeze)
    measured: dict[str, Costs] = {}
    for sizes, fits, next_one in zip(reached, counts, counts[1:], strict=False):
        for budget in (fits, next_one - 1):
            assert sizes_of(solve_budget(replace(run, budget=str(budget)), measured=measured)) == sizes


def composed(*overrides: str) -> Run:
    return compose_run(overrides)


PAPER = [  # the paper's own sizes, and counts that tests/modification/test_counting.py has by hand
    (("method=mam", "task=xsum", "budget=27414528"), (512, 30)),
    (("method=mam", "task=xsum", "budget=27414527"), (511, 30)),
    (("method=mam", "task=xsum", "budget=6.75%"), (512, 30)),
    (("method=mam", "task=sst2", "budget=599232"), (16, 16)),
    (("method=mam", "task=sst2", "budget=599231"), (15, 15)),
    (("method=prefix", "task=xsum", "budget=14745600"), (200,)),
    (("method=pfeiffer", "task=xsum", "budget=29530175"), (599,)),
    (("method=prompt", "task=xsum", "budget=204800"), (200,)),
    (("method=head", "mix=[prefix]", "task=sst2", "budget=294912"), (16,)),
]


@pytest.mark.parametrize(("overrides", "sizes"), PAPER)
def test_the_papers_sizes_come_back(overrides: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    assert sizes_of(solve_budget(composed(*overrides))) == sizes


def test_a_split_is_of_what_is_stored() -> None:
    """Of BART-large at d = 1024 a bottleneck's step costs 24 (2 d + 1) at the FFN and 36 · 2 d at the attention."""
    r_cost, l_cost = 24 * (2 * 1024 + 1), 36 * 2 * 1024
    run = composed("method=mam", "task=xsum", "budget=6.7%")
    for shares in ([9.0, 1.0], [1.0, 1.0], [0.1, 0.9], [0.15, 0.05]):
        (r, length) = sizes_of(solve_budget(replace(run, budget_split=shares)))
        assert r is not None and length is not None
        wanted = shares[0] / shares[1] * l_cost / r_cost  # r for each prefix vector
        assert abs(r - wanted * length) <= (1 + wanted) / 2  # each is rounded
        assert 0 < 27_221_527 - 24 * 1024 - r * r_cost - length * l_cost < r_cost + l_cost
    as_in_the_paper = [512.0 * r_cost, 30.0 * l_cost]
    assert sizes_of(solve_budget(replace(run, budget="6.75%", budget_split=as_in_the_paper))) == (512, 30)


def test_a_budget_needs_no_labels() -> None:
    """torch has something to say of a task head for none."""
    run = composed("method=lora", "task=text_classification", "task.data_dir=.", "budget=1%")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert sizes_of(solve_budget(run)) == sizes_of(
            solve_budget(replace(run, task=replace(run.task, labels=["a", "b"])))
        )


def test_without_a_budget_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solving, "build_meta_backbone", None)
    run = composed("method=mam")
    assert solve_budget(run) is run


def test_a_sweep_builds_no_backbone_twice_for_the_same_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds and settings of the trainer share sizes; budgets share the costs of a unit of the bottleneck."""
    built: list[str] = []

    def build_counted(*arguments: Any) -> Any:
        built.append("a backbone")
        return build_meta_backbone(*arguments)

    words = ["method=lora,mam", "budget=5%,10%", "trainer.learning_rate=1e-3,1e-4", "seed=1,2,3"]
    runs = [run for _, run in compose_points(words, multirun=True)]
    alone = [solve_budget(run) for run in runs[::6]]
    monkeypatch.setattr(solving, "build_meta_backbone", build_counted)
    resolved = resolve_sizes(runs)
    assert len(runs) == 24 and len(built) == (2 + 3) + 2 * 2  # at 1 and 2 for each bottleneck, and each that was found
    assert [sizes_of(run) for run in resolved[::6]] == [sizes_of(run) for run in alone]
    for run, asked in zip(resolved, runs, strict=True):
        assert (run.seed, run.trainer, run.budget) == (asked.seed, asked.trainer, asked.budget)
        assert sizes_of(run) == sizes_of(
            next(one for one in resolved if (one.method, one.budget) == (run.method, run.budget))
        )


def test_what_is_known_of_other_runs_is_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one budget only: another has other sizes. What was refused is refused again."""
    words = ["method=lora", "budget=5%,10%", "seed=1,2"]
    runs, known = [run for _, run in compose_points(words, multirun=True)], {}
    (first,) = resolve_sizes(runs[:1], known)
    other = resolve_sizes(runs[2:3])
    monkeypatch.setattr(solving, "build_meta_backbone", None)
    (again,) = resolve_sizes(runs[1:2], known)
    assert (again.seed, sizes_of(again)) == (2, sizes_of(first)) and sizes_of(first) != sizes_of(other[0])
    with pytest.raises(TypeError, match="not callable"):
        resolve_sizes(runs[2:3], known)
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(UserError):
            resolve_sizes([replace(runs[0], budget="1")], known)


def test_what_cannot_be_resolved_is_said_once() -> None:
    runs = [run for _, run in compose_points(["method=lora", "budget=1,2", "seed=1,2"], multirun=True)]
    with pytest.raises(UserError) as refused:
        resolve_sizes(runs)
    assert [sentence.partition(":")[0] for sentence in refused.value.faults] == ["budget=1", "budget=2"]


def test_the_same_bottlenecks_are_the_same_run() -> None:
    """Asked for as a share, as a number, or by their sizes."""
    runs = [solve_budget(composed("method=mam", budget)) for budget in ("budget=10%", "budget=473k")]
    r, length = sizes_of(runs[0])
    by_hand = composed("method=mam", f"bottleneck={r}", f"mix.attention.bottleneck={length}")
    assert len({hash_run(run) for run in (*runs, by_hand)}) == 1
    assert hash_run(solve_budget(composed("method=mam", "budget=5%"))) != hash_run(by_hand)


def test_training_takes_the_hubs_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub model's architecture in conf/ is for counting without a network; training asks the hub, for config.json."""
    asked: list[str] = []

    def from_pretrained(source: str, **options: object) -> object:
        asked.append(source)
        return build("roberta").config

    run = composed("method=lora", "task=sst2", "model.hub_id=some/roberta", "budget=5%")
    monkeypatch.setattr("peftbench.backbones.load.AutoConfig.from_pretrained", from_pretrained)
    monkeypatch.setattr("peftbench.backbones.load.explain_missing_hub", lambda: None)
    backbone = count(build_meta_backbone(run.model, run.task, load_config(run.model))).backbone
    (size,) = sizes_of(solve_budget(run, as_trained=True))
    assert asked == 2 * ["some/roberta"]  # once by this test
    assert size is not None and size * 2 * 4 * 16 <= 0.05 * backbone < (size + 1) * 2 * 4 * 16  # 2 layers, 4 r d each


@pytest.mark.slow
def test_params_prints_the_solved_bottlenecks(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["params", "-m", "budget=0.5%,2%", "method=lora,mam", "task=sst2"]
    assert main([*sweep, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(run["budget"], run["method"]) for run in found] == [
        ("0.5%", "lora"),
        ("0.5%", "mam"),
        ("2%", "lora"),
        ("2%", "mam"),
    ]
    for run in found:
        share = float(run["budget"].rstrip("%"))
        assert 0.95 * share < run["percent"]["stored"] <= share
    assert main(["params", "-m", "budget=2%", "method=lora,mam", "task=sst2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("budget") == 1 and printed.count("2%") >= 2
    for run in found[2:]:
        assert f" {run['axes'][0]['bottleneck']} " in printed
    assert main(["params", "method=mam", "task=xsum", "budget=6.7%"]) == 0
    assert "solved for a budget of 6.7%, 27,221,527\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["method=mam", "task=xsum", "budget=1k"],
            "budget=1k: the smallest mam on bart_large stores 147,480 parameters",
        ),
        (["method=mam", "task=xsum", "budget=147479"], "give at least budget=147480."),
        (["method=lora", "unfreeze=bias", "budget=20000"], "budget=20000: the smallest lora on mini stores"),
        (
            ["method=lora", "budget=1%", "modified_representation.layers=[99]"],
            "modified_representation.layers: 99 is outside",
        ),
    ],
)
def test_what_does_not_fit_the_backbone(
    overrides: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["params", *overrides]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
    if "give at least" in captured.err:
        least = captured.err.split("give at least ")[1].rstrip(".\n")
        assert main(["params", *overrides[:-1], least]) == 0
