"""Check quickly whether the Hugging Face hub can be reached: without a network the answer comes at once.

The hub's own client tries for 20 s or more before it gives up.
"""

from __future__ import annotations

import socket
from functools import cache
from urllib.parse import urlsplit

from huggingface_hub import constants


@cache
def explain_missing_hub() -> str | None:
    """Return why the hub cannot be reached, as the middle of a sentence, or None if it can."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    url = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=5).close()
    except OSError:
        return f"{url.hostname} cannot be reached from here"
    return None
