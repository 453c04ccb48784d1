"""A finished run's model in Python, as a notebook wants it: `peftbench.load_run`."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.cli.evaluate import restored, saved_run
from peftbench.records.saved import run_folder, saved_record


def load_run(folder: str | Path, *overrides: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The backbone with the run's adapter attached, on the CPU and in evaluation mode, and its tokenizer.

    The model is one of transformers' own classes and is called and generates as they do. Its input is what the run's
    was: a source of a task with `task.prompt` stands in that prompt. The run's data need not be there. What its
    `save_pretrained` writes plain transformers loads without the adapter; `peftbench merge` writes what it can load.

    Args:
        folder: of the run, as `peftbench train` names it at its end, or the first digits of its name below `outputs`.
        overrides: what is otherwise than then, such as `model.path=FOLDER` of a backbone that has moved.

    Raises:
        UserError: there is no finished run, or not the backbone that it was trained on.
    """
    folder = run_folder(str(folder))
    run = saved_run(folder, saved_record(folder), overrides)
    backbone = restored(folder, run, run.task)
    return backbone.model.eval(), backbone.tokenizer
