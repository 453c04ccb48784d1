"""Text in messages: many names in a few words, and what others wrote, such as labels of a file, made safe to print."""

from __future__ import annotations

from collections.abc import Sequence

STANDS_FOR = "\N{REPLACEMENT CHARACTER}"
# The controls of ASCII and Latin-1, by which a text would command the terminal; the overrides and isolates that let it
# read in another order than it is stored; and half surrogate pairs and non-characters, which are in no valid file.
_UNPRINTABLE = dict.fromkeys(
    (
        *(code for code in range(0x20) if chr(code) not in "\t\n"),
        *range(0x7F, 0xA0),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
        *range(0xD800, 0xE000),
        *(0xFFFE, 0xFFFF),
    ),
    STANDS_FOR,
)


def list_first(names: Sequence[str], most: int) -> str:
    """Return the first names, and how many others there are: "a, b and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def format_count(number: int, noun: str) -> str:
    """Return how many of something there are: "1 run", "2,000 runs". The plural of the noun takes an s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def strip_controls(text: str) -> str:
    """Return the text with a � for each character that is none: only tabs and line feeds are left of the controls."""
    return text if text.isascii() and text.isprintable() else text.translate(_UNPRINTABLE)


def join_lines(text: str) -> str:
    """Return the text on one line, without controls."""
    return " ".join(strip_controls(text).split())
