"""The shipped configs and the SLURM job are found by name, in a checkout and in an installed package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tnt_timm.errors import ConfigError
from tnt_timm.settings import config

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize("given", ["tnt_s", "configs/tnt_s.yaml", str(REPO / "configs" / "tnt_s.yaml")])
def test_a_config_by_name_and_by_path(given, monkeypatch):
    monkeypatch.chdir(REPO)
    found = config.resolve(["--config", given]).config
    assert (found.network.model, found.schedule.epochs, found.run.experiment) == ("tnt_s", 300, "tnt_s")


def test_a_name_is_found_from_any_folder_and_its_base_too(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = config.resolve(["--config", "finetune/tnt_b_pets"]).config
    assert (found.network.model, found.data.dataset, found.run.experiment) == (
        "tnt_b_384",
        "torch/oxford_iiit_pet",
        "tnt_b_pets",
    )


def test_a_file_comes_before_a_name_and_a_folder_does_not(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tnt_s").mkdir()
    assert config.resolve(["--config", "tnt_s"]).config.schedule.epochs == 300
    (tmp_path / "tnt_s").rmdir()
    (tmp_path / "tnt_s").write_text("epochs: 70\n")
    assert config.resolve(["--config", "tnt_s"]).config.schedule.epochs == 70


@pytest.mark.parametrize(
    "given, hint",
    [
        ("tnt_x", "perhaps you meant tnt_s"),
        ("configs/tnt_z.yaml", "perhaps you meant tnt_s"),
        ("configs/finetune/pets.yaml", "perhaps you meant finetune/tnt_s_pets"),
        ("../configs/tnt_s", "perhaps you meant tnt_s"),
        ("nothing/like/it.yaml", "pass a path, or a name such as tnt_s"),
    ],
)
def test_an_unknown_config_names_the_nearest(given, hint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        config.resolve(["--config", given])
    assert str(caught.value).startswith(f"{given}: no such file") and hint in str(caught.value)


# ---- as a wheel has it: configs/ and train.sbatch inside the package, no checkout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Run Python with an installed package, in another folder; returns stdout."""
    root, elsewhere = tmp_path_factory.mktemp("site-packages"), tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(REPO / "tnt_timm", root / "tnt_timm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPO / "configs", root / "tnt_timm" / "configs")
    shutil.copy(REPO / "scripts" / "slurm" / "train.sbatch", root / "tnt_timm" / "commands")
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}

    def run(*argv):
        done = subprocess.run([sys.executable, *argv], cwd=elsewhere, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_modules_run_without_a_checkout(installed):
    torchrun = ["-m", "torch.distributed.run"]
    printed = installed(*torchrun, "-m", "tnt_timm.train", "--config", "finetune/tnt_s_cifar10", "--print-config")
    assert yaml.safe_load(printed)["dataset"] == "torch/cifar10"
    small = ["--model-kwargs", "depth=1", "--img-size", "32", "--num-classes", "10", "--workers", "0"]
    assert "tnt_ti: top-1 " in installed("-m", "tnt_timm.validate", "--model", "tnt_ti", "--dataset", "digits", *small)


def test_a_job_without_a_checkout_runs_the_module(installed):
    program = "import sys; from tnt_timm.commands.submit import main; sys.exit(main())"
    script = installed("-c", program, "tnt_s", "--nodes", "1", "--gpus-per-node", "8", "--dry-run")
    assert "\nexport TNT_TRAIN='-m tnt_timm.train'\n" in script
    assert "/tnt_timm/configs/tnt_s.yaml\n" in script and script.startswith("#!/bin/bash")
