"""Measures how long showing a thousand runs takes: `peftbench results`, the report, and its page in Chromium.

python scripts/benchmark_records.py [--runs 1000] [--tries 5] [--out FILE]

The runs are copies of those in outputs/reference/grid, each round of copies with its own seeds and names. The page is
opened at two widths, and a filter is typed into it letter by letter. This needs playwright and Chromium (pip install -e
".[dev]"; playwright install chromium, or one on the PATH) and is skipped without them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from joblib import cpu_count
from rich.console import Console
from rich.table import Table

REFERENCE = Path(__file__).parent.parent / "outputs" / "reference" / "grid"
# The timed commands with their limits, in seconds on two cores, for a thousand runs.
COMMANDS = {"results": 2.0, "results --mean": 2.0, "report": None}
OPENED, LETTER = 2.0, 0.1
WIDTHS = {"desktop": (1360, 900), "phone": (390, 844)}
FILTER = "method=mam,lora score>35"
# The seconds from each letter typed into the filter until the page is drawn again.
TYPED = """async text => {
  const field = document.getElementById("filter"), taken = [];
  for (let length = 1; length <= text.length; length++) {
    const began = performance.now();
    field.value = text.slice(0, length);
    field.dispatchEvent(new Event("input"));
    await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
    taken.push((performance.now() - began) / 1000);
  }
  return taken;
}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=1000, help="how many are shown; default: %(default)s")
    parser.add_argument("--tries", type=int, default=5, help="of each command; default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as place:
        runs, page = Path(place, "outputs"), Path(place, "report.html")
        _repeat(runs, arguments.runs)
        found = [
            _figure(f"peftbench {command}", [_seconds(command, runs, page) for _ in range(arguments.tries)], most)
            for command, most in COMMANDS.items()
        ]
        found += _page(page)
    if arguments.out is not None:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        values = {"date": date, "cores": cpu_count(), "python": sys.version.split()[0], "runs": arguments.runs}
        arguments.out.write_text(json.dumps(values | {"figures": found}, indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"{arguments.runs} runs, {cpu_count()} cores", title_justify="left")
    table.add_column("median of its tries")
    for name in ("seconds", "slowest", "at most"):
        table.add_column(name, justify="right")
    for row in found:
        most = "" if row["at_most_s"] is None else f"{row['at_most_s']:.1f}"
        table.add_row(row["what"], f"{row['seconds']:.3f}", f"{max(row['tries_s']):.3f}", most)
    Console().print(table)
    return int(any(row["at_most_s"] is not None and row["seconds"] > row["at_most_s"] for row in found))


def _repeat(folder: Path, count: int) -> None:
    recorded = sorted(file.parent for file in REFERENCE.rglob("record.json"))
    for index in range(count):
        own = {"run": f"{index:08x}", "seed": 1000 + index // len(recorded)}
        copy = shutil.copytree(recorded[index % len(recorded)], folder / own["run"])
        record = json.loads((copy / "record.json").read_text(encoding="utf-8"))
        (copy / "record.json").write_text(json.dumps(record | own), encoding="utf-8")


def _seconds(command: str, runs: Path, page: Path) -> float:
    """How long a command took, including the start of Python. Ends the script if the command fails."""
    words = [*command.split(), str(runs), *(["--out", str(page)] if command == "report" else [])]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "peftbench", *words], capture_output=True, text=True)
    taken = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{done.stderr[-2000:]}\nbenchmark_records: exit code {done.returncode} of peftbench {command}")
    return taken


def _page(file: Path) -> list[dict[str, Any]]:
    """The figures of the report's page, or none, with a line on stderr, if no browser can be started."""
    try:
        from playwright import sync_api
    except ImportError:
        print("The page is skipped: playwright is not installed.", file=sys.stderr)
        return []
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    found = []
    with sync_api.sync_playwright() as starter:
        try:  # the browser's sandbox cannot run in a container; the only page opened here is our own file
            browser = starter.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        except sync_api.Error as error:
            print(f"The page is skipped: {str(error).splitlines()[0]}", file=sys.stderr)
            return []
        for name, (width, height) in WIDTHS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(file.as_uri())
            loaded = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
            found.append(_figure(f"its page opens ({name})", [page.evaluate(loaded) / 1000], OPENED))
            found.append(_figure(f"a letter of its filter ({name})", page.evaluate(TYPED, FILTER), LETTER))
        browser.close()
    return found


def _figure(what: str, tries: list[float], most: float | None) -> dict[str, Any]:
    return {"what": what, "seconds": median(tries), "tries_s": tries, "at_most_s": most}


if __name__ == "__main__":
    sys.exit(main())
