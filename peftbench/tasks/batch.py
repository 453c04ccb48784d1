"""What a batch of examples is, for all that make or read one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# Makes a padded batch of tensors of examples, each a dict of columns.
Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]

NO_TOKEN = -100  # a label, or a predicted id, that is not a token: torch's cross-entropy leaves it out
