"""Write a finished run as a checkpoint that plain transformers loads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peftbench.backbones.load import build_meta_backbone, load_config
from peftbench.config.schema import Run, name_module
from peftbench.evaluation.finished import restore_backbone
from peftbench.modification.attach import attach_run
from peftbench.modification.merge import find_obstacles, merge
from peftbench.utils.errors import UserError


def write_merged(folder: Path, run: Run, out: Path) -> tuple[str, float, str | None]:
    """Write the merged model of the run in `folder`, with its tokenizer, to `out`.

    Returns:
        The name of the model's class, the share of the change that was lost by rounding (`modification.merge`), and how
        the backbone was quantised, if it was.

    Raises:
        UserError: the method has no merged form. This is found before weights are read.
        OSError: `out` cannot be written.
    """
    bare = build_meta_backbone(run.model, run.task, load_config(run.model))
    plain = list(bare.state_dict())
    attach_run(bare, run)
    if found := find_obstacles(bare):
        why = "; ".join(found[n] if n == name_module("") else f"mix.{n}: {found[n]}" for n in sorted(found))
        raise UserError(f"method={run.method} cannot be merged into the backbone's weights: {why}.")
    backbone = restore_backbone(folder, run, run.task, unpacked=True)
    share = merge(backbone.model)
    tensors = backbone.model.state_dict()
    with _naming(out):
        backbone.model.save_pretrained(out, state_dict={name: tensors[name] for name in plain})
        backbone.tokenizer.save_pretrained(out)
    return type(backbone.model).__name__, share, backbone.quantization


@contextmanager
def _naming(out: Path) -> Iterator[None]:
    """Raise OSError, with the folder, for an error of the system that safetensors or tokenizers found in Rust: they
    raise it as other kinds."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(out)) from error
