"""A key that is typed and would change nothing is refused; one that a preset sets is not."""

from __future__ import annotations

import pytest

from peftbench.config.compose import compose_points, compose_run
from peftbench.config.idle import OF_A_MODIFICATION, OF_A_STUDY, READERS
from peftbench.config.keys import list_keys
from peftbench.utils.errors import UserError

PROMPT = 'task.prompt="read {source}"'


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=adapter", "composition_function.scale=4"], "with composition_function=add, which has no scale; use"),
        (
            ["method=mam", "mix.attention.composition_function.scale=4"],
            "use mix.attention.composition_function.name=scaled, or leave it out.",
        ),
        (["method=full", "dropout=0.5"], "with method=full, which has no modification; leave it out."),
        (["method=full", "mix=[prefix]", "bottleneck=8"], "with method=full, which has no modification"),
        (["method=head", "modified_representation.layers=[0]"], "with method=head, which has no modification"),
        (["trainer.epochs=5"], "with trainer.max_steps=200, which counts; add trainer.max_steps=null, or leave it out"),
        (["task=wmt16_enro", "trainer.batch_size=8"], "with trainer.batch_tokens=4096, which counts; add"),
        (["trainer.evaluate_every=5"], "with trainer.keep=last, which needs no evaluation; add trainer.keep=best"),
        ([PROMPT], "with task=doctopic: it is for tasks that write text; leave it out."),
        (["task=docsum", "task.labels=[a,b]"], "with task=docsum: it is for tasks with labels"),
        (["task=docsum", "task.text_columns=[a]"], "with task=docsum: it is for tasks that write no text"),
        (["task=sst2", "task.stride=64"], "with task=sst2: it is for labels of words, and answers in a context"),
        (["task=sst2", "task.unanswerable=true"], "with task=sst2: it is for answers in a context"),
        (["task=sst2", "task.max_length=256"], "it is for conversations; task.max_source_length limits other inputs"),
        (["task=docsum", "task.max_length=256"], "with task=docsum: it is for conversations"),
        (["task=sst2", "task.max_target_length=64"], "with task=sst2: it is for tasks that write text"),
        (["task=sst2", "task.tools_column=tools"], "with task=sst2: it is for tasks that write text"),
        (["task=sst2", "task.generation.num_beams=1"], "with task=sst2: it is for tasks that write text"),
        (["task.hub_id=owner/texts"], "with task=doctopic, whose texts are docstrings of Python packages; leave it"),
        (["task=sst2", "task.data_dir=tests", "task.hub_config=mrpc"], "with task.data_dir=tests, which counts; add"),
        (["model=bart_large", "model.path=tests", "model.revision=main"], "with model.path=tests, which counts; add"),
        (["model.revision=main"], "with model=mini, which ships with peftbench; start from another model"),
        (["trackers_group=mine"], "without trackers; name one, as trackers=[tensorboard], or leave it out"),
        (["jobs=4"], "for one run; add -m and several values of a key, or for one run on several devices trainer.dev"),
        (["mps=true"], "for one run at a time; add jobs=auto, or leave it out"),
        (["search=lr3", "search.sampler=nsgaii"], "with search=lr3, which tries all of its values; add search.trials"),
        (["search=lr3", "search.sampler_seed=1"], "with search=lr3, which tries all of its values; add search.trials"),
        (["search=lr3", "search.prune=false"], "with search=lr3, which tries all of its values; add search.trials"),
        (["search=optuna", "search.prune=false"], "without budget= and trainer.keep=best, which pruning needs; add"),
    ],
)
def test_what_would_change_nothing_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        compose_run(words, reads_data=False)
    (sentence,) = refused.value.faults
    assert sentence.startswith(f"{words[-1]} changes nothing ") and said in sentence


def test_in_a_sweep_the_refusal_says_how_other_runs_have_the_key() -> None:
    """Two values of a key that changes nothing would be the same run twice, with two names."""
    with pytest.raises(UserError) as refused:
        compose_points(["method=full,lora", "bottleneck=8,16"], multirun=True, reads_data=False)
    *keys, hint = refused.value.faults
    assert [sentence.partition(" ")[0] for sentence in keys] == ["bottleneck=8", "bottleneck=16"]
    words = hint.partition(", as in -m ")[2].removesuffix(".").split()
    runs = [run for _, run in compose_points(words, multirun=True, reads_data=False)]
    assert [(run.method, run.bottleneck) for run in runs] == [("full", None), ("lora", 8), ("lora", 16)]


