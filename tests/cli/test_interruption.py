"""A run is a function of its config and world size: stopped anywhere and started again, it ends with the same bits."""

import re
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest
import torch
from PIL import Image

from tnt_timm.training import checkpointing

MODEL = ["--model", "tnt_ti", "--img-size", "32", "--model-kwargs", "depth=1", "embed_dim=12", "inner_dim=4"]
MODEL += ["num_heads_inner=2", "num_heads_outer=3"]
RICH = """--aa rand-m9-mstd0.5-inc1 --mixup 0.8 --cutmix 1.0 --reprob 0.25 --aug-repeats 3 --drop 0.1 --drop-path 0.2
    --model-ema --model-ema-decay 0.9 --model-ema-warmup --opt adamw --lr 1e-2 --warmup-epochs 1 --sched-on-updates
    --cooldown-epochs 0 --epochs 2 -b 2 --grad-accum-steps 2 --log-interval 1 --device cpu --workers 0""".split()
UPDATES = 6  # of an epoch of one process, with 25 images


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three classes that differ in colour: 25 and 13 images, so that nothing divides evenly."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    for split, counts in (("train", (9, 8, 8)), ("val", (5, 4, 4))):
        for number, count in enumerate(counts):
            folder = root / split / f"class{number}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (40, 48, 3), dtype=np.uint8)
                pixels[:, :, number] += 90
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def argv(data, tmp_path) -> Callable[..., List[object]]:
    """The arguments of a run with all that is random in it; later arguments win."""
    return lambda *more: [data, *MODEL, *RICH, "--output", tmp_path, "--experiment", "run", *more]


@pytest.fixture(scope="module")
def straight(launch, data, tmp_path_factory) -> Callable[..., Path]:
    """The folder of the same run without an interruption, and without a save inside an epoch."""
    done: Dict[Any, Path] = {}

    def straight(processes: int = 1, *more: object) -> Path:
        if (processes, more) not in done:
            folder = tmp_path_factory.mktemp("straight")
            command = [data, *MODEL, *RICH, "--recovery-minutes", "0", *more, "--output", folder, "--experiment", "run"]
            assert launch(folder / "log", command, processes).wait() == 0
            done[processes, more] = folder / "run"
        return done[processes, more]

    return straight


def assert_same_bits(one: Path, two: Path) -> None:
    """Weights, averaged weights, optimizer, progress, summary, best checkpoint, and the folder's model for timm."""
    for name in (checkpointing.LAST, checkpointing.BEST):
        a, b = checkpointing.read(one / name), checkpointing.read(two / name)
        for key in ("state_dict", "state_dict_ema", "optimizer", "amp_scaler", "progress", "metrics", "epoch"):
            assert (key in a) == (key in b) and equal(a.get(key), b.get(key)), f"{name}: {key}"
    for name in ("summary.csv", "model.safetensors", "config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def updates_of(out: str) -> List[str]:
    """The updates that a run's log names: ["1/1", "1/2", ...], as epoch/update."""
    return [f"{epoch}/{update}" for epoch, update in re.findall(r"^epoch (\d+)/\d+  update (\d+)/", out, re.M)]


@pytest.mark.parametrize(
    "processes, interval, workers",
    [(1, 1, (0, 1, 3)), (1, 2, (3, 0, 1)), (2, 1, (1, 0, 2))],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_killed_twice_in_one_epoch(start, argv, straight, tmp_path, processes, interval, workers):
    """SIGKILL to all processes at once; the number of loader processes changes each time."""
    first, second = ("2/3", "2/5") if processes == 1 else ("2/2", "2/3")
    ends = []
    for moment, count in zip((first, second, None), workers):
        run = start(argv("--recovery-interval", interval, "--workers", count), processes)
        if moment is None:
            assert run.wait() == 0, run.err
        else:
            run.until(lambda: moment in updates_of(run.out))
            run.kill()
        ends.append(run.out)
    for before, after in zip(ends, ends[1:]):
        begun, lost = updates_of(after)[0], len(set(updates_of(before)) & set(updates_of(after)))
        assert begun.startswith("2/") and begun != "2/1", ends
        assert lost <= 2 * interval, ends  # one save is being written, and the next one has not begun
    assert_same_bits(straight(processes), tmp_path / "run")
