"""What a run finds in its environment: torchrun's processes are read, those of other launchers are refused, and what
else accelerate reads there changes nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import HashStore

from peftbench.cli.main import main
from peftbench.train import train
from peftbench.training.devices import join_processes
from peftbench.utils.console import make_console
from peftbench.utils.environment import (
    ARITHMETIC,
    OTHERS,
    Launch,
    clear_settings,
    read_launch,
    refuse_values,
    run_alone,
)
from peftbench.utils.errors import UserError
from peftbench.utils.progress import Display
from tests.cli.test_train import SUBPROCESS, sentiment, smoke
from tests.sweeps.test_sweeper import replaced

__all__ = ["sentiment", "smoke"]  # fixtures

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
BY_TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
ONE_PROCESS = {**LAUNCHED, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
LEFTOVERS = {
    "torchrun of one process": ONE_PROCESS,
    "a rank alone": {"LOCAL_RANK": "0", "RANK": "0"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "MASTER_ADDR": "127.0.0.1"},
    "srun": {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "PMI_SIZE": "4", "PMI_RANK": "2", "MASTER_ADDR": "127.0.0.1"},
    "precision": {"ACCELERATE_MIXED_PRECISION": "bf16"},
    "accumulation": {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
    "dynamo": {"ACCELERATE_DYNAMO_BACKEND": "eager", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "true"},
    "deepspeed": {"ACCELERATE_USE_DEEPSPEED": "true"},
    "fsdp": {"ACCELERATE_USE_FSDP": "true"},
    "parallelism": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"},
    "device": {"ACCELERATE_TORCH_DEVICE": "meta"},
    "arithmetic": dict.fromkeys(ARITHMETIC, "1"),
    "others": {**dict.fromkeys(OTHERS, "1"), "TQDM_MININTERVAL": "x"},
}


def adapter(folder: Path) -> bytes:
    (file,) = folder.rglob("adapter/*.safetensors")
    return file.read_bytes()


@pytest.fixture(scope="module")
def plain() -> dict[str, bytes]:
    """The adapter of the run that nothing is in the environment of, once it is known."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEFTOVERS)
def test_what_accelerate_reads_changes_no_weights(
    name: str, smoke: list[str], tmp_path: Path, plain: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*smoke, "method=lora", "trainer.accumulation=2", "task.baselines=[]"]
    if not plain:
        assert main(["train", *replaced(settings, tmp_path / "plain")]) == 0
        plain["adapter"] = adapter(tmp_path / "plain")
    for key, value in LEFTOVERS[name].items():
        monkeypatch.setenv(key, value)
    assert main(["train", *settings]) == 0
    assert adapter(tmp_path / "outputs") == plain["adapter"]


@pytest.mark.parametrize("command", [["train"], ["train", "-m", "seed=1,2"], ["train", "-m", "seed=1,2", "jobs=2"]])
def test_one_of_several_processes_is_refused_before_anything_is_written(
    command: list[str], smoke: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [*SUBPROCESS, *command, *smoke], env={**os.environ, **LAUNCHED}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("peftbench: WORLD_SIZE=2 RANK=1 in the environment makes this one of 2 processes, but")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("command", [["evaluate", "RUN"], ["merge", "RUN", "--out", "FOLDER"], ["reproduce", "table5"]])
def test_other_commands_that_compute_refuse_too(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for key, value in LAUNCHED.items():
        monkeypatch.setenv(key, value)
    assert main(command) == 2
    assert "of a launcher such as torchrun" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(["params"]) == 0  # which loads no weights


def test_a_run_that_is_started_from_python_is_refused_too(monkeypatch: pytest.MonkeyPatch, smoke: list[str]) -> None:
    from peftbench.config.compose import compose_run

    for key, value in LAUNCHED.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="of a launcher"):
        train(compose_run(smoke), display=Display(make_console()))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (LAUNCHED, "torchrun has not started them"),
        ({**LAUNCHED, **BY_TORCHRUN, "RANK": ""}, "the environment lacks RANK"),
        ({**LAUNCHED, **BY_TORCHRUN, "MASTER_ADDR": "", "LOCAL_RANK": "x"}, "the environment lacks LOCAL_RANK, MASTER"),
        ({**LAUNCHED, **BY_TORCHRUN, "MASTER_PORT": "1"}, "MASTER_ADDR=127.0.0.1 MASTER_PORT=1: nobody answers there"),
    ],
)
def test_processes_that_cannot_meet_are_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        read_launch(environment)
    assert len(refused.value.faults) == 1


