"""What all tests share: small real images in class folders, and a run of the commands inside this process."""

import gzip
import importlib
import os
import random
import signal
import struct
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from tnt_timm.data.workers import usable_cores

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
REPO = Path(__file__).parent.parent
signal.signal(
    signal.SIGHUP, signal.SIG_DFL
)  # the tests may be started by nohup, which their processes must not inherit
# The models here are tiny: more threads would only wait for each other. tests/processors.py sets another number.
torch.set_num_threads(int(os.environ.get("TNT_TEST_THREADS", 1)))

# A TNT that trains in milliseconds: 32x32 images, 4 sentences of 16 words.
TINY = ["--model", "tnt_ti", "--img-size", "32", "--model-kwargs", "depth=2", "embed_dim=24", "inner_dim=6"]
TINY += ["num_heads_inner=2", "num_heads_outer=3"]


# The published command line of TNT-S, after the launcher and the script.
OFFICIAL = """--model tnt_s_patch16_224 --sched cosine --epochs 300 --opt adamw -j 8 --warmup-lr 1e-6 --mixup .8 --cutmix 1.0
    --model-ema --model-ema-decay 0.99996 --aa rand-m9-mstd0.5-inc1 --color-jitter 0.4 --warmup-epochs 5
    --opt-eps 1e-8 --repeated-aug --remode pixel --reprob 0.25 --amp --lr 1e-3 --weight-decay .05 --drop 0
    --drop-path .1 -b 128 --output OUT""".split()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite runs on up to four cores; named files or tests in pytest's own process, where a debugger works."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(4, len(usable_cores())) if whole else 0


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    """Tests that are marked with `cuda` are skipped where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def official() -> Sequence[str]:
    return OFFICIAL


@pytest.fixture(scope="session")
def tiny() -> Sequence[str]:
    return TINY


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes class folders of random images; returns their root."""

    def make(name: str = "data", train: int = 8, val: int = 4, classes: Sequence[str] = ("ant", "bee", "cat")) -> Path:
        rng = np.random.default_rng(0)
        for split, count in (("train", train), ("val", val)):
            for number, label in enumerate(classes):
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(0, 160, (40, 48, 3), dtype=np.uint8)
                    pixels[:, :, number % 3] += 90  # the classes differ in colour, so that there is something to learn
                    Image.fromarray(pixels).save(folder / f"{i}.png")
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def photograph() -> Image.Image:
    """640x427, in colour."""
    return Image.fromarray(load_sample_images().images[0])


@pytest.fixture(scope="session")
def cut(photograph: Image.Image) -> Callable[[int], Image.Image]:
    """cut(number) -> a piece of the photograph, another one for each number."""
    return lambda number: photograph.crop((9 * number, 5 * number, 9 * number + 48, 5 * number + 32))


@pytest.fixture(scope="session")
def write_pets(cut: Callable[[int], Image.Image]) -> Callable[[Path], Path]:
    """Oxford-IIIT Pets of three breeds, as it comes out of its archives: images in one folder, a list per split."""

    def write(root: Path) -> Path:
        folder, number = root / "oxford-iiit-pet", 0
        for part in ("images", "annotations"):
            (folder / part).mkdir(parents=True)
        for split, per_class in (("trainval", 2), ("test", 1)):
            lines = []
            for label, breed in enumerate(["Abyssinian", "american_bulldog", "Bengal"], 1):
                for _ in range(per_class):
                    cut(number).save(folder / "images" / f"{breed}_{number}.jpg")
                    lines.append(f"{breed}_{number} {label} 1 1\n")
                    number += 1
            (folder / "annotations" / f"{split}.txt").write_text("".join(lines))
        return root

    return write


@pytest.fixture(scope="session")
def write_fashion() -> Callable[..., Path]:
    """Fashion-MNIST of a few images in a folder: unpacked as by torchvision, or gzipped as in Debian's package."""

    def write(root: Path, train: int = 64, test: int = 32, gzipped: bool = False) -> Path:
        folder = root if gzipped else root / "FashionMNIST" / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for prefix, count in (("train", train), ("t10k", test)):
            labels = np.arange(count, dtype=np.uint8) % 10
            images = rng.integers(0, 100, (count, 28, 28), dtype=np.uint8) + 15 * labels[:, None, None]
            for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
                header = struct.pack(f">{1 + array.ndim}i", 0x0800 + array.ndim, *array.shape)
                path = folder / f"{prefix}-{kind}-ubyte"
                if gzipped:
                    path.with_name(path.name + ".gz").write_bytes(gzip.compress(header + array.tobytes()))
                else:
                    path.write_bytes(header + array.tobytes())
        return root

    return write


