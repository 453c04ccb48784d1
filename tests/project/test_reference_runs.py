"""scripts/reference_runs.sh: each part is one sweep, none of whose runs is refused. Nothing is trained."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peftbench.config.compose import compose_points
from peftbench.config.identity import hash_run
from peftbench.config.search import check_searches, split_trials

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "reference_runs.sh"
FOLDERS = ("backbones/minilm-l6", "backbones/bart-mini", "data/sst2", "data/rte", "data/webnlg", "data/xsum_subset")
FILES = {
    "data/nli": ("pool_no_mnli.jsonl", "mnli_dev_matched.jsonl"),
    "data/en_ro": ("train_merged.jsonl", "newsdev2016.jsonl", "newstest2016.jsonl"),
    "data/sst2": ("train.tsv", "dev.tsv"),
}
DATA = {"sst2": "sst2", "rte": "rte", "mnli": "nli", "webnlg": "webnlg", "xsum": "xsum_subset", "wmt16_enro": "en_ro"}


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """The paths that the script names, with nothing in them."""
    for name in (*FOLDERS, *FILES):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    for folder, names in FILES.items():
        for name in names:
            (tmp_path / folder / name).touch()
    return tmp_path


def arguments(shared: Path, *words: str) -> list[str]:
    """What the script gives to `python3 -m peftbench train`."""
    python = shared / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", SCRIPT, shared, "outputs", *words], env=environment, check=True, capture_output=True, text=True
    )
    module, name, command, *rest = json.loads(done.stdout)  # one line: one sweep
    assert (module, name, command) == ("-m", "peftbench", "train")
    return rest


def smoke_words() -> list[str]:
    """What the script's own comment says makes a trial of all of it."""
    (words,) = re.findall(r"^# scripts/reference_runs\.sh \.\.\. (.*) tries", SCRIPT.read_text(), re.MULTILINE)
    return str(words).split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "trials", "runs"),
    [("glue", 0, 30), ("text", 45, 15), ("text_long", 0, 10), ("grid", 0, 40), ("grid_sst2", 0, 40), ("peft", 60, 60)],
)
def test_a_part_is_one_sweep(part: str, trials: int, runs: int, shared: Path) -> None:
    option, *words = arguments(shared, part, *smoke_words())
    assert option == "-m"
    points = compose_points(words, multirun=True)
    check_searches(points)
    tried, final = split_trials(points)
    assert (len(tried), len(final)) == (trials, runs)
    assert len({hash_run(run) for _, run in points}) == len(points)
    for _, run in points:
        assert (run.debug, run.trainer.max_steps, run.jobs, run.output_dir) == ("smoke", 4, "auto", "outputs")
        sources = [source for source in (run.task.data_dir, run.task.train_file) if source is not None]
        assert len(sources) == 1 and f"/data/{DATA[run.task.name]}" in sources[0]


def test_another_part_is_refused(shared: Path) -> None:
    done = subprocess.run(["bash", SCRIPT, shared, "outputs", "glu"], capture_output=True, text=True)
    assert done.returncode == 2 and "glu is none of glue, text" in done.stderr
