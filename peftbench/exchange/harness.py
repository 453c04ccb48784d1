"""A finished run as a model of lm-evaluation-harness, which scores it on the harness's tasks."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftbench.backbones.precision import choose_device
from peftbench.config.schema import TaskKind
from peftbench.config.unread import LOAD_HARNESS_MODEL
from peftbench.evaluation.finished import read_saved_run, restore_run
from peftbench.records.saved import find_run_folder, read_saved_record
from peftbench.utils.errors import UserError
from peftbench.utils.quiet import silence_libraries

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM


def load_harness_model(folder: str | Path, *overrides: str, device: str | None = None, **options: Any) -> HFLM:
    """Return the model of a run that writes text, with its adapter, for `lm_eval.simple_evaluate(model=...)`.

    The harness makes the inputs: neither the run's `task.prompt` nor its chat template is applied, unless
    `simple_evaluate` is asked for the tokenizer's template.

    Args:
        folder, overrides: see `load_run`.
        device: such as cuda:1; None: a GPU if there is one, as `trainer.device` says.
        options: further arguments of the harness's HFLM, such as `batch_size` and `max_length`.

    Raises:
        UserError: the harness is not installed, there is no finished run, or its task writes no text.
    """
    if find_spec("lm_eval") is None:
        raise UserError("The package lm_eval is not installed: pip install peftbench[harness].")
    from lm_eval.models.huggingface import HFLM

    silence_libraries()
    folder = find_run_folder(str(folder))
    run = read_saved_run(folder, read_saved_record(folder), overrides, LOAD_HARNESS_MODEL)
    if run.task.kind is not TaskKind.text_to_text:
        raise UserError(
            f"{folder} has a run of {run.task.kind.name}, and the harness scores models that write text; use peftbench "
            "evaluate."
        )
    model, tokenizer = restore_run(folder, run)
    model.to(choose_device(run.trainer) if device is None else torch.device(device))
    return HFLM(pretrained=model, tokenizer=tokenizer, **options)
