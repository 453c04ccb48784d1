"""The docstring tasks, on small packages written into a temporary folder."""

from __future__ import annotations

import importlib.metadata
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from textwrap import dedent

import pytest

from peftbench.tasks import docstrings
from peftbench.tasks.docstrings import (
    SPLITS,
    Docstring,
    assign_split,
    gather_folder,
    gather_packages,
    make_summary_rows,
    make_topic_rows,
    read_versions,
)
from peftbench.utils.errors import UserError

Write = Callable[[str, str], None]

# The packages that are written here belong to no distribution: reading those that are installed takes 0.3 s each time.
list_distributions = cache(importlib.metadata.packages_distributions)

ALPHA = '''
    """The alpha package."""

    raise RuntimeError("a docstring package must never be imported")


    class Outer:
        """Holds the inner class.

        First paragraph of the body,
            with an indented line.


        Second paragraph.
        """

        class Inner:
            def method(self):
                """Does  the
                inner work."""

                def helper():
                    """Helps the method along."""


    if True:

        async def _private():
            """A private but real docstring."""


    def terse():
        """Too short."""
'''


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a source file into a folder that is on sys.path. The default cache lies in `tmp_path` too."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.metadata, "packages_distributions", list_distributions)

    def write_file(name: str, source: str) -> None:
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(source), encoding="utf-8")

    return write_file


def write_functions(write: Write, package: str, count: int, body: str) -> None:
    """A package of `count` functions, each with a summary of its own and a body of several words of `body`."""
    functions = [
        f'def f{i}():\n    """Summary number {i} of this module.\n\n    {i} {" ".join([body] * 40)}\n    """\n'
        for i in range(count)
    ]
    write(f"{package}/__init__.py", "\n".join(functions))


def names(found: list[Docstring]) -> list[str]:
    return [docstring.name for docstring in found]


def test_names_are_qualified_and_sorted_and_nothing_is_imported(write: Write) -> None:
    write("alpha/__init__.py", ALPHA)
    write("alpha/sub/deep.py", '"""A module without a package file."""')
    assert names(gather_packages(["alpha"])) == [
        "alpha",
        "alpha.Outer",
        "alpha.Outer.Inner.method",
        "alpha.Outer.Inner.method.helper",
        "alpha._private",
        "alpha.sub.deep",
    ]
    assert "alpha" not in sys.modules


def test_summary_is_one_line_and_body_keeps_its_paragraphs(write: Write) -> None:
    write("alpha/__init__.py", ALPHA)
    found = {docstring.name: docstring for docstring in gather_packages(["alpha"])}
    outer = found["alpha.Outer"]
    assert outer.summary == "Holds the inner class."
    assert outer.body == "First paragraph of the body,\n    with an indented line.\n\nSecond paragraph."
    assert outer.text == f"{outer.summary}\n\n{outer.body}"
    method = found["alpha.Outer.Inner.method"]
    assert (method.summary, method.body, method.text) == ("Does the inner work.", "", "Does the inner work.")


def test_equal_texts_are_kept_once_under_the_first_name(write: Write) -> None:
    write("alpha/__init__.py", 'def late():\n    """The same  TEXT here."""\n')
    write("beta/__init__.py", 'def copy():\n    """The same text here."""\n')
    assert names(gather_packages(["beta", "alpha"])) == ["alpha.late"]
    assert names(gather_packages(["beta"])) == ["beta.copy"]


def test_tests_and_broken_files_are_skipped(write: Write) -> None:
    write("alpha/__init__.py", '"""The alpha package."""')
    write("alpha/broken.py", '"""A docstring before a fault."""\ndef (')
    write("alpha/nul.py", '"""A docstring before a NUL."""\n\0')
    write("alpha/latin.py", "# coding: no-such-coding\n")
    for test_file in ("tests/helper.py", "test/helper.py", "testing/_data/helper.py", "test_alpha.py", "conftest.py"):
        write(f"alpha/{test_file}", f'"""The docstring of {test_file} itself."""')
    write("alpha/testing/__init__.py", '"""A testing module for users."""')
    assert names(gather_packages(["alpha"])) == ["alpha", "alpha.testing"]


def test_a_single_file_module_and_a_folder_that_is_not_installed(write: Write, tmp_path: Path) -> None:
    write("solo.py", '"""A module in one file."""')
    assert names(gather_packages(["solo"])) == ["solo"]
    elsewhere = tmp_path / "unpacked" / "gamma"
    elsewhere.mkdir(parents=True)
    (elsewhere / "part.py").write_text('"""A part of gamma."""')
    assert gather_folder(elsewhere, "gamma") == [Docstring("gamma", "gamma.part", "A part of gamma.", "")]


def test_the_cache_is_hit_until_the_files_change(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("alpha/__init__.py", '"""The alpha package."""')
    first = gather_packages(["alpha"])
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".jsonl"]

    with monkeypatch.context() as patched:
        patched.setattr(docstrings, "_read_file", lambda _: pytest.fail("parsed again"))
        assert gather_packages(["alpha"]) == first

    write("alpha/__init__.py", '"""Another alpha package altogether."""')
    assert gather_packages(["alpha"]) != first


