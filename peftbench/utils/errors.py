"""Error messages for users: plain sentences that say what is wrong, naming the key as typed, and what would be right.

`UserError` holds them. The command line prints them without a traceback and exits with code 2.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches

from peftbench.utils.text import strip_controls


class UserError(Exception):
    """A mistake that the user can correct. `faults` is a list of plain sentences, one for each mistake."""

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


class LostProcess(Exception):
    """Another process of a run on several devices has ended. What the run has written so far can be resumed."""


def print_faults(faults: Iterable[str]) -> None:
    """Print one plain sentence on each line of stderr."""
    for sentence in faults:
        warn(f"peftbench: {sentence}")


def warn(line: str) -> None:
    """Print a line on stderr, which is read even if the output goes to a file."""
    print(strip_controls(line), file=sys.stderr, flush=True)


# A full disk, limits, and paths that cannot be written to or read: their cause is outside peftbench.
OF_THE_MACHINE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOENT, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EBUSY),
)


def describe_os_error(error: OSError) -> str | None:
    """Return the sentence for an error of the file system that the user can correct, or None for any other error."""
    if error.errno not in OF_THE_MACHINE or error.strerror is None:
        return None
    if error.errno == errno.EEXIST and error.filename and os.path.islink(error.filename):
        return f"{error.filename} is a link to what does not exist."
    return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."


def quote(value: object, most: int = 60) -> str:
    """Return a value for a sentence, as Python writes it; if it is longer than `most`, cut between two words.

    >>> quote("a film that is as long as it is good", most=20)
    "'a film that is ...'"
    """
    text = repr(value)
    if len(text) <= most:
        return text
    whole = text[: most - 4].rpartition(" ")[0]
    kept = whole if 2 * len(whole) > most else text[: most - 4]  # a word without an end, such as Chinese text
    return f"{kept.rstrip(' ,')} ...{text[-1]}"


def is_memory_error(error: Exception) -> bool:
    """Return whether an error says that memory is not enough, without an import of torch."""
    return isinstance(error, MemoryError) or bool(
        type(error).__name__ == "OutOfMemoryError" or re.search(r"can't allocate memory|out of memory", str(error))
    )


def describe_unknown(what: str, value: object, choices: Iterable[object]) -> str:
    """Return the sentence for a `value` that is none of `choices`: the closest match first, then all of them.

    >>> unknown("method", "lroa", ["lora", "mam"])
    'method=lroa is unknown; did you mean lora? Choices: lora, mam.'
    """
    return f"{what}={value} is unknown{suggest(value, choices)}"


def suggest(value: object, choices: Iterable[object]) -> str:
    """Return the end of a sentence which says that `value` is none of `choices`."""
    names = [str(choice) for choice in choices]
    close = get_close_matches(str(value), names, n=3, cutoff=0.5)
    close.sort(key=lambda name: sorted(name) != sorted(str(value)))  # the same letters in another order come first
    hint = f"; did you mean {close[0]}?" if close else "."
    return f"{hint} Choices: {', '.join(names)}." if names else hint
