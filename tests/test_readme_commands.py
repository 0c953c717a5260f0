"""Every command in README and docs/ is run, with small settings after its own, or at least understood by its parser.

What needs ImageNet is run as it stands: the only thing it may complain of is that the data's folder is missing. What
needs a download is resolved with --print-config, and what needs a cluster printed with --dry-run. A command that no rule
covers fails.
"""

import re
import shlex
import shutil
from pathlib import Path
from typing import List

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tnt_timm.training.commands import train, validate

REPO = Path(__file__).parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
SHORT = "-b 8 --epochs 1 --warmup-epochs 0 --cooldown-epochs 0 --workers 0 --device cpu --no-amp --crop-pct 1.0".split()
SMALL_FIGURES = {
    "feature-maps": ["--img-size", "64"],
    "tsne-maps": ["--img-size", "64"],
    "tsne-classes": ["--num-images", "60"],
}
REPLACED = {
    "/path/to/folders": "folders",
    "/path/to/imagenet": "folders",
    "https://example.org/cat.jpg": "photos/0.png",
}


def commands(block: str) -> List[List[str]]:
    """The words of each command of a block."""
    lines = block.replace("\\\n", " ").split("\n")
    return [words for line in lines for part in line.split("&&") if (words := shlex.split(part, comments=True))]


FENCES = [
    (page, *found) for page in PAGES for found in re.findall(r"^```(.*?)\n(.*?)^```$", page.read_text(), re.M | re.S)
]
BLOCKS = [
    pytest.param(commands(text), id=f"{page.name}: {text[:60].strip()}") for page, kind, text in FENCES if kind == "sh"
]


