"""Which switches between the paper's text and its released code touch which runs; how they are set and refused."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from peftbench.config.compose import compose_run
from peftbench.config.fidelity import DEAD, SWITCHES, apply_fidelity
from peftbench.config.identity import hash_run
from peftbench.config.schema import (
    Fidelity,
    HeadInput,
    LayerNormPlace,
    Representation,
    Run,
    TaskKind,
    list_modifications,
)
from peftbench.utils.errors import UserError
from tests.families import list_methods

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "fidelity.md"
METHODS = list_methods()


def composed(*overrides: str) -> Run:
    return compose_run(overrides)


def names(run: Run, model_type: str) -> list[str]:
    return [deviation.name for deviation in apply_fidelity(run, model_type)[1]]


def test_the_two_sets_are_all_switches_off_and_all_on() -> None:
    """conf/, the schema and the table of switches agree, in the same order."""
    assert [item.name for item in fields(Fidelity)] == ["name", *SWITCHES]
    assert composed().fidelity == Fidelity()
    assert composed("fidelity=released_code").fidelity == Fidelity("released_code", *[True] * len(SWITCHES))


def test_the_document_names_every_switch() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in (*SWITCHES, *DEAD) if f"`{name}`" not in text] == []


@pytest.mark.parametrize("method", METHODS)
def test_the_papers_text_leaves_a_run_as_it_is(method: str) -> None:
    run = composed(f"method={method}", "task=sst2")
    for model_type in ("bart", "mbart", "roberta", "t5"):
        assert apply_fidelity(run, model_type) == (run, [])


HEAD, BEFORE, NORM, INIT, MLP, QUERY, RESIDUAL, DEAD_ONES = SWITCHES
IN_FORCE = {  # method and further overrides: on BART, on mBART, on RoBERTa (whose task has a head)
    "full": ([], [], []),
    "bitfit": ([], [], [HEAD]),
    "prompt": ([], [], [HEAD]),
    "lora": ([], [], [HEAD]),
    "lora_ffn": ([], [], [HEAD]),
    "lora_all": ([], [], [HEAD]),
    "lora_plus": ([], [], [HEAD]),
    "pfeiffer": ([], [], [HEAD]),
    "prefix": ([], [], [HEAD, DEAD_ONES]),
    "prefix_no_gating": ([], [], [HEAD]),
    "adapter": ([NORM], [NORM], [HEAD, NORM]),
    "adapter modified_representation=ffn": ([], [], [HEAD]),
    "adapter modified_representation=attention init=lora": ([NORM, INIT], [NORM, INIT], [HEAD, NORM, INIT]),
    "adapter insertion_form=parallel": (
        [BEFORE, NORM],
        [BEFORE, NORM, RESIDUAL],
        [HEAD, BEFORE, NORM, DEAD_ONES],
    ),
    "parallel_adapter": ([], [RESIDUAL], [HEAD, DEAD_ONES]),
    "scaled_parallel_adapter": ([], [RESIDUAL], [HEAD, DEAD_ONES]),
    "parallel_adapter_attention": ([BEFORE, NORM], [BEFORE, NORM], [HEAD, BEFORE, NORM]),
    "parallel_adapter_attention layer_norm=input": ([BEFORE], [BEFORE], [HEAD, BEFORE]),
    "parallel_adapter_attention modified_representation=heads_joint": ([NORM], [NORM], [HEAD, NORM]),
    "parallel_adapter_attention functional_form=identity": ([], [], [HEAD]),
    "mh_parallel_adapter": ([MLP, QUERY], [MLP, DEAD_ONES], [HEAD, MLP]),
    "mh_parallel_adapter modified_representation.head_input=hidden": ([], [], [HEAD]),
    "mam": ([], [RESIDUAL], [HEAD, DEAD_ONES]),
    "pa_attention_pa_ffn": ([BEFORE, NORM], [BEFORE, NORM, RESIDUAL], [HEAD, BEFORE, NORM, DEAD_ONES]),
    "prefix_lora_ffn": ([], [], [HEAD, DEAD_ONES]),
    "unipelt": ([], [], [HEAD, DEAD_ONES]),  # its adapter is sequential, so that only the prefix has dead sets
    "ia3": ([], [], [HEAD]),
    "layernorm_tuning": ([], [], [HEAD]),
}


def test_every_preset_is_in_the_table() -> None:
    assert {case.split()[0] for case in IN_FORCE} == set(METHODS) - {"head"}  # with a frozen head nothing is left


@pytest.mark.parametrize("case", IN_FORCE)
def test_the_switches_in_force(case: str) -> None:
    classifier = composed("task=sst2", "fidelity=released_code", f"method={case.split()[0]}", *case.split()[1:])
    writer = replace(classifier, task=replace(classifier.task, kind=TaskKind.text_to_text))
    assert (names(writer, "bart"), names(writer, "mbart"), names(classifier, "roberta")) == IN_FORCE[case]


def test_a_mixture_is_changed_part_by_part() -> None:
    run = composed("task=xsum", "method=pa_attention_pa_ffn", "fidelity=released_code")
    changed = list_modifications(apply_fidelity(run, "mbart")[0])
    assert {prefix: m.modified_representation.name.name for prefix, m in changed.items()} == {
        "": "ffn",
        "mix.attention.": "heads_joint",
    }
    assert [m.layer_norm.name for m in changed.values()] == ["none", "input"]
    assert [m.bottleneck for m in changed.values()] == [512, 30]
    assert list_modifications(run)["mix.attention."].layer_norm is LayerNormPlace.none  # the run itself is as it was


def test_what_modifies_both_sublayers_is_taken_apart() -> None:
    run = composed("task=xsum", "method=adapter", "mix=[prefix]", "fidelity=released_code")
    changed = list_modifications(apply_fidelity(run, "bart")[0])
    places = {prefix: (m.modified_representation.name.name, m.layer_norm.name) for prefix, m in changed.items()}
    assert places == {
        "": ("attention", "input"),
        "mix.modification_ffn.": ("ffn", "none"),
        "mix.attention.": ("heads", "none"),
    }
    named_so = replace(run, mix={"modification_ffn": run.mix["attention"]})  # a name that the user has taken
    changed = list_modifications(apply_fidelity(named_so, "bart")[0])
    places = {prefix: (m.modified_representation.name.name, m.layer_norm.name) for prefix, m in changed.items()}
    assert places == {
        "": ("attention", "input"),
        "mix.modification_ffn_.": ("ffn", "none"),
        "mix.modification_ffn.": ("heads", "none"),
    }


def test_an_mlp_of_another_width_is_kept() -> None:
    run = composed("task=xsum", "method=mh_parallel_adapter", "prefix_mlp=64", "bias=true", "fidelity=released_code")
    (changed,) = list_modifications(apply_fidelity(run, "bart")[0]).values()
    assert (changed.prefix_mlp, changed.bias) == (64, False)
    assert changed.modified_representation.head_input is HeadInput.normed_query


def test_a_switch_by_itself() -> None:
    run = composed("task=xsum", "method=parallel_adapter_attention", "fidelity.attention_adapter_before_output=true")
    changed, deviations = apply_fidelity(run, "bart")
    assert [deviation.name for deviation in deviations] == ["attention_adapter_before_output"]
    assert changed.modified_representation.name is Representation.heads_joint
    assert changed.layer_norm is LayerNormPlace.none
    run = composed("task=sst2", "method=mam", "fidelity=released_code", "fidelity.frozen_task_head=false")
    assert names(run, "roberta") == ["dead_parameters"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["task=xsum", "method=lora", "fidelity.frozen_task_head=true"],
            "fidelity.frozen_task_head=true changes nothing with method=lora and task=xsum; leave it out.",
        ),
        (["method=full", "fidelity.frozen_task_head=true"], "fidelity.frozen_task_head=true changes nothing"),
        (["method=lora", "fidelity.attention_adapter_norm=true"], "changes nothing with method=lora"),
        (["method=prefix", "fidelity.mbart_ffn_adapter_reads_residual=true"], "changes nothing with method=prefix"),
        (["method=head", "fidelity=released_code"], "fidelity.frozen_task_head=true with method=head leaves nothing"),
        (["fidelity=released"], "fidelity=released is unknown; did you mean released_code?"),
        (["fidelity.frozen_head=true"], "fidelity.frozen_head is not a key of the config (in fidelity); did you mean"),
        (["fidelity.frozen_task_head=maybe"], "fidelity.frozen_task_head=maybe: true or false is expected."),
        (
            ["method=lora", "modified_representation.head_input=normed_query"],
            "modified_representation.head_input is what a parallel form over heads reads; with "
            "modified_representation=query_value and insertion_form=parallel leave it out.",
        ),
        (
            ["method=adapter", "modified_representation.ffn_input=residual"],
            "modified_representation.ffn_input is what a parallel form over the FFN reads; with "
            "modified_representation=attention_ffn and insertion_form=sequential leave it out.",
        ),
        (["method=prefix", "modified_representation.head_input=normed_query"], "is a function of the query"),
    ],
)
def test_what_would_do_nothing_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        composed(*overrides)
    assert sentence in str(refused.value)


def test_a_switch_of_another_family_is_refused_once_the_family_is_known() -> None:
    run = composed("task=xsum", "method=parallel_adapter", "fidelity.mbart_ffn_adapter_reads_residual=true")
    assert names(run, "mbart") == ["mbart_ffn_adapter_reads_residual"]
    with pytest.raises(UserError, match="reads_residual=true changes nothing on bart with method=parallel_adapter"):
        apply_fidelity(run, "bart")


def test_the_sets_name_is_no_part_of_a_runs_identity() -> None:
    run = composed("method=parallel_adapter_attention")
    assert hash_run(replace(run, fidelity=Fidelity(name="mine"))) == hash_run(run)
    assert hash_run(replace(run, fidelity=Fidelity(attention_adapter_norm=True))) != hash_run(run)
