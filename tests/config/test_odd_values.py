"""Values that mean nothing, sweeps over nothing and paths of every kind: a sentence, or the right thing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from peftbench.cli.main import main
from peftbench.config.compose import compose_points, compose_run
from peftbench.utils.errors import UserError

NESTED = "[" * 1000 + "]" * 1000


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("task.max_source_length=range(0,3,-1)", "names no value"),
        ("seed=range(0,3,0)", "its step is 0"),
        ("seed=interval(5,1)", "an interval has no list of values"),
        ("method=glob(zz*)", "names no value"),
        ("nope.x=glob(*)", "names no value"),
        ("seed=range(1,100000000)", "more than 10,000 runs"),
        (f"task.labels={NESTED}", "nested too deep"),
        ("task.data_files=${oc.env:HOME}", "a mapping is expected"),
        ("task.labels=${oc.env:HOME}", "a list is expected"),
        ("trainer.checkpoint_minutes=" + "9" * 400, "a number is expected"),
        ("trainer.fused_loss=2", "true or false is expected"),
        ("composition_function.learned=2", "true or false is expected"),
        ("task.generation.length_penalty=nan", "it must be a finite number"),
        ("task.generation.no_repeat_ngram_size=-3", "at least 0"),
        ("task.generation.min_length=-1", "at least 0"),
        ("trainer.epochs=1e38", "at most 1,000,000"),
        ("bottleneck=" + "9" * 40, "at most 2147483647"),
        ("model.name=../x", "without slashes"),
        ("size=x", "size=x: size is a column of conf/sizes.yaml; choose one with model.sizes=COLUMN."),
        ("size.lora.r=8", "model.sizes=COLUMN, or change one with sizes.COLUMN.lora.r=."),
    ],
    ids=lambda text: text[:40],
)
def test_it_is_refused_in_a_sentence(word: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        compose_points(["task=sst2", "method=lora", "model.path=null", word], multirun=True, reads_data=False)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "path", ["a b/é", "-x", "~/日本/#1", "it's", "a=b", "(x)", "a;b", "{x}", "a\\b", '"', "C:\\x", "x'y\"z", "a\nb"]
)
def test_the_value_of_a_path_is_any_path(path: str) -> None:
    assert compose_run([f"output_dir={path}"]).output_dir == path


def test_paths_may_still_be_swept_over_and_quoted() -> None:
    points = compose_points(["output_dir=a,b"], multirun=True)
    assert [run.output_dir for _, run in points] == ["a", "b"]
    assert compose_run(["output_dir='a b, c'"]).output_dir == "a b, c"


@pytest.mark.parametrize("kind", ["loop", "dangling", "file", "long"])
def test_an_output_dir_that_cannot_be_one_is_told(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / (kind if kind != "long" else "x" * 300)
    if kind in ("loop", "dangling"):
        place.symlink_to(place if kind == "loop" else tmp_path / "nowhere" / "x")
    elif kind == "file":
        place.write_text("")
    line = ["task=doctopic", "model=mini", "method=lora", "seed=1,2", f"output_dir={place}"]
    assert main(["train", "-m", *line]) == 1
    assert str(place) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "-m", "method=lora", "trainer.epsilon=str('é🙂')"], "trainer.epsilon=é🙂 cannot be read"),
        (["params", f"mix={NESTED[200:-200]}"], "mix"),  # nested so that a parser gives up at some depths of the stack
        (["params", "experiment=[[a]]"], "experiment takes one option"),
        (["params", "~experiment=[[]]"], "experiment"),
        (["train", "method=lora", "hydra.verbose=[1]"], "hydra.verbose=[1]: Hydra refuses this ("),
        (["train", "--cfg", "job", "method=lora", "hydra.job.env_copy=[NONE_SUCH]"], "hydra.job.env_copy=[NONE_SUCH]:"),
        (["train", "--cfg", "job", "method=lora", "~hydra.run"], "hydra.run"),
        (
            ["train", "method=lora", "search=lr3", "hydra.verbose=false"],
            "hydra.verbose=false: Hydra would start",
        ),
        (["merge", "~no-such-user/x", "--out", "y"], "~no-such-user/x has no run"),
        (["train", "method=lora", "search=optuna", "search.trials=99999999"], "a study has 10,000 trials at most"),
    ],
    ids=lambda words: " ".join(words)[:60] if isinstance(words, list) else None,
)
def test_odd_words_are_sentences(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out


def test_a_path_of_brackets_is_a_path() -> None:
    """Hydra's parser gives up on it, and so does Python's stack."""
    assert compose_run([f"output_dir={NESTED}"]).output_dir == NESTED


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trackers=[[],[]]", "trackers=[[], []]: a list of texts is expected"),
        ("task.labels=[{a:1}]", "task.labels=[{'a': 1}]: a list of texts is expected"),
        ("trainer.betas=[[],[]]", "trainer.betas=[[], []]: a list of numbers is expected"),
        ("modified_representation.layers=[[1]]", "layers=[[1]]: a list of whole numbers is expected"),
        ("modified_representation.stacks=[[encoder]]", "a list of encoder, decoder is expected"),
    ],
)
def test_lists_hold_what_belongs_there(word: str, said: str) -> None:
    """OmegaConf takes a list in the place of a text or a number."""
    with pytest.raises(UserError) as refused:
        compose_run(["method=lora", word], reads_data=False)
    assert said in str(refused.value)


def test_odd_words_beside_flags_of_hydra_are_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()  # which --info has print everything, for later tests into a file that is closed
    level, handlers = root.level, [*root.handlers]
    try:
        assert main(["train", "method=lora", "+seed==", "--info", "defaults"]) == 2
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
    assert "+seed==" in capsys.readouterr().err
