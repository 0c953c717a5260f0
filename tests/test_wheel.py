"""The wheel, installed into an empty folder: everything is in it, and its commands work outside of the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Callable

import pytest

REPO = Path(__file__).parent.parent
COMMANDS = "train validate validate_all predict export figures benchmark complexity check submit".split()
MODEL = ["--model", "tnt_ti", "--model-kwargs", "depth=1", "embed_dim=24", "inner_dim=6"]
MODEL += ["num_heads_inner=2", "num_heads_outer=3"]
RUN_ALL = """
import json, sys
from importlib import import_module
import tnt_timm
print(tnt_timm.__file__)
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [name, *arguments]
    try:
        status = import_module(f"tnt_timm.commands.{name}").main()
    except SystemExit as end:
        status = end.code
    assert status == 0, name
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, which is built from the checkout."""
    missing = [name for name in ("build", "hatchling", "pip") if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, REPO]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    assert len(list(folder.glob("*.tar.gz"))) == 1
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", folder, wheel], check=True)
    return folder


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Callable[..., str]:
    """Run a program in an empty folder, with the installed package alone on PYTHONPATH; return its output."""

    def run(*command: object) -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_the_package_its_data_and_the_configs(wheel):
    expected = {
        str(path.relative_to(REPO))
        for path in (REPO / "tnt_timm").rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".pyo")
    }
    expected |= {f"tnt_timm/{path.relative_to(REPO)}" for path in (REPO / "configs").rglob("*.yaml")}
    expected.add("tnt_timm/commands/train.sbatch")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected
    assert "tnt_timm/configs/finetune/digits.yaml" in found and "tnt_timm/py.typed" in found


def test_every_command_is_installed(installed):
    (package,) = distributions(name="tnt-timm", path=[str(installed)])
    scripts = {script.name: script.value for script in package.entry_points.select(group="console_scripts")}
    assert scripts == {f"tnt-{name.replace('_', '-')}": f"tnt_timm.commands.{name}:main" for name in COMMANDS}
    assert {path.name for path in (installed / "bin").iterdir()} == set(scripts)


def test_the_commands_work_outside_of_the_checkout(installed, run, tmp_path):
    short = ["-b", "256", "--epochs", "1", "--warmup-epochs", "0", "--workers", "0", "--device", "cpu"]
    assert "done: best" in run(installed / "bin" / "tnt-train", "--config", "digits", *MODEL, *short)
    commands = [[name, "--help"] for name in COMMANDS]
    commands.append(["validate", "output/digits", "--workers", "0", "--device", "cpu"])
    commands.append(["submit", "digits", "--nodes", "1", "--procs-per-node", "2", "--dry-run"])
    where, text = run(sys.executable, "-c", RUN_ALL, json.dumps(commands)).split("\n", 1)
    assert Path(where).is_relative_to(installed)
    assert text.count("usage: ") == len(COMMANDS)
    assert "top-1" in text
    assert "-m tnt_timm.train" in text and f"--config {installed}/tnt_timm/configs/digits.yaml" in text
    assert {path.name for path in tmp_path.iterdir()} == {"output"}
