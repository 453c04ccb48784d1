"""The page of `peftbench report` in a real browser: sorted, filtered, drawn and clicked, also at a phone's width.

Needs playwright, of the extra `dev`, and Chromium: one on the PATH (Debian: apt-get install chromium), or playwright's
own (playwright install chromium). With PEFTBENCH_SCREENSHOTS=FOLDER it leaves pictures of what it saw.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftbench.cli.report import main
from peftbench.records.record import find_finished, load_records
from peftbench.records.recording import start_record
from peftbench.records.run_files import write_predictions
from peftbench.tables.columns import choose_columns
from peftbench.tables.row import find_front, group_seeds, make_rows
from tests.records.test_record import RUN
from tests.tables.test_report import EVIL, make_runs

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow

SIZES = {"desktop": (1360, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as starter:
        try:  # in a container the browser's own sandbox has no rights; what it opens here is our own file
            made = starter.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield made
        made.close()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "outputs"
    make_runs(folder)
    return folder


@pytest.fixture(params=list(SIZES))
def page(request: pytest.FixtureRequest, browser: Any, outputs: Path) -> Iterator[Any]:
    """The page of thirty runs; at its end the browser must have had nothing to complain of."""
    yield from _opened(_screen(browser, request.param), outputs, request.node.name)


def _screen(browser: Any, name: str) -> Any:
    width, height = SIZES[name]
    return browser.new_context(viewport={"width": width, "height": height}, has_touch=width < 500)


def _opened(context: Any, outputs: Path, name: str) -> Iterator[Any]:
    file = outputs.parent / "report.html"
    assert main([str(outputs), "--out", str(file)]) == 0
    page, complaints, asked = context.new_page(), [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.set_default_timeout(30_000)  # ms; a busy machine takes its time
    page.goto(file.as_uri())
    yield page
    assert complaints == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    # nothing but the table and its like is wider than the screen
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if folder := os.environ.get("PEFTBENCH_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{re.sub(r'[^a-z]+', '-', name)}.png", full_page=True)
    context.close()


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of each of forty points; one run of one of them failed, and one was trained twice."""
    folder = tmp_path_factory.mktemp("seeds") / "outputs"
    make_runs(folder, 120)
    record = find_finished(folder / "sst2" / "0006")
    assert record is not None and record.score is not None
    again = {"score": record.score - 9, "created": "2024-01-01T00:00:00.000+00:00", "folder": folder / "sst2/before"}
    before = replace(record, **again)
    before.folder.mkdir()
    before.save()
    return folder


@pytest.fixture(params=list(SIZES))
def page_of_seeds(request: pytest.FixtureRequest, browser: Any, seeds: Path) -> Iterator[Any]:
    yield from _opened(_screen(browser, request.param), seeds, request.node.name)


def averages(folder: Path, *seeds: int) -> dict[str, tuple[str, str, str]]:
    """What `peftbench results --mean` says in each row: score, n and difference to full fine-tuning, by the score."""
    rows = group_seeds((r for r in load_records(folder)[0] if r.seed in seeds), "mean")
    known = {column.key: column for column in choose_columns(rows)}
    cells = [tuple(known[key].cell(row) for key in ("score", "n", "delta")) for row in rows]
    return {score: (score, n, delta.replace("-", "\N{MINUS SIGN}")) for score, n, delta in cells}


def column(page: Any, header: str) -> list[str]:
    """The texts of a column of the table as it stands, from top to bottom."""
    found: list[str] = page.evaluate(
        """header => {
          const [table] = document.getElementsByTagName("table");
          const at = [...table.tHead.rows[0].cells].findIndex(cell => cell.innerText.replace(/ [↑↓]$/, "") === header);
          return [...table.tBodies[0].rows].filter(row => !row.hidden).map(row => row.cells[at].innerText.trim());
        }""",
        header,
    )
    return found


def shown_scores(page: Any) -> list[float]:
    return [float(text) for text in column(page, "score") if text]


