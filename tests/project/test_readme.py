"""The README is short and its figures are right; the commands of the pages compose, and run in their smoke form."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from peftbench.backbones import sites
from peftbench.cli.main import main
from peftbench.config.axes import is_allowed, list_points
from peftbench.config.compose import compose_points

CHECKOUT = Path(__file__).resolve().parents[2]
DOCS = CHECKOUT / "docs"
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
SHOW = "--cfg job"  # an option of the command, not an override


def commands_of(page: str, begin: str = "peftbench train") -> list[str]:
    """The lines in the bash blocks of a page that begin so, without comments, each on one line."""
    blocks = re.findall(r"```bash\n(.*?)```", (CHECKOUT / page).read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split(" #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if line.startswith(begin)]


PAGES = {page: commands_of(page) for page in ("README.md", "docs/command_line.md")}
COMMANDS = list(dict.fromkeys(command for commands in PAGES.values() for command in commands))


def arguments(command: str, tmp_path: Path) -> list[str]:
    """The command's words after `peftbench`, with an existing folder in place of FOLDER, and an existing text."""
    (tmp_path / "train.csv").write_text("text,label\ngood,yes\nbad,no\n", encoding="utf-8")
    (tmp_path / "held_out.txt").write_text("A text of some words.\n" * 40, encoding="utf-8")
    places = {"FOLDER": str(tmp_path), "retention=held_out.txt": f"retention={tmp_path / 'held_out.txt'}"}
    return [re.sub("|".join(places), lambda match: places[match[0]], word) for word in shlex.split(command)[1:]]


def require_trackers(command: str) -> None:
    """Skip the test of a command that names trackers whose packages are not installed."""
    for names in re.findall(r"trackers=\[(.*?)\]", command):
        for name in names.split(","):
            pytest.importorskip(name)


def test_the_readme_is_read_aloud_in_two_minutes() -> None:
    """At 170 words a minute, without tables, comments and code."""
    unread = r"```.*?```|<!--.*?-->|!\[.*?\]|\]\(.*?\)|^[#|].*?$"
    prose = re.sub(unread, " ", README, flags=re.DOTALL | re.MULTILINE)
    assert 200 < len(re.findall(r"\S*\w\S*", prose)) <= 340


def test_the_readme_counts_what_there_is() -> None:
    methods = len(list((CHECKOUT / "conf" / "method").glob("*.yaml")))
    families = sum(len(family.model_types) for family in sites.FAMILIES)
    points = list(list_points())
    running = sum(is_allowed(point) for point in points)
    assert f"{methods} [methods]" in README and f"{families} families" in README
    assert f"Of {len(points)} combinations, {running} run" in README


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in DOCS.glob("*.md"))])
def test_no_page_says_a_thing_twice(page: str) -> None:
    paragraphs = [
        " ".join(part.split()) for part in re.split(r"\n\s*\n", (CHECKOUT / page).read_text(encoding="utf-8"))
    ]
    counts = Counter(paragraph for paragraph in paragraphs if len(paragraph.split()) > 12)
    assert [paragraph for paragraph, count in counts.items() if count > 1] == []


def test_the_list_of_pages_has_each_page() -> None:
    listed = re.findall(r"^\| \[.*?\]\((.*?)\) \|", (DOCS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    there = [page.name for page in DOCS.glob("*.md") if page.name != "README.md"]
    assert sorted(listed) == sorted([*there, "own_parts/README.md"])


@pytest.mark.parametrize(("page", "least"), [("README.md", 5), ("docs/command_line.md", 15)])
def test_the_page_has_commands(page: str, least: int) -> None:
    assert len(PAGES[page]) >= least


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(c, marks=pytest.mark.slow) if "seed=1," in c or "table6" in c else c for c in COMMANDS
    ],  # dozens of runs
)
def test_commands_compose(command: str, tmp_path: Path) -> None:
    require_trackers(command)
    words = arguments(command.replace(SHOW, ""), tmp_path)[1:]
    assert compose_points([word for word in words if word != "-m"], multirun="-m" in words)


LOOKS = [
    command
    for page in ("README.md", "docs/command_line.md", "outputs/reference/README.md")
    for command in commands_of(page, "peftbench")
    if command.split()[1] in ("explain", "params", "results", "plot", "report", "advise", "reproduce")
    and not any(word in command for word in ("RUN", "FOLDER", "general_loss"))  # which the project's records lack
]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(c, marks=[] if c.startswith("peftbench results") else pytest.mark.slow)
        for c in dict.fromkeys(LOOKS)
    ],
)
def test_commands_that_look_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with the project's own records."""
    (tmp_path / "outputs").mkdir()
    for folder in ("reference", "reference/text", "reference/grid_sst2"):
        (tmp_path / "outputs" / Path(folder).name).symlink_to(CHECKOUT / "outputs" / folder, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0


def test_the_experiment_of_the_page_composes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (CHECKOUT / "docs/command_line.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"experiment/reviews\.yaml.*?```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "reviews.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "films.csv").write_text("review,sentiment\ngood,yes\nbad,no\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    points = compose_points(["experiment=reviews", "trainer.epochs=2"], multirun=True, config_dir=str(tmp_path))
    runs = [run for _, run in points]
    assert {(run.method, run.seed) for run in runs} == {(m, s) for m in ("lora", "mam", "bitfit") for s in (1, 2)}
    assert {run.task.train_file for run in runs} == {"films.csv"} and {run.trainer.epochs for run in runs} == {2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        c
        for c in COMMANDS
        # What `speed=true` measures is in tests/evaluation/test_retention.py.
        if not any(word in c for word in ("FOLDER", "task=", "experiment=", "speed=true"))
        and f"{c} jobs=auto" not in COMMANDS
    ],
)
def test_commands_run(command: str, tmp_path: Path) -> None:
    require_trackers(command)
    train, *words = arguments(command.replace("debug=smoke", ""), tmp_path)
    # First: of several grids the first one's words are those of all.
    assert main([train, "debug=smoke", f"output_dir={tmp_path / 'outputs'}", *words]) == 0