def test_a_cache_that_cannot_be_written_is_done_without(write: Write, tmp_path: Path) -> None:
    write("alpha/__init__.py", '"""The alpha package."""')
    (tmp_path / "cache").touch()
    assert names(gather_packages(["alpha"])) == ["alpha"]


def test_workers_find_what_one_process_finds(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        write(f"alpha/m{i}.py", f'"""Module {i} of alpha."""')
    sources = docstrings._list_sources("alpha")
    alone = docstrings._read_all("alpha", sources)
    monkeypatch.setattr(docstrings, "_POOL_FROM", 1)
    assert docstrings._read_all("alpha", sources) == alone


@pytest.mark.parametrize("package", ["nunpy", "os.path", "sys", "no such"])
def test_a_missing_package_is_named(package: str) -> None:
    with pytest.raises(UserError, match=rf"^{package} is not an installed package.* or python for the standard"):
        gather_packages(["python", package])


def test_versions() -> None:
    assert read_versions(["python", "pytest"]) == {
        "python": ".".join(map(str, sys.version_info[:3])),
        "pytest": pytest.__version__,
    }


@pytest.mark.slow
def test_the_standard_library_is_found_without_its_tests(write: Write) -> None:
    found = {docstring.name: docstring for docstring in gather_packages(["python"])}
    assert found["json.dumps"].summary.startswith("Serialize ``obj`` to a JSON formatted")
    assert not [name for name in found if name.startswith(("test.", "idlelib.", "site-packages.", "unittest.test."))]


def test_splits_depend_on_the_name_alone_and_are_80_10_10() -> None:
    assert [assign_split(name) for name in ("json.dumps", "torch.nn", "pandas.concat")] == ["train", "train", "test"]
    counts = Counter(assign_split(f"package.name{i}") for i in range(10_000))
    assert 7_800 < counts["train"] < 8_200
    assert 850 < counts["validation"] < 1_150
    assert 850 < counts["test"] < 1_150


def test_own_names_are_masked_as_whole_identifiers() -> None:
    names_of = docstrings._match_names(["numpy", "torch", "transformers", "python"])
    masked = names_of.sub(
        "package", "NumPy np.array torch.nn PyTorch Hugging\nFace huggingface_hub my_np nps </s> pythonic"
    )
    assert masked == "package package.array package.nn package package huggingface_hub my_np nps </s> pythonic"
    assert docstrings._match_names(["numpy"]).sub("package", "pd.array(np)") == "pd.array(package)"


def test_topic_rows_are_masked_balanced_and_reproducible(write: Write) -> None:
    write_functions(write, "alpha", 120, "alpha.word")
    write_functions(write, "beta", 60, "Beta")
    rows = {split: make_topic_rows(["alpha", "beta"], split) for split in SPLITS}
    for split in SPLITS:
        counts = Counter(row["label"] for row in rows[split])
        assert counts["alpha"] == counts["beta"] > 0
        assert rows[split] == make_topic_rows(["beta", "alpha"], split)
        assert all(assign_split(row["name"]) == split for row in rows[split])
    text = " ".join(row["text"].lower() for split in SPLITS for row in rows[split])
    assert "alpha" not in text and "beta" not in text and "package.word" in text


def test_a_package_with_too_little_text_is_named(write: Write) -> None:
    write_functions(write, "alpha", 60, "word")
    write("beta/__init__.py", '"""Only this one text."""')
    with pytest.raises(UserError, match=r"^beta has no docstring of 150 characters in the test split\.$"):
        make_topic_rows(["alpha", "beta"], "test")


def test_summary_rows_hold_long_documents_with_short_summaries(write: Write) -> None:
    body = "A body that goes on. " * 10
    write(
        "alpha/__init__.py",
        f"""
        def good():
            '''A summary of good length.\n\n            {body}'''
        def brief():
            '''Too brief this.\n\n            {body}'''
        def arguments():
            '''x (`int`, *optional*): a parameter.\n\n            {body}'''
        def bodiless():
            '''A summary with a body too short.\n\n            Short.'''
        """,
    )
    rows = [row for split in SPLITS for row in make_summary_rows(["alpha"], split)]
    assert rows == [{"name": "alpha.good", "document": body.strip(), "summary": "A summary of good length."}]


def test_no_summary_stands_in_two_splits(write: Write) -> None:
    write_functions(write, "alpha", 300, "word")
    write_functions(write, "beta", 300, "other")  # the same summaries, other bodies
    rows = {split: make_summary_rows(["alpha", "beta"], split) for split in SPLITS}
    summaries = [{row["summary"] for row in rows[split]} for split in SPLITS]
    assert all(summaries)
    assert not (summaries[0] & summaries[1] or summaries[0] & summaries[2] or summaries[1] & summaries[2])


@pytest.mark.parametrize("harm", ["a line less", "garbage", "empty", "folder"])
def test_a_damaged_cache_of_docstrings_is_made_again(
    harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut at the end of a line, it would be half of the data without a word."""
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path))
    whole = gather_packages(["json"])
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    lines = content.splitlines(keepends=True)
    if harm == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes({"a line less": b"".join(lines[:-1]), "garbage": content[::-1], "empty": b""}[harm])
    assert gather_packages(["json"]) == whole
    assert f"{file} is damaged: it is a cache, and is made again" in capsys.readouterr().err
    assert harm == "folder" or file.read_bytes() == content
