"""Where runs go that are trained at once: GPUs dealt in turn, cores shared out, memory kept in bounds."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peftbench.cli.main import main
from peftbench.config.compose import compose_points
from peftbench.config.schema import Run
from peftbench.records.recording import start_record
from peftbench.sweeps import places as module
from peftbench.sweeps.places import GIB, Gpu, assign_places, list_visible_gpus
from peftbench.sweeps.places import _query_gpus as listed
from peftbench.utils.errors import UserError

GPUS = [("0", "GPU-aaaa", 143000 << 20), ("1", "GPU-bbbb", 71000 << 20)]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 cores, 128 GiB of memory, two GPUs with 139 and 69 GiB free."""
    monkeypatch.setattr(module, "_query_gpus", lambda: GPUS)
    monkeypatch.setattr(module, "cpu_count", lambda: 16)
    monkeypatch.setattr(module, "virtual_memory", lambda: SimpleNamespace(available=128 * GIB))
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def runs(folder: Path, count: int, *overrides: str) -> list[Run]:
    """Return runs of a sweep."""
    ((_, run),) = compose_points([f"output_dir={folder}", *overrides], multirun=True)
    return [run] * count


def test_gpus_are_dealt_and_cores_shared_out(tmp_path: Path) -> None:
    found = assign_places(runs(tmp_path, 9, "jobs=5"))
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["GPU-aaaa", "GPU-bbbb"] * 2 + ["GPU-aaaa"]
    assert {one["OMP_NUM_THREADS"] for one in found} == {"3"}
    assert len(assign_places(runs(tmp_path, 2, "jobs=5"))) == 2
    assert len(assign_places(runs(tmp_path, 9))) == 1


def test_what_the_user_has_set_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,-1,0")
    assert list_visible_gpus() == [Gpu("1", 71000 << 20)]  # as CUDA: what follows a wrong name is not seen
    environment = assign_places(runs(tmp_path, 4, "jobs=2"))[1]
    assert environment["OMP_NUM_THREADS"] == "1" and environment["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" not in assign_places(runs(tmp_path, 4, "jobs=2"))[0]


def test_no_gpu_where_none_is_wanted(tmp_path: Path) -> None:
    assert "CUDA_VISIBLE_DEVICES" not in assign_places(runs(tmp_path, 4, "jobs=2", "trainer.device=cpu"))[0]


@pytest.mark.parametrize("printed", ["0, GPU-aaaa, 143000\n1, GPU-bbbb, 71000\n", "No devices were found\n", None])
def test_what_nvidia_smi_says(printed: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def nvidia_smi(command: Sequence[str], **_: Any) -> Any:
        if printed is None:
            raise FileNotFoundError(command[0])
        return SimpleNamespace(stdout=printed)

    monkeypatch.setattr(subprocess, "run", nvidia_smi)
    assert listed() == (GPUS if printed is not None and printed.startswith("0") else [])


def test_auto_goes_by_memory_and_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GiB to a run of which nothing is known: 8 and 4 on the two GPUs; two cores to each."""
    assert len(assign_places(runs(tmp_path, 40, "jobs=auto"))) == 8
    monkeypatch.setattr(module, "cpu_count", lambda: 64)
    assert len(assign_places(runs(tmp_path, 40, "jobs=auto"))) == 12
    assert len(assign_places(runs(tmp_path, 3, "jobs=auto"))) == 3
    assert len(assign_places(runs(tmp_path, 40, "jobs=auto", "trainer.device=cpu"))) == 40  # a worker takes 3 GiB
    monkeypatch.setattr(module, "virtual_memory", lambda: SimpleNamespace(available=10 * GIB))
    assert len(assign_places(runs(tmp_path, 40, "jobs=auto"))) == 3


def test_auto_goes_by_what_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_count", lambda: 64)
    run = runs(tmp_path, 1)[0]
    record = start_record(run, tmp_path / run.task.name / run.model.name / run.method / "before", [])
    record.peak_memory_bytes = 40 * GIB
    record.finish()
    assert len(assign_places(runs(tmp_path, 40, "jobs=auto"))) == 3  # 1.25 x 40 + 1 GiB each: two and one


def test_one_number_for_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="jobs=1,2: a sweep has one number"):
        assign_places([*runs(tmp_path, 1), *runs(tmp_path, 1, "jobs=2")])
    for wrong in ("0", "many", "-1", "1.5"):
        with pytest.raises(UserError, match=f"jobs={wrong}: it must be a whole number of at least 1, or auto"):
            runs(tmp_path, 1, f"jobs={wrong}")


@pytest.mark.parametrize("own", ["hydra/sweeper=basic", "hydra/launcher=basic"])
def test_one_decides_where_runs_go(own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-m", "seed=1,2", own, "jobs=2", f"output_dir={tmp_path}"]) == 2
    assert "both decide where a run goes; leave one of the two out." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