def colour(index: int) -> Image.Image:
    """An image that tells a class of a thousand."""
    return Image.new("RGB", (8, 8), (index // 32 * 8, index % 32 * 8, 0))


@pytest.fixture(scope="session")
def fill() -> Callable[..., Path]:
    """fill(root, [(folder, class), ...]): one image per folder, of the colour of its class; PNG's bytes, so that it is exact."""

    def fill(root: Path, folders: Sequence[Tuple[str, int]], name: str = "0.jpeg") -> Path:
        for folder, index in folders:
            (root / folder).mkdir(parents=True)
            colour(index).save(root / folder / name, format="png")
        return root

    fill.colour = colour
    return fill


@pytest.fixture(scope="session")
def write_imagenet_v2(fill: Callable[..., Path]) -> Callable[[Path], Path]:
    """ImageNet-V2 with one image per class: the folders are the classes' numbers."""

    def write(root: Path) -> Path:
        folders = [(str(index), index) for index in range(1000)]
        random.Random(0).shuffle(folders)
        return fill(root / "imagenetv2-matched-frequency-format-val", folders)

    return write


@pytest.fixture
def assert_same_bits() -> Callable[[Path, Path], None]:
    """Compares two run folders: weights, averaged weights, optimizer, progress, summary, best checkpoint, timm's files."""
    from tnt_timm.checkpoints import file_format

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(equal, a, b))
        return a == b

    def compare(one: Path, two: Path) -> None:
        keys = {"state_dict", "state_dict_ema", "optimizer", "amp_scaler", "progress", "metrics", "epoch"}
        for name in (file_format.LAST, file_format.BEST):
            a, b = file_format.read(one / name), file_format.read(two / name)
            assert keys & a.keys() == keys & b.keys()
            for key in keys & a.keys():
                assert equal(a[key], b[key]), f"{name}: {key}"
        for name in ("summary.csv", "model.safetensors", "config.json"):
            assert (one / name).read_bytes() == (two / name).read_bytes(), name

    return compare


class Outcome(NamedTuple):
    """What a command did: exit status, stdout, stderr."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line; fails when there is none or more than one."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err, self.err
        return lines[0]


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], Any]:
    """A command's module, by its name."""
    return lambda name: importlib.import_module(f"tnt_timm.commands.{name}")


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """A command in this process may set another number of threads; the next test has the usual one again."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_script(
    load_script: Callable[[str], Any], capfd: pytest.CaptureFixture, keep_threads: None
) -> Callable[..., Outcome]:
    """A command in this process: its name and its arguments -> status, stdout, stderr."""

    def run(name: str, *argv: object) -> Outcome:
        return Outcome(load_script(name).main([str(arg) for arg in argv]), *capfd.readouterr())

    return run


@pytest.fixture
def run_train(capfd: pytest.CaptureFixture, keep_threads: None) -> Callable[..., Outcome]:
    """train.py in this process: arguments -> status, stdout, stderr."""
    from tnt_timm.commands.train import main
    from tnt_timm.runtime.signals import SIGNALS

    def run(*argv: object) -> Outcome:
        state, handlers = torch.random.get_rng_state(), {number: signal.getsignal(number) for number in SIGNALS}
        status = main([str(arg) for arg in argv])
        torch.random.set_rng_state(state)
        for number, handler in handlers.items():  # a run that was stopped leaves them ignored
            signal.signal(number, handler)
        return Outcome(status, *capfd.readouterr())

    return run


@pytest.fixture
def run_validate(capfd: pytest.CaptureFixture, keep_threads: None) -> Callable[..., Outcome]:
    """validate.py in this process."""
    from tnt_timm.commands.validate import main

    def run(*argv: object) -> Outcome:
        return Outcome(main([str(arg) for arg in argv]), *capfd.readouterr())

    return run


@pytest.fixture
def train(run_train, make_folder, tiny, tmp_path):
    """A small run on a folder of images, in this process: trains the tiny model on the folder; returns outcome and run folder."""
    data = make_folder()

    def train(*argv, name="run", status=0):
        out = run_train(data, *tiny, "--output", tmp_path / "out", "--experiment", name, *argv)
        assert out.status == status, out.err
        return out, tmp_path / "out" / name

    return train