def test_a_key_that_no_run_of_a_sweep_needs_has_no_place_in_another_grid() -> None:
    with pytest.raises(UserError) as refused:
        compose_points(["method=full,head", "bottleneck=8"], multirun=True, reads_data=False)
    assert [sentence.split(" with ")[1].partition(",")[0] for sentence in refused.value.faults] == [
        "method=full",
        "method=head",
    ]


def test_methods_of_peft_take_a_scale_as_they_have_one() -> None:
    pytest.importorskip("peft")
    assert compose_run(["method=dora", "composition_function.scale=4"]).composition_function.scale == 4
    with pytest.raises(UserError, match=r"scale=4 changes nothing with peft\.type=OFT without composition_function="):
        compose_run(["method=oft", "composition_function.scale=4"])


@pytest.mark.parametrize(
    "words",
    [
        ["method=lora", "composition_function=add"],  # leaves the preset's scale behind
        ["method=adapter", "composition_function.scale=1"],  # as it is anyway
        ["method=full", "bottleneck=null", "dropout=null"],
        ["trainer.epochs=5", "debug=smoke"],  # whose steps are those of any line
        ["trainer.epochs=5", "trainer.max_steps=null"],
        ["task=wmt16_enro", "trainer.batch_size=8", "trainer.batch_tokens=null"],
        ["task=sst2", "trainer.evaluate_every=5"],  # keeps the best state
        ["task=docsum", PROMPT],
        ["task=squad", "task.stride=64"],
        ["search=optuna", "method=lora", "composition_function.scale=4"],  # some of its points are scaled
        ["search=optuna", "search.sampler=nsgaii", "jobs=2", "mps=auto"],
        ["search=optuna", "budget=2%", "trainer.keep=best", "search.prune=false"],
        ["search=lr3", "jobs=2"],  # several trials
        ["task=sst2", "task.data_dir=tests", "task.hub_id=null"],
        ["task=docsum", "task.generation.num_beams=1", "task.max_target_length=64"],
    ],
)
def test_what_changes_something_or_is_not_typed_runs(words: list[str]) -> None:
    compose_run(words, reads_data=False)


def test_each_point_of_a_sweep_is_checked() -> None:
    with pytest.raises(UserError) as refused:
        compose_points(["method=lora,full", "bottleneck=8,16"], multirun=True)
    *keys, _ = refused.value.faults
    assert [sentence.split(" changes")[0] for sentence in keys] == ["bottleneck=8", "bottleneck=16"]


def test_the_keys_that_are_checked_exist() -> None:
    names = {key.name for key in list_keys()}
    groups = {name.rpartition(".")[0] for name in names}
    assert {*OF_A_MODIFICATION, *OF_A_STUDY} <= names
    assert {f"task.{name}" for group in READERS for name in group} <= names | groups


@pytest.mark.parametrize("place", ["layers=[0,1,0]", "stacks=[decoder,decoder]", "attentions=[self,self]"])
def test_a_place_that_is_named_twice_is_refused(place: str) -> None:
    """It would be modified once, and be another row of a table."""
    with pytest.raises(UserError, match="modified_representation names a layer, stack or attention twice"):
        compose_run(["method=lora", f"modified_representation.{place}"])


@pytest.mark.parametrize("method", ["full", "bitfit", "layernorm_tuning"])
def test_a_method_that_only_unfreezes_is_not_the_head_alone(method: str) -> None:
    with pytest.raises(UserError, match=f"unfreeze=none with method={method} leaves the task head alone to train"):
        compose_run([f"method={method}", "unfreeze=none"])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("[sentence,label]", "has label, which is task.label_column: the model would read what it is to predict"),
        ("[label]", "has label, which is task.label_column"),
        ("[sentence,sentence]", "names a column twice"),
    ],
)
def test_columns_that_no_text_has_are_refused(columns: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        compose_run(["task=sst2", f"task.text_columns={columns}"], reads_data=False)
    assert refused.value.faults == [fault for fault in refused.value.faults if said in fault]
