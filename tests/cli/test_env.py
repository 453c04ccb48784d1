"""`peftbench env`: what it shows of a machine, and what it does not show."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import torch
from packaging.requirements import Requirement

import peftbench
from peftbench.cli.main import main
from peftbench.utils import report_environment


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A token and a home folder in the environment, and no hub to wait for."""
    monkeypatch.setattr("peftbench.cli.env.explain_missing_hub", lambda: "HF_HUB_OFFLINE is set")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", f"{tmp_path}/torch:{tmp_path}2/torch")
    monkeypatch.setenv("UNRELATED_VALUE", "private")
    return str(tmp_path)


def test_the_report(secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peftbench"]["version"] == peftbench.__version__
    for name in ("torch", "transformers", "datasets", "accelerate", "hydra-core"):
        assert found["packages"][name] == metadata.version(name)
    assert found["machine"]["python"].startswith(platform.python_version())
    assert found["machine"]["memory"].startswith(f"{psutil.virtual_memory().total / 2**30:.1f} GiB")
    assert ("GPU 0" in found["devices"]) == torch.cuda.is_available()
    assert found["folders"]["hub"] == "HF_HUB_OFFLINE is set"
    assert found["folders"]["peftbench's cache"].startswith("~/cache: ")
    assert found["folders"]["peftbench's cache"].endswith(", does not exist yet")
    assert found["variables"]["HF_TOKEN"] == found["variables"]["WANDB_API_KEY"] == "set (not shown)"
    assert found["variables"]["TORCH_HOME"] == f"~/torch:{secret}2/torch"
    told = json.dumps(found)
    assert not any(word in told for word in ("hf_abcdef", "0123456789", "private"))


def test_every_package_and_extra_is_listed(secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    extras = metadata.metadata("peftbench").get_all("Provides-Extra")
    listed = [name for section in ("packages", *(f"extra {extra}" for extra in extras)) for name in found[section]]
    needed = {Requirement(line).name for line in metadata.requires("peftbench") or []}
    assert set(listed) == needed
    assert found["extra dev"]["pytest"] == metadata.version("pytest")


def test_a_package_that_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=999", "nowhere>=1", 'elsewhere>=2; extra == "more"', 'never>=1; python_version < "3"']
    monkeypatch.setattr(report_environment, "_read_requirements", lambda: [Requirement(line) for line in lines])
    monkeypatch.setattr(report_environment, "_list_extras", lambda: ["more"])
    found = report_environment.describe_environment({"commit": "abc", "dirty": True})
    assert found["packages"] == {
        "torch": f"{metadata.version('torch')}, but peftbench needs >=999",
        "nowhere": "not installed",
    }
    assert found["extra more"] == {"elsewhere": "not installed"}
    assert found["peftbench"]["commit"] == "abc with changes"


def test_it_is_read_by_people(secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "peftbench:" and lines[1].split() == ["version", peftbench.__version__]
    columns = {len(line) - len(line[2:].lstrip()) for line in lines if line.startswith("  ")}
    assert columns == {2}
