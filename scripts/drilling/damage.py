"""What happens to files, and what others write into them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda content: content[: len(content) // 2],
    "cut by a byte": lambda content: content[:-1],
    "cut at a line's end": lambda content: content[: content.rfind(b"\n", 0, max(1, len(content) - 1)) + 1],
    "empty": lambda content: b"",
    "garbage": lambda content: random.Random(len(content)).randbytes(max(64, min(len(content), 1 << 16))),
    "zeros": lambda content: bytes(len(content)),
    "a bit flipped": lambda content: _flip(content),
    "null": lambda content: b"null",
    "{}": lambda content: b"{}",
    "[]": lambda content: b"[]",
    "a number": lambda content: b"1",
    "a text": lambda content: b'"x"',
    "nested": lambda content: b"[" * 5000 + b"]" * 5000,
}
GONE, FOLDER = "gone", "a folder in its place"


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :] if content else content


HOSTILE: list[Any] = [
    *(
        "",
        "\x1b]0;t\x07",
        "=1+1",
        "\n\\input{x}",
        "../../..",
        "$\\frac$",
        "é🙂",
        "\ud800",
        "</script>",
        "%s{}",
        "x" * 300,
    ),
    *(None, [], {}, 0, -1, 1e308, float("nan"), True, 10**400, [[]], {"": ""}, {"a": [None]}),
]


def spoil(value: Any, chance: random.Random) -> Any:
    """Return JSON values in which some are others."""
    if chance.random() < 0.04:
        return chance.choice(HOSTILE)
    if isinstance(value, dict):
        return {key: spoil(below, chance) for key, below in value.items() if chance.random() > 0.01}
    if isinstance(value, list):
        return [spoil(below, chance) for below in value]
    if isinstance(value, str) and chance.random() < 0.1:
        return value + str(chance.choice(HOSTILE[:10]))
    return value


def harm(file: Path, damage: str) -> None:
    """Damage a file."""
    if damage in (GONE, FOLDER):
        file.unlink()
        if damage == FOLDER:
            file.mkdir()
    else:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))


def write_data(folder: Path) -> None:
    """Write the rows of the runs: a few sentences with labels, and with sentences to write."""
    folder.mkdir()
    words = ["red", "green", "blue", "round", "heavy", "quick", "old", "new", "loud", "calm"]
    with (folder / "labels.jsonl").open("w") as labels, (folder / "texts.jsonl").open("w") as texts:
        for number in range(60):
            text = f"the {words[number % 10]} thing is {words[number * 7 % 10]} and has number {number}"
            print(json.dumps({"text": text, "label": words[number % 2]}), file=labels)
            print(json.dumps({"source": text, "target": f"{words[number % 10]} {number}"}), file=texts)