@pytest.fixture(scope="module")
def house(tiny, tmp_path_factory):
    """A clone in which the commands have been given before: two runs on digits, one on folders, weights, photographs."""
    root, rng = tmp_path_factory.mktemp("clone"), np.random.default_rng(0)
    for name in ("configs", "scripts", "train.py", "validate.py"):
        (root / name).symlink_to(REPO / name)
    for split, count in (("train", 8), ("val", 3)):
        for label in ("ant", "bee"):
            (root / "folders" / split / label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(
                    root / "folders" / split / label / f"{i}.png"
                )
    shutil.copytree(root / "folders" / "val" / "ant", root / "photos")
    (root / "docs" / "figures").mkdir(parents=True)
    (root / "confusion.csv").write_text("class,ant,bee\nant,2,1\nbee,0,3\n")
    (root / "ours.csv").write_text("model,top1,gmacs,source\nmine,80.0,5.0,here\n")
    torch.save(timm.create_model("tnt_s", depth=1).state_dict(), root / "tnt_s_81.5.pth.tar")
    digits = ["--dataset", "digits", *tiny, *SHORT, "-b", "256", "--output", str(root / "output")]
    assert train([*digits, "--experiment", "digits"]) == 0
    assert train([*digits, "--img-size", "96", "--experiment", "digits96"]) == 0
    folders = [str(root / "folders"), "--model", "tnt_s", *tiny[2:], *SHORT, "--output", str(root / "output")]
    assert train([*folders, "--experiment", "tnt_s"]) == 0
    return root


@pytest.fixture
def published(monkeypatch):
    """What stands for the Hub: untrained weights of the model that is asked for."""

    def untrained(model_id, *args, **kwargs):
        return timm.create_model(model_id.partition("/")[2].partition(".")[0]).state_dict()

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", untrained)


@pytest.fixture
def give(house, published, tiny, load_script, monkeypatch, tmp_path, capfd):
    """Give a command, by the rule for its program."""
    monkeypatch.chdir(house)

    def run_script(main, *argv):
        status = main([REPLACED.get(arg, arg) for arg in argv])
        out, err = capfd.readouterr()
        assert status == 0, err
        return out

    def lacks_only_its_data(main, argv):
        """The command as it stands, without ImageNet."""
        (folder,) = [arg for arg in argv if arg.startswith("/path/to/imagenet")]
        assert main(argv) == 1
        assert f"{folder}: no such folder" in capfd.readouterr().err

    def train_py(*argv):
        if "/path/to/data" in argv:  # a download
            return run_script(train, *argv, "--print-config")
        small = [] if "--model" in argv and "tnt_ti" not in argv and "tnt_s" not in argv else tiny[4:]
        small = ["--img-size", "32", *small, *(["--freeze", "1"] if "--freeze" in argv else [])]
        if "--pretrained" in argv:  # these fit one size of network
            small = ["--img-size", "32", "--freeze", "6"]
        size = ["-b", "256"] if "configs/digits.yaml" in argv else []
        return run_script(train, *argv, *small, *SHORT, *size, "--output", str(tmp_path / "output"))

    def validate_py(*argv):
        if any(arg.startswith("/path/to/imagenet") for arg in argv):
            return lacks_only_its_data(validate, list(argv))
        out = run_script(validate, *argv, "--workers", "0")
        assert "each counted once" in out

    def script(name, *argv):
        if name == "slurm/submit":
            at = argv.index("--") if "--" in argv else len(argv)
            assert run_script(load_script(name).main, *argv[:at], "--dry-run", *argv[at:]).startswith("#!/bin/bash")
        elif name == "validate_all":
            lacks_only_its_data(load_script(name).main, list(argv))
        elif name == "figures":
            small = ["--dpi", "30", *SMALL_FIGURES.get(argv[0], [])]
            run_script(load_script(name).main, *argv, *small)
            assert Path(argv[argv.index("--output") + 1]).stat().st_size
        elif name == "benchmark":
            run_script(
                load_script(name).main,
                *argv,
                "--batch-size",
                "1",
                "--repeats",
                "1",
                "--threads",
                "1",
                "--img-size",
                "32",
            )
        else:
            assert name in ("predict", "export", "complexity"), f"no rule for scripts/{name}.py"
            small = ["--model-kwargs", "depth=1"] if "tnt_s_81.5.pth.tar" in argv else []
            assert run_script(load_script(name).main, *argv, *small) or "--output" in argv

    def python(program, *argv):
        if program == "-m":
            from tnt_timm.data.check.__main__ import main

            assert argv[0] == "tnt_timm.data.check", f"no rule for python -m {argv[0]}"
            return run_script(main, *argv[1:])
        if program in ("train.py", "validate.py"):
            return {"train.py": train_py, "validate.py": validate_py}[program](*argv)
        assert program.startswith("scripts/"), f"no rule for python {program}"
        return script(program.removeprefix("scripts/").removesuffix(".py"), *argv)

    def torchrun(*argv):
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(argv)
        return python(given.training_script, *given.training_script_args)  # in one process

    def pip(action, what):
        project = (
            (REPO / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
        )
        extras = re.findall(r"^(\w+) = ", project, re.MULTILINE)
        assert action == "install" and what in (".", *(f".[{extra}]" for extra in extras))

    def export(assignment):
        assert re.fullmatch(r"[A-Z_]+=\S+", assignment)

    def pytest_itself():
        """Which is what runs here."""

    rules = {"python": python, "torchrun": torchrun, "pip": pip, "export": export, "pytest": pytest_itself}

    def give(words):
        assert words[0] in rules, f"no rule for {shlex.join(words)}"
        rules[words[0]](*words[1:])

    return give


@pytest.mark.parametrize("block", BLOCKS)
def test_the_commands_of_a_block(block, give):
    for words in block:
        give(words)


def test_a_command_without_a_rule_fails(give):
    for command in (
        ["make"],
        ["python", "elsewhere.py"],
        ["python", "scripts/unknown.py"],
        ["pip", "install", ".[none]"],
    ):
        with pytest.raises(AssertionError):
            give(command)


def test_commands_are_in_blocks_that_say_so():
    assert {kind for _, kind, _ in FENCES} <= {"sh", "python", "text"}
