"""Where the runs of a sweep are trained, as typed: `hydra/launcher=NAME hydra.launcher.KEY=VALUE`."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftbench.config.launchers import HydraLauncher, Local, Ray, read_launcher
from peftbench.utils.errors import UserError


def test_words_of_a_launcher_are_taken_out_and_the_others_stay() -> None:
    assert read_launcher(["method=lora", "seed=1,2"]) == (["method=lora", "seed=1,2"], None)
    assert read_launcher(["method=lora", "hydra/launcher=local", "and", "seed=2"]) == (
        ["method=lora", "and", "seed=2"],
        Local(),
    )
    words = ["seed=1", "hydra/launcher=basic", "hydra.sweep.subdir=x"]
    assert read_launcher(words) == (["seed=1"], HydraLauncher("basic", words[1:]))


def test_a_sweeper_of_hydra_reads_its_launcher_itself() -> None:
    words = ["hydra/sweeper=basic", "hydra/launcher=basic", "seed=1,2"]
    assert read_launcher(words) == (words, None)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["hydra/launcher=lokal"], "hydra/launcher=lokal is unknown; did you mean local? Choices: basic, "),
        (
            ["hydra/launcher=rq"],
            "hydra/launcher=rq is of a plugin of Hydra, which is not installed: pip install hydra-rq",
        ),
        (["hydra.launcher.at_once=2"], "hydra.launcher.at_once=2 is a setting of a launcher; name it"),
        (["hydra/launcher=local,basic"], "hydra/launcher=local,basic: a sweep has one launcher; give one."),
        (["hydra/launcher=basic", "hydra.searchpath=[file:///tmp]"], "hydra.searchpath=[file:///tmp]: give a folder"),
        (["hydra/launcher=local", "hydra.launcher.gpus=1"], "hydra.launcher.gpus is not a key of the config"),
        (["hydra/launcher=ray", "hydra.launcher.at_once=-1"], "hydra.launcher.at_once=-1: it must be a number of at l"),
        (["hydra/launcher=ray", "hydra.launcher.gpus=-0.5"], "hydra.launcher.gpus=-0.5: it must be a number of at lea"),
        (["hydra/launcher=ray", "hydra.launcher.cpus=nan"], "hydra.launcher.cpus=nan: it must be a number of at least"),
        (["hydra/launcher=slurm", "hydra.launcher.at_once=0"], "hydra.launcher.at_once=0: it must be a number of at l"),
        (["hydra/launcher=slurm", "hydra.launcher.poll_s=-1"], "hydra.launcher.poll_s=-1: it must be a number of at l"),
        (
            ["hydra/launcher=slurm", "hydra.launcher.time=2"],
            "hydra.launcher.signal_s=120 with hydra.launcher.time=2: a run would be told to stop when it starts; give "
            "fewer than the 120 seconds of its limit.",
        ),
    ],
)
def test_what_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        read_launcher(words)
    (fault,) = raised.value.faults
    assert fault.startswith(sentence), fault


def test_what_can_run_a_command_comes_from_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "hydra" / "launcher"
    folder.mkdir(parents=True)
    (folder / "theirs.yaml").write_text("defaults: [ray]\ngpus: 0.25\nruntime_env: {pip: [something]}\n")
    with pytest.raises(UserError, match=r"theirs.yaml: runtime_env is taken from the command line only."):
        read_launcher(["hydra/launcher=theirs"], str(tmp_path))
    typed = ["hydra/launcher=ray", "hydra.launcher.gpus=0.25", "+hydra.launcher.runtime_env.env_vars={A: b}"]
    assert read_launcher(typed) == ([], Ray(gpus=0.25, runtime_env={"env_vars": {"A": "b"}}))


def test_a_preset_of_ones_own_has_the_settings_of_its_kind(tmp_path: Path) -> None:
    folder = tmp_path / "hydra" / "launcher"
    folder.mkdir(parents=True)
    (folder / "here.yaml").write_text("defaults: [local]\n")
    (folder / "wrong.yaml").write_text("kind: locl\n")
    assert read_launcher(["hydra/launcher=here"], str(tmp_path)) == ([], Local())
    with pytest.raises(UserError, match=r"hydra/launcher/wrong.yaml: kind=locl is unknown; did you mean local?"):
        read_launcher(["hydra/launcher=wrong"], str(tmp_path))
