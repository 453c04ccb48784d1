"""Is the Hugging Face hub there? One quick look, so that a machine without a network gets an answer at once.

The hub's own client tries for 20 s or more before it gives up.
"""

from __future__ import annotations

import socket
from functools import cache
from urllib.parse import urlsplit

from huggingface_hub import constants


@cache
def hub_missing() -> str | None:
    """Why the hub cannot be asked, as the middle of a sentence; None where it can."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    url = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=5).close()
    except OSError:
        return f"{url.hostname} cannot be reached from here"
    return None
