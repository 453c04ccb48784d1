"""Model and data set by their hub ids: from a hub on loopback, then offline from the cache that this left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftbench.config.schema import EMBEDDED
from peftbench.utils.files import write_lines
from tests.hub import REVISION, hub

MINI = EMBEDDED / "mini"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """What the hub has: the embedded model as me/tiny, and reviews with named labels as me/reviews."""
    root = tmp_path / "published"
    shutil.copytree(MINI, root / "models" / "me" / "tiny")
    folder = root / "datasets" / "me" / "reviews"
    folder.mkdir(parents=True)
    for split, count in (("train", 40), ("validation", 16), ("test", 16)):
        rows = [{"sentence": f"a film, number {i}", "label": i % 2} for i in range(count)]
        write_lines(folder / f"{split}.jsonl", rows)
    return root


def train(tmp_path: Path, home: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A run of `me/tiny` on `me/reviews` with its cache in the folder `home`, and its record if it has one."""
    outputs = tmp_path / f"outputs-{home}-{'-'.join(environment)}"
    overrides = ["task=text_classification", "task.hub_id=me/reviews", "task.text_columns=[sentence]", "method=lora"]
    overrides += ["model=bart_large", "model.hub_id=me/tiny", "model.sizes=mini", "debug=smoke", "trainer.max_steps=2"]
    done = subprocess.run(
        [sys.executable, "-m", "peftbench", "train", *overrides, f"output_dir={outputs}"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / home), **environment},
    )
    found = [json.loads(file.read_text()) for file in outputs.rglob("record.json")]
    return done, found[0] if found else {}


@pytest.mark.slow
def test_from_the_hub_then_offline_from_its_cache_then_without_one(published: Path, tmp_path: Path) -> None:
    with hub(published) as url:
        done, online = train(tmp_path, "home", HF_ENDPOINT=url)
        assert done.returncode == 0, done.stderr
    assert online["model"]["hub_id"] == "me/tiny"
    assert online["data"]["labels"] == ["0", "1"]
    assert {role: split["examples"] for role, split in online["data"]["splits"].items()} == {
        "train": 32,
        "selection": 16,
        "report": 16,
    }
    assert (tmp_path / "home" / "hub" / "models--me--tiny" / "snapshots" / REVISION / "config.json").exists()

    done, offline = train(tmp_path, "home", HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert offline["scores"] == online["scores"]

    shutil.copytree(tmp_path / "home", tmp_path / "torn", symlinks=True)
    (weights,) = (tmp_path / "torn" / "hub").glob("models--me--tiny/snapshots/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    done, _ = train(tmp_path, "torn", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "model.hub_id=me/tiny cannot be loaded: Error while deserializing" in done.stderr

    # The backbone's config.json is the first that is read: the sizes of a preset depend on it.
    done, missing = train(tmp_path, "empty", HF_HUB_OFFLINE="1")
    assert (done.returncode, missing) == (2, {})
    assert len(done.stderr.splitlines()) == 1
    assert "model.hub_id=me/tiny is not in this machine's cache and HF_HUB_OFFLINE is set; bring" in done.stderr

    shutil.copytree(tmp_path / "home" / "hub", tmp_path / "part" / "hub", symlinks=True)
    (data,) = (tmp_path / "part" / "hub").glob("datasets--me--reviews")
    shutil.rmtree(data)
    done, missing = train(tmp_path, "part", HF_HUB_OFFLINE="1")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "task.hub_id=me/reviews is not in this machine's cache and HF_HUB_OFFLINE is set; give task.data_dir=" in (
        done.stderr
    )
