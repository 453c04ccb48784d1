"""A finished run's model in Python, as a notebook wants it: `peftbench.load_run`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NoReturn

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.config import modifications
from peftbench.errors import UserError
from peftbench.modification.merge import obstacles
from peftbench.modification.state import FILE_NAME
from peftbench.scoring.evaluate import restored, saved_run
from peftbench.scoring.saved import run_folder, saved_record


def load_run(folder: str | Path, *overrides: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The backbone with the run's adapter attached, on the CPU and in evaluation mode, and its tokenizer.

    The model is one of transformers' own classes and is called and generates as they do. Its input is what the run's
    was: a source of a task with `task.prompt` stands in that prompt. The run's data need not be there. `deepcopy`,
    pickle and `state_dict` keep the adapter. Its `save_pretrained` and `push_to_hub` raise a UserError where what
    plain transformers reads back would be without it: `peftbench merge` writes what it can read. A run that attached
    nothing, such as `full` or `bitfit`, is saved as it was trained.

    Args:
        folder: of the run, as `peftbench train` names it at its end, or the first digits of its name below `outputs`.
        overrides: what is otherwise than then, such as `model.path=FOLDER` of a backbone that has moved.

    Raises:
        UserError: there is no finished run, or not the backbone that it was trained on.
    """
    folder = run_folder(str(folder))
    run = saved_run(folder, saved_record(folder), overrides)
    backbone = restored(folder, run, run.task)
    if modifications(run):
        keep_from_saving(backbone.model, folder)
    return backbone.model.eval(), backbone.tokenizer


def keep_from_saving(model: PreTrainedModel, folder: Path) -> None:
    """Have `save_pretrained` and `push_to_hub` of a model with modifications refuse to write it without them.

    Args:
        folder: of the run, which keeps them.
    """
    instead = (
        "" if obstacles(model) else f"write the weights with it inside by peftbench merge {folder} --out FOLDER, or "
    )
    for method in ("save_pretrained", "push_to_hub"):
        sentence = (
            f"{method} would write the model without its adapter, which from_pretrained has no place for; {instead}"
            f"keep the run, which has it in {folder / 'adapter' / FILE_NAME}, for peftbench.load_run."
        )
        setattr(model, method, partial(_refuse, sentence))


def _refuse(sentence: str, *_: object, **__: object) -> NoReturn:
    """At the top of a module, so that the model can be pickled."""
    raise UserError(sentence)
