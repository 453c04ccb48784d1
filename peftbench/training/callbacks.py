"""Callbacks of the user's own: `callbacks=[mypkg.StopAtLoss]`, which Trainer calls at each of its events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from peftbench.config.own_parts import CALLBACKS, load_class, split_callback
from peftbench.utils.errors import UserError


def build_callbacks(callbacks: Sequence[Any]) -> list[TrainerCallback]:
    """Return the callbacks of a run, each built with its settings.

    Raises:
        UserError: one cannot be imported, is no TrainerCallback, or does not take its settings.
    """
    found: list[TrainerCallback] = []
    for name, settings in map(split_callback, callbacks):
        make = load_class(CALLBACKS, name, TrainerCallback)
        try:
            found.append(make(**settings))
        except Exception as error:
            raise UserError(
                f"{CALLBACKS}={name} cannot be built with its settings {settings}: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
    return found


def find_callback_faults(callbacks: Sequence[Any]) -> list[str]:
    """Return what is wrong with the callbacks of a run, before anything is loaded."""
    found: list[str] = []
    for one in callbacks:
        try:
            build_callbacks([one])
        except UserError as error:
            found.extend(error.faults)
    return found
