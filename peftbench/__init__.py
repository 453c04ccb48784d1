"""peftbench: which parameter-efficient fine-tuning method, where in the network, how large, for my model and task.

A command-line tool over the four axes of He et al. (ICLR 2022, arXiv 2110.04366). Importing this package imports
no torch; the subcommands do that when they need it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__version__ = "0.1.0"


def load_run(folder: str | Path, *overrides: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A finished run's model with its adapter, and its tokenizer: see `evaluation.finished`, which imports torch."""
    from peftbench.evaluation import finished

    return finished.load_run(folder, *overrides)


def load_harness_model(folder: str | Path, *overrides: str, device: str | None = None, **options: Any) -> HFLM:
    """A finished run as a model of lm-evaluation-harness: see `exchange.harness`, which imports torch."""
    from peftbench.exchange import harness

    return harness.load_harness_model(folder, *overrides, device=device, **options)