def settle(page: Any) -> None:
    """Wait until the page has been drawn anew."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_the_page_shows_one_group_best_first_and_all_on_demand(page: Any, outputs: Path) -> None:
    scores = shown_scores(page)
    assert len(scores) == 15 and scores == sorted(scores, reverse=True)
    assert page.locator("#count").inner_text().startswith("15 of 30 runs")
    page.get_by_label("Group of runs").select_option(label="all 30 runs")
    assert len(column(page, "method")) == 30 and len(shown_scores(page)) == 29  # one failed
    assert "choose one set above" in page.locator("#scatter-note").inner_text()
    assert page.locator("#scatter .edge").count() == 0
    expected = sorted(f"{r.score:.2f}" for r in load_records(outputs)[0] if r.score is not None)
    assert sorted(filter(None, column(page, "score"))) == expected


def test_the_table_fits_a_small_desktop(browser: Any, outputs: Path) -> None:
    for page in _opened(browser.new_context(viewport={"width": 1300, "height": 800}), outputs, "small desktop"):
        assert page.evaluate(
            "document.querySelector('.scroll').scrollWidth <= document.querySelector('.scroll').clientWidth"
        )


def test_sorting(page: Any) -> None:
    page.locator("thead").get_by_role("button", name="stored", exact=True).click()
    stored = [int(text.replace(",", "")) for text in column(page, "stored")]
    assert stored == sorted(stored) and len(set(stored)) > 2
    head = page.locator("th[aria-sort]")
    assert head.get_attribute("aria-sort") == "ascending" and head.inner_text() == "stored ↑"
    head.get_by_role("button").press("Enter")  # the keyboard does it too
    assert [int(text.replace(",", "")) for text in column(page, "stored")] == sorted(stored, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    page.locator("thead").get_by_role("button", name="score").click()
    assert shown_scores(page) == sorted(shown_scores(page), reverse=True)


@pytest.mark.parametrize(
    ("typed", "test"),
    [
        ("method=mam,lora", lambda r: r.method in ("mam", "lora")),
        ("method=m", lambda r: r.method == "mam"),  # still being typed
        ("method!=full score>82", lambda r: r.method != "full" and r.score > 82),
        ("functional_form=softmax", lambda r: any(axes.functional_form == "softmax" for axes in r.axes)),
        ('functional_form="relu + softmax"', lambda r: len(r.axes) == 2),
        ("method=*r*", lambda r: "r" in r.method),
        ("trainer.learning_rate=0.001", lambda r: r.method == "full"),
        ("PREFIX", lambda r: r.method == "prefix"),
    ],
)
def test_filters(page: Any, outputs: Path, typed: str, test: Any) -> None:
    page.get_by_label("Filter").fill(typed)
    settle(page)
    records = [record for record in load_records(outputs / "doctopic")[0] if test(record)]
    assert 0 < len(records) < 15
    assert sorted(column(page, "method")) == sorted(record.method for record in records)
    assert page.locator("#scatter .point[role=button]").count() == len(records)
    assert page.locator("#count").inner_text().startswith(f"{len(records)} of 30 runs")


def test_a_filter_that_is_wrong_says_so_and_hides_nothing(page: Any) -> None:
    page.get_by_label("Filter").fill("metho=mam score>x")
    settle(page)
    assert "metho is not a column; did you mean method" in page.locator("#count").inner_text()
    assert "score>x: > needs a column of numbers" in page.locator("#count").inner_text()
    assert len(column(page, "method")) == 15
    page.get_by_label("Filter").fill("nothing-like-it")
    settle(page)
    assert column(page, "method") == []
    assert "No run passes" in page.locator("#scatter-note").inner_text()


def test_the_scatter_draws_the_front_that_the_tables_mark(page: Any, outputs: Path) -> None:
    records, _ = load_records(outputs / "doctopic")
    best = find_front(make_rows(records), lambda record: record.counts.stored if record.counts else None)
    edge = page.locator("#scatter svg[role=group] .edge").get_attribute("points").split()
    assert len(edge) == len(best) > 2
    points = page.locator("#scatter .point[role=button]")
    assert points.count() == 15
    labels = " ".join(points.nth(index).get_attribute("aria-label") for index in range(15))
    assert all(record.run in labels for record in records)


def places(page: Any) -> list[float]:
    """Where points stand across, each place once, from left to right."""
    marks = page.locator("#scatter .point[role=button]")
    moves = [marks.nth(index).get_attribute("transform") for index in range(marks.count())]
    return sorted({float(move.removeprefix("translate(").split()[0]) for move in moves})


def test_other_axes(page: Any) -> None:
    page.get_by_role("combobox", name="Horizontal axis").select_option("memory")
    page.get_by_role("combobox", name="Vertical axis").select_option("tokens_per_s")
    words = page.locator("#scatter").inner_text()
    assert "peak memory, GiB (log)" in words and "tokens/s" in words
    assert page.locator("#scatter .full").count() == 0  # full fine-tuning's score is no line among speeds
    page.get_by_role("combobox", name="Horizontal axis").select_option("stored")
    one, two, three, *_ = places(page)  # 1000, 4000 and 16,000 parameters
    assert three - two == pytest.approx(two - one, abs=0.3)
    page.get_by_label("log, horizontal axis").uncheck()
    assert "(log)" not in page.locator("#scatter").inner_text()
    one, two, three, *_ = places(page)
    assert three - two == pytest.approx(4 * (two - one), abs=0.5)
    page.get_by_label("Colour").select_option("bottleneck")
    assert "160 + 160" in page.locator("#legend").inner_text()


def test_a_click_on_a_point_selects_its_run(page: Any) -> None:
    point = page.locator("#scatter .point[role=button]").first
    about = point.get_attribute("aria-label")
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = page.locator(".tip")
    assert tip.is_visible() and tip.inner_text().replace("\n", ", ") == about
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    method = about.split(" ·")[0]
    assert page.locator("#chips button").inner_text().split() == [
        "A",
        method,
        page.locator("tr.chosen td").first.inner_text(),
        "×",
    ]
    assert page.locator("tr.chosen").count() == page.locator("#scatter .ring").count() == 1
    assert page.locator("#curves .curve").count() == 1
    assert "the other 14 runs shown" in page.locator("#differences").inner_text()
    page.locator("#chips button").click()
    assert page.locator("tr.chosen").count() == 0 and page.locator("#details").is_hidden()


def test_the_keyboard_reaches_points_and_rows(page: Any) -> None:
    page.locator("#scatter .point[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.keyboard.press("End")
    page.keyboard.press("Space")
    assert page.locator("#chips .badge").all_inner_texts() == ["A", "B"]
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.locator("tbody input").first.focus()
    page.keyboard.press("Space")
    assert page.locator("tr.chosen").count() in (1, 3)  # the last point may be the first row


def test_details_of_selected_runs(page: Any) -> None:
    page.get_by_label("Filter").fill("method=mam,full")
    settle(page)
    for method in ("full", "mam"):
        page.locator("tbody tr:not([hidden])").filter(has_text=method).first.get_by_role("checkbox").check()
    cards = page.locator(".card").all_inner_texts()
    assert [card.split()[:2] for card in cards] == [["A", "full"], ["B", "mam"]]
    assert all(word in cards[1] for word in ("relu", "ffn", "scaled 4", "softmax", "heads", "gated", "160"))
    rows = page.locator("#differences tbody tr").all_inner_texts()
    assert ["trainer.learning_rate", "0.001", "0.0005"] in [row.split() for row in rows]
    assert ["method", "full", "mam"] in [row.split() for row in rows]
    assert page.locator(".example").count() == 6
    assert "✓ same as the reference" in page.locator(".example").first.inner_text()
    assert page.locator("#curves .curve").count() == 2
    page.get_by_role("combobox", name="Training curve").select_option("eval_accuracy")
    assert "eval_accuracy" in page.locator("#curves").inner_text()
    assert len(page.locator("#curves .curve").first.get_attribute("points").split()) == 2
    page.get_by_role("button", name="None").click()
    assert page.locator("tr.chosen").count() == 0


def test_columns_can_be_added(page: Any) -> None:
    page.get_by_text("Columns", exact=True).click()
    page.get_by_label("accuracy", exact=True).check()
    scores = shown_scores(page)
    assert [float(text) for text in column(page, "accuracy")] == scores


def test_seeds_are_averaged_as_in_the_tables(page_of_seeds: Any, seeds: Path) -> None:
    page = page_of_seeds
    page.get_by_label("Group of runs").select_option(index=0)
    assert len(column(page, "method")) == 61 and page.locator("#scatter .spread").count() == 0
    page.get_by_label("average seeds").check()
    expected = averages(seeds / "sst2", 1, 2, 3)
    shown = zip(column(page, "score"), column(page, "n"), column(page, "Δ full"), strict=True)
    assert {score: (score, n, delta) for score, n, delta in shown} == expected and len(expected) == 20
    assert {n for _, n, _ in expected.values()} == {"3", "2"}  # a failed run is in no mean
    assert "61 of 121 runs in 20 averages" in page.locator("#count").inner_text()
    scores = [float(text.split(" ±")[0]) for text in column(page, "score")]
    assert scores == sorted(scores, reverse=True)
    assert "1, 2, 3" in column(page, "seed") and "2 done, 1 failed" in column(page, "status")
    # a bar upwards for each; what is stored does not vary
    assert page.locator("#scatter .point[role=button]").count() == 20 == page.locator("#scatter .bars .spread").count()
    assert "standard deviation" in page.locator("#legend").inner_text()
    assert "±" in page.locator("#scatter .point[role=button]").first.get_attribute("aria-label")
    page.get_by_role("combobox", name="Horizontal axis").select_option("time")
    assert page.locator("#scatter .bars .spread").count() == 40

    page.get_by_label("Filter").fill("seed!=3")  # a mean is over the runs that are shown
    settle(page)
    shown = zip(column(page, "score"), column(page, "n"), column(page, "Δ full"), strict=True)
    assert {score: (score, n, delta) for score, n, delta in shown} == averages(seeds / "sst2", 1, 2)
    page.locator("thead").get_by_role("button", name="score").click()
    scores = [float(text.split(" ±")[0]) for text in column(page, "score")]
    assert scores == sorted(scores, reverse=True)

    page.get_by_label("average seeds").uncheck()
    assert len(column(page, "method")) == 41 and page.locator("#scatter .spread").count() == 0


def test_an_average_selects_its_runs(page_of_seeds: Any) -> None:
    page = page_of_seeds
    page.get_by_label("average seeds").check()
    row = page.locator("tbody tr:not([hidden])").first
    row.get_by_role("checkbox").check()
    assert page.locator("#chips .badge").all_inner_texts() == ["A", "B", "C"]
    assert row.locator(".badge").inner_text() == "ABC" and page.locator("#curves .curve").count() == 3
    assert page.locator("#scatter .ring").count() == 1 and page.locator(".card").count() == 3
    page.locator("#chips button").first.click()
    assert not row.get_by_role("checkbox").is_checked() and row.locator(".badge").inner_text() == "BC"
    page.get_by_label("average seeds").uncheck()
    assert page.locator("tr.chosen").count() == 2


def test_without_seeds_there_is_nothing_to_average(page: Any) -> None:
    assert page.locator("#averaging").is_hidden()


def test_dark_and_light(browser: Any, outputs: Path) -> None:
    paper = {}
    for scheme in ("light", "dark"):
        for page in _opened(browser.new_context(color_scheme=scheme), outputs, scheme):
            paper[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}


def test_text_of_runs_stays_text(browser: Any, tmp_path: Path) -> None:
    """Also in the browser: neither a script nor an element comes out of a name, a setting or a prediction."""
    record = start_record(RUN, tmp_path / "outputs" / "run", [f"method={EVIL}"])
    record.method = EVIL
    write_predictions(record.folder, [{"id": EVIL, "prediction": EVIL, "reference": EVIL}])
    record.fail(RuntimeError(EVIL))
    for page in _opened(browser.new_context(), tmp_path / "outputs", "evil"):
        page.locator("tbody input").check()
        assert page.locator("img").count() == 0 and page.locator("script").count() == 2
        assert "alert(1)" in page.locator(".card").inner_text()
        assert "onerror" in page.locator(".example").inner_text()


def test_a_thousand_runs(browser: Any, tmp_path: Path) -> None:
    """They stand in one file of some size, and a filter finds its own; scripts/benchmark_records.py takes the time."""
    make_runs(tmp_path / "outputs", 1000)
    wanted = [
        record.method
        for record in load_records(tmp_path / "outputs")[0]
        if record.method in ("mam", "lora") and record.status == "done" and record.score > 82
    ]
    assert 100 < len(wanted) < 400
    for page in _opened(browser.new_context(), tmp_path / "outputs", "thousand"):
        assert (tmp_path / "report.html").stat().st_size < 4_000_000
        page.get_by_label("Group of runs").select_option(label="all 1000 runs")
        settle(page)
        assert len(column(page, "method")) == 1000
        page.get_by_label("Filter").press_sequentially("method=mam,lora score>82")
        settle(page)
        assert sorted(column(page, "method")) == sorted(wanted)
        assert page.locator("#scatter .point[role=button]").count() == len(wanted)
