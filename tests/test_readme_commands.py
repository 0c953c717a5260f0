"""Every command in README and docs/ is run, with small settings after its own: on ImageNet, ImageNet-V2 and Pets in their own
layouts, with one tiny image per class, and on weights that stand for published ones.

README's first run is stopped half-way, so that its block on resuming has something to resume. Several processes are started
where README trains on many GPUs; elsewhere one. What needs a cluster is printed with --dry-run; what installs is run by
.ci/run. A command that no rule covers fails.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import List, Sequence, Tuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

from tnt_timm.commands.train import main as train
from tnt_timm.commands.validate import main as validate
from tnt_timm.data import torchvision_sets
from tnt_timm.runtime.signals import SIGNALS
from tnt_timm.training.trainer import Trainer

REPO = Path(__file__).parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
SHORT = "-b 8 --min-lr 0 --epochs 1 --warmup-epochs 0 --cooldown-epochs 0 --workers 0".split()
SHORT += "--device cpu --no-amp --crop-pct 1.0".split()
SMALL_FIGURES = {
    "feature-maps": ["--img-size", "64"],
    "tsne-maps": ["--img-size", "64"],
    "tsne-classes": ["--num-images", "60"],
    "diversity": ["--num-images", "20"],
}
REPLACED = {
    "/path/to/folders": "folders",
    "/path/to/imagenet": "imagenet",
    "/path/to/imagenetv2-matched-frequency-format-val": "imagenetv2-matched-frequency-format-val",
    "/path/to/data": "data",
    "deit_*": "deit_tiny_*",
    "https://example.org/cat.jpg": "photos/0.png",
}


def commands(block: str) -> List[List[str]]:
    """The words of each command of a block."""
    lines = block.replace("\\\n", " ").split("\n")
    return [words for line in lines for part in line.split("&&") if (words := shlex.split(part, comments=True))]


def blocks(page: Path) -> List[Tuple[str, str, str]]:
    """The fenced blocks: the heading that they stand under, kind, text."""
    found, heading = [], ""
    for title, kind, text in re.findall(r"^#+ ([^\n]*)$|^```([^\n]*)\n(.*?)^```$", page.read_text(), re.M | re.S):
        heading = title or heading
        found += [] if title else [(heading, kind, text)]
    return found


FENCES = [(page, *found) for page in PAGES for found in blocks(page)]
BLOCKS = [
    pytest.param(heading, commands(text), id=f"{page.name}: {heading}: {text[:50].strip()}")
    for page, heading, kind, text in FENCES
    if kind == "sh"
]


def smaller(argv: Sequence[str], tiny: Sequence[str]) -> List[str]:
    """What makes a training command a matter of seconds."""
    size = ["--img-size", "32"]
    if "--pretrained" in argv or any("finetune" in arg for arg in argv):  # these weights fit one size of network
        return [*SHORT, *size, "-b", "4", "--freeze", "6"]
    if any("fashion" in arg for arg in argv):  # small networks, on few images
        return [*SHORT, "-b", "16", "--train-split", "train[:64]", "--val-split", "train[-30:]"]
    network = [] if "deit_tiny_patch16_224" in argv else tiny[4:]
    return [*SHORT, *size, *network, *(["-b", "256"] if "--config" in argv else [])]


def given(main, argv: Sequence[str]) -> int:
    """Give a command; afterwards signals mean what they meant."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        return main([REPLACED.get(arg, arg) for arg in argv])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def readme_command(start: str) -> List[str]:
    """The first command of README and docs/ that begins so, without its launcher."""
    (words, *_) = [words for _, _, _, text in FENCES for words in commands(text) if shlex.join(words).startswith(start)]
    return words[words.index("train.py") + 1 :]