def test_torchruns_processes_are_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as store:
        port = store.getsockname()[1]
        launch = read_launch({**LAUNCHED, **BY_TORCHRUN, "MASTER_PORT": str(port)})
    assert launch == Launch(rank=1, size=2, local_rank=1, host="127.0.0.1", port=port, hosted=True)
    assert read_launch(ONE_PROCESS) is None and read_launch({}) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "seed=1,2", "jobs=2"], "jobs=2: torchrun has started 2 processes"),
        (["trainer.devices=3"], "trainer.devices=3: torchrun has started 2 processes"),
        (["-m", "hydra/launcher=slurm"], "hydra/...: torchrun has started 2 processes"),
    ],
)
def test_what_else_decides_on_processes_is_refused_under_torchrun(
    words: list[str], said: str, smoke: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as store:
        ours = {**LAUNCHED, **BY_TORCHRUN, "RANK": "0", "MASTER_PORT": str(store.getsockname()[1])}
        for key, value in ours.items():
            monkeypatch.setenv(key, value)
        assert main(["train", *words, *smoke]) == 2
    assert said in capsys.readouterr().err


def test_what_is_not_accelerates_is_kept() -> None:
    ours = {
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "1",
        "CUDA_VISIBLE_DEVICES": "0",
        "HF_HOME": "x",
        "OMP_NUM_THREADS": "1",
    }
    environment = {**ours, **ONE_PROCESS, "PMI_SIZE": "4", "FSDP_VERSION": "2", "WORLD_SIZE": ""}
    run_alone(environment)
    assert environment == ours


# What ends an import, or joins the runs of a sweep into one training, in a process of its own and in its workers.
OBSTACLES = {
    # torch reads templates that are not ASCII when it is imported
    "locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "imports and launchers": {
        **{"PYTHONWARNINGS": "error", "TQDM_POSITION": "x", "LOGLEVEL": "debug", "TORCH_CUDA_SANITIZER": "1"},
        **{"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "HYDRA_FULL_ERROR": "1"},
        **{**ONE_PROCESS, **BY_TORCHRUN, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
        **{"PMI_SIZE": "4", "PMI_RANK": "1", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DYNAMO_BACKEND": "x"},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBSTACLES)
def test_a_sweep_and_its_workers_go_by_their_config(name: str, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"é {number}", "label": str(number % 2)}) + "\n" for number in range(40))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    line = ["train", "-m", "task=text_classification", "task.train_file=rows.jsonl", "model=mini", "debug=smoke"]
    line += ["method=lora", "seed=1,2", "jobs=2", "trainer.max_steps=1"]  # in workers too
    done = subprocess.run(
        [sys.executable, "-m", "peftbench", *line],
        env={**os.environ, **OBSTACLES[name]},
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.returncode == 0 and b"2 of 2 runs are done" in done.stdout, done.stderr


def test_what_changes_the_arithmetic_is_cleared_with_a_line_and_what_is_the_machines_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {
        "HF_HOME": "x",
        "TORCH_HOME": "x",
        "ATEN_CPU_CAPABILITY": "avx2",
        "NCCL_SOCKET_IFNAME": "x",
        "TORCH_LOGS": "",
    }
    environment = {**kept, "NVIDIA_TF32_OVERRIDE": "0", "OC_CAUSE": "1", "TQDM_POSITION": "x", "XLA_USE_BF16": ""}
    assert clear_settings(environment) == ["NVIDIA_TF32_OVERRIDE"] and environment == kept
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert main(["explain", "method=lora", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == "NVIDIA_TF32_OVERRIDE in the environment is not read: a run's settings are its config's.\n"
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ and json.loads(said.out)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("HF_HUB_ETAG_TIMEOUT", "x", "a whole number"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "1.5", "a whole number"),
        ("HF_DATASETS_IN_MEMORY_MAX_SIZE", "1GB", "a number"),
        ("TORCH_DISTRIBUTED_DEBUG", "x", "OFF, INFO or DETAIL"),
    ],
)
def test_values_that_end_an_import_are_refused_where_it_is_needed(
    name: str, value: str, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert main(["params"]) == 2
    assert capsys.readouterr().err.startswith(f"peftbench: {name}={value} in the environment is not {what}, and ")
    assert main(["ls", "method"]) == 0


def test_values_that_libraries_read_are_taken() -> None:
    refuse_values({"HF_HUB_ETAG_TIMEOUT": "10", "HF_DATASETS_IN_MEMORY_MAX_SIZE": "1000.5"})
    refuse_values({"HF_HUB_ETAG_TIMEOUT": "", "TORCH_DISTRIBUTED_DEBUG": "detail"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"TORCH_LOGS": "nonsense"}, "TORCH_LOGS=nonsense in the environment is not what torch reads there"),
        ({"PYTHONOPTIMIZE": "2"}, "PYTHONOPTIMIZE=2, or python -OO"),
    ],
)
@pytest.mark.slow
def test_what_no_import_survives_is_a_sentence(given: dict[str, str], said: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "peftbench", "params", "method=lora"]
    done = subprocess.run(line, env={**os.environ, **given}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("size", ["0", "00"])
def test_a_terminal_whose_size_nobody_knows_is_printed_to(
    size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some shells, editors and containers set COLUMNS=0; rich then printed nothing at all."""
    monkeypatch.setenv("COLUMNS", size)
    monkeypatch.setenv("LINES", size)
    make_console().print("a line of eight words in a row")
    assert capsys.readouterr().out == "a line of eight words in a row\n"
    monkeypatch.setenv("COLUMNS", "20")
    make_console().print("a line of eight words in a row")
    assert capsys.readouterr().out == "a line of eight \nwords in a row\n"


def test_a_network_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at device.cc:84] ifa != nullptr. Unable to find address for: nope")

    monkeypatch.setattr("torch.distributed.init_process_group", fail)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope")
    with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME=nope: .* cannot meet so \(ifa .*address for: nope\)"):
        join_processes(HashStore(), 0, 2)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    with pytest.raises(RuntimeError):
        join_processes(HashStore(), 0, 2)
