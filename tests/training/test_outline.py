"""What the screen says before a training, and of a model that predicts one text only."""

from __future__ import annotations

import io
import signal
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from peftbench.config.compose import compose_run
from peftbench.config.schema import Run, Trainer
from peftbench.evaluation.recording import _note_one_prediction
from peftbench.records.record import RecordedCounts
from peftbench.training.outline import describe_reported_choice, describe_training
from peftbench.utils.progress import Display
from peftbench.utils.stopping import describe_ignored_interrupt
from tests.records.test_record import RUN
from tests.tables.test_table import record

COUNTS = RecordedCounts(backbone=4_737_408, trained=3_156_000, stored=272_064, head=1285, paper=None)


def described(head_too: bool = False, counts: RecordedCounts = COUNTS, **trainer: Any) -> str:
    settings = Trainer(learning_rate=1e-3, **trainer)
    run: Run = replace(RUN, method="mam", trainer=settings, task=replace(RUN.task, baselines=["majority", "head"]))
    data: Any = SimpleNamespace(train=[0] * 1280, splits={"train": {"split": "train", "examples": 1280}})
    return describe_training(run, counts, data, head_too)


def test_the_outline_of_a_training() -> None:
    assert described() == (
        "mam trains 3,156,000 parameters (272,064 to store) on mini of 4,737,408 for doctopic: 1,280 examples, "
        "3 epochs, 120 steps of 32 examples."
    )
    assert described(max_steps=7, accumulation=2).endswith(": 1,280 examples, 7 steps of 64 examples.")
    assert "mam trains 272,064 parameters on mini" in described(counts=replace(COUNTS, trained=272_064))
    assert described(head_too=True, epochs=1.0).endswith(
        "1 epoch, 40 steps of 32 examples. The task head is then trained alone in the same way: that score is the "
        "baseline head, and task.baselines=[majority] leaves it out."
    )


@pytest.mark.parametrize(
    ("predictions", "references", "said"),
    [
        (["good"] * 3, ["good", "bad", "good"], "All 3 predictions on test are 'good': the model ignores its input."),
        (["good", "bad", "good"], ["good", "bad", "good"], ""),
        (["good"] * 3, ["good"] * 3, ""),  # as it should be
        ([""] * 2, [["a", "b"], ["c"]], "All 2 predictions on test are '': the model ignores its input."),
    ],
)
def test_one_prediction_for_everything_is_noted(predictions: list[str], references: Any, said: str) -> None:
    noted, console = record(50.0, data={"notes": []}), Console(file=io.StringIO(), width=200)
    _note_one_prediction(noted, "test", predictions, references, Display(console))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().strip() == said
    assert noted.data["notes"] == ([said] if said else [])


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["task=rte"], True),
        (["task=sst2"], True),  # as in the paper
        (["task=sst2", "trainer=quick"], True),
        (["task=rte", "trainer.keep=last"], False),
        (["task=rte", "task.selection_split=held_out"], False),
        (["task=squad"], False),
        (["task=squad", "trainer.keep=best"], True),
        (["task=gsm8k"], False),
        (["task=gsm8k", "trainer.keep=best"], False),
        (["task=xsum"], False),
    ],
)
def test_a_choice_on_the_reported_split_is_noted(typed: list[str], said: bool) -> None:
    sentence = describe_reported_choice(compose_run(typed))
    assert (sentence is not None) is said
    assert sentence is None or sentence.startswith("The state is chosen on validation, the split that is reported on")


def test_a_process_that_ctrl_c_does_not_reach_says_how_it_is_stopped() -> None:
    """As the shell starts the background jobs of a script."""
    assert describe_ignored_interrupt() is None
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert "runs in the background; kill " in str(describe_ignored_interrupt())
    finally:
        signal.signal(signal.SIGINT, before)