@pytest.fixture(scope="module")
def house(tiny, tmp_path_factory, fill, write_imagenet_v2, write_pets, write_fashion):
    """A clone with data, weights and photographs, in which README's and docs' commands have made four runs.

    The one on digits was stopped inside its epoch, as README's block on resuming supposes.
    """
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
    shutil.copytree(REPO / "benchmarks", root / "benchmarks")
    (root / "confusion.csv").write_text("class,ant,bee\nant,2,1\nbee,0,3\n")
    (root / "ours.csv").write_text("model,top1,gmacs,source\nmine,80.0,5.0,here\n")
    torch.save(timm.create_model("tnt_s", depth=1).state_dict(), root / "tnt_s_81.5.pth.tar")
    synsets = [(name, index) for index, name in enumerate(ImageNetInfo().label_names())]
    for split in ("train", "val"):
        fill(root / "imagenet" / split, synsets)
    write_imagenet_v2(root)
    write_pets(root / "data")

    def begin(start: str, *more: str) -> int:
        argv = [*readme_command(start), *more]
        return given(train, [*argv, *smaller(argv, tiny), *more])

    def stopping(self, *args):
        if self.progress.updates == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    real = Trainer.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision_sets, "DEBIAN_FASHION_MNIST", write_fashion(root / "fashion", 100, gzipped=True))
        patch.chdir(root)
        assert begin("python train.py --config configs/fashion/tnt.yaml --seed 1") == 0
        assert begin("python train.py --config configs/fashion/deit.yaml --seed 1") == 0
        assert begin("torchrun --nproc-per-node 8 train.py --config configs/tnt_s.yaml") == 0
        with patch.context() as inner:
            inner.setattr(Trainer, "train_step", stopping)
            assert begin("torchrun train.py --config configs/digits.yaml") == 75
        patch.chdir(REPO)
        yield root


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
    at = {}  # the heading that the block stands under

    def run_script(main, *argv):
        status = given(main, argv)
        out, err = capfd.readouterr()
        assert status == 0, err
        return out

    def train_py(*argv):
        resumes = at["heading"] == "Resume"
        output = house / "output" if resumes else tmp_path / f"output{len(list(tmp_path.iterdir()))}"
        out = run_script(train, *argv, *smaller(argv, tiny), "--output", str(output))
        assert ("resuming from" in out) == resumes and "done: best" in out
        return out

    def validate_py(*argv):
        size = ["--img-size", "32"] if "--pretrained" in argv else []
        out = run_script(validate, *argv, "--workers", "0", *size)
        images = 360 if "output/digits" in argv else 32 if "output/miniature/tnt-seed1" in argv else 1000
        assert f"({images} images, each counted once)" in out

    def script(name, *argv):
        if name == "slurm/submit":
            end = argv.index("--") if "--" in argv else len(argv)
            assert run_script(load_script("submit").main, *argv[:end], "--dry-run", *argv[end:]).startswith(
                "#!/bin/bash"
            )
        elif name == "validate_all":
            out = run_script(load_script(name).main, *argv, "--workers", "0", "--img-size", "32")
            assert all(f"{model}: top-1 " in out for model in ("output/tnt_s", "deit_tiny_patch16_224.fb_in1k")), out
        elif name == "figures":
            small = ["--dpi", "30", *SMALL_FIGURES.get(argv[0], [])]
            run_script(load_script(name).main, *argv, *small)
            assert Path(argv[argv.index("--output") + 1]).stat().st_size
        elif name == "benchmark":
            models = [arg for arg in argv if timm.is_model(arg)]
            kept = [arg for arg in argv if arg not in models[2:]]
            small = "--batch-size 1 --repeats 1 --threads 1 --img-size 32 --output".split()
            run_script(load_script(name).main, *kept, *small, str(tmp_path / "speed.json"))
        else:
            assert name in ("predict", "export", "complexity"), f"no rule for scripts/{name}.py"
            small = ["--model-kwargs", "depth=1"] if "tnt_s_81.5.pth.tar" in argv else []
            assert run_script(load_script(name).main, *argv, *small) or "--output" in argv

    def python(program, *argv):
        if program in ("train.py", "validate.py"):
            return {"train.py": train_py, "validate.py": validate_py}[program](*argv)
        assert program.startswith("scripts/"), f"no rule for python {program}"
        return script(program.removeprefix("scripts/").removesuffix(".py"), *argv)

    def tnt_check(*argv):
        run_script(load_script("check").main, *argv)

    def torchrun(*argv):
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(argv)
        script, arguments = launch.training_script, launch.training_script_args
        if at["heading"] == "Train on many GPUs":
            return on_two_processes(script, *arguments)
        return python(script, *arguments)  # in one process

    def on_two_processes(script, *argv):
        argv = [*argv, *smaller(argv, tiny), "--output", str(tmp_path / "output")]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script]
        command += [REPLACED.get(arg, arg) for arg in argv]
        environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "256 per process x 2 processes x 1 accumulation = 512" in done.stdout and "done: best" in done.stdout

    def pip(action, what):
        project = (
            (REPO / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
        )
        known = re.findall(r"^(\w+) = ", project, re.MULTILINE)
        asked = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)
        assert action == "install" and asked and set((asked[1] or known[0]).split(",")) <= set(known)

    def export(assignment):
        assert re.fullmatch(r"[A-Z_]+=\S+", assignment)

    def pytest_itself():
        """Which is what runs here."""

    rules = {"python": python, "torchrun": torchrun, "pip": pip, "export": export, "pytest": pytest_itself}
    rules["tnt-check"] = tnt_check

    def give(words, heading=""):
        at["heading"] = heading
        assert words[0] in rules, f"no rule for {shlex.join(words)}"
        rules[words[0]](*words[1:])

    return give


@pytest.mark.parametrize("heading, block", BLOCKS)
def test_the_commands_of_a_block(heading, block, give):
    for words in block:
        give(words, heading)


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
    assert {kind for _, _, kind, _ in FENCES} <= {"sh", "python", "text"}
