"""Errors that are told in a sentence: of overrides, and of the file system."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftbench.cli.main import main
from peftbench.utils.errors import describe_os_error, describe_unknown, quote
from peftbench.utils.files import replace_file


def test_an_unknown_value_is_told_its_choices() -> None:
    assert (
        describe_unknown("method", "lroa", ["lora", "mam"])
        == "method=lroa is unknown; did you mean lora? Choices: lora, mam."
    )
    assert describe_unknown("init", "xavier", ["bert", "lora"]) == "init=xavier is unknown. Choices: bert, lora."
    assert describe_unknown("init", "xavier", []) == "init=xavier is unknown."


def test_a_long_value_is_cut_between_words() -> None:
    text = "a film that is as long as it is good, and " * 3
    assert quote(text) == "'a film that is as long as it is good, and a film that ...'"
    assert quote([text, 1]) == "['a film that is as long as it is good, and a film that ...]"
    assert quote("映" * 100, most=20) == f"'{'映' * 15} ...'"  # a text without spaces
    assert quote({"a": 1}) == "{'a': 1}"


def test_a_full_disk_is_told_and_a_broken_pipe_is_not() -> None:
    assert describe_os_error(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device."
    assert describe_os_error(OSError(errno.EACCES, "Permission denied", "/a/b")) == "/a/b: Permission denied."
    assert describe_os_error(OSError(errno.EPIPE, "Broken pipe")) is None
    assert describe_os_error(OSError("a library's own")) is None


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as error, replace_file(tmp_path / "record.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert describe_os_error(error.value) == f"{tmp_path / 'record.json'}: No space left on device."


@pytest.mark.parametrize("sweep", [[], ["-m", "seed=1,2"]])
def test_an_output_folder_that_cannot_be_made(
    sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    try:
        code = main(["train", "debug=smoke", f"output_dir={tmp_path / 'file' / 'outputs'}", *sweep])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 1 and error.count("\n") == 1 and error.endswith("Not a directory.\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words",
    [
        "ls keys",
        "train --help",
        "--version",
        pytest.param("train debug=smoke", marks=pytest.mark.slow),
        pytest.param("train -m debug=smoke seed=1,2", marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_has_seen_enough_ends_nothing(words: str, unbuffered: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "peftbench", *words.split()]
    command += [f"output_dir={tmp_path}"] if "debug" in words else []
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert len(list(tmp_path.rglob("predictions.jsonl"))) == ("smoke" in words) * (1 + ("-m" in words))


def test_what_an_encoding_lacks_is_replaced() -> None:
    command = [sys.executable, "-m", "peftbench", "ls", "axes"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "?h = x W_down W_up" in done.stdout
