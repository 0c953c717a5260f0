"""The training scripts that are compared, run as a user runs them, with a probe that counts and kills."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from tnt_timm.data.digits import Digits
from tnt_timm.errors import UserError

PROBE = Path(__file__).with_name("probe.py")
PATIENCE_S = 1800  # until a run that does not end has failed
SMALL = {"depth": 4, "embed_dim": 192, "inner_dim": 12, "num_heads_inner": 2, "num_heads_outer": 3}
# What is random in the paper's recipe, but for RandAugment: timm's of 1.0.29.dev0 fails with Pillow 13 (posterize to 0 bits).
RECIPE = "--color-jitter 0.4 --mixup 0.8 --cutmix 1.0 --reprob 0.25 --drop-path 0.1".split()
PLAIN = ["--no-aug"]


@dataclass(frozen=True)
class Program:
    """A training script and how it is used.

    Args:
        name: in the tables.
        folder: that holds train.py and validate.py.
        saving: its function that saves inside an epoch, for the probe.
        own: arguments of train.py, beside those that both understand.
        model_kwargs: the same of the model.
        own_of_validate: the same of validate.py.
        validates_on_many: whether validate.py shares its work among processes.
        ways: of going on after a kill: name -> (run folder -> (checkpoint, arguments); None: it starts over).
    """

    name: str
    folder: Path
    saving: str
    own: Tuple[str, ...]
    model_kwargs: Tuple[Tuple[str, Any], ...]
    own_of_validate: Tuple[str, ...]
    validates_on_many: bool
    ways: Mapping[str, Callable[[Path], Optional[Tuple[Path, List[str]]]]]


@dataclass(frozen=True)
class Settings:
    """What is trained, the same for all programs.

    Args:
        data: an image folder from `write_digits`.
        recovery_interval: updates between two saves inside an epoch; 0 is none.
        model_kwargs: of timm's `tnt_s_patch16_224` at 32x32.
        processes: of training.
        plain: without augmentation, mixing and stochastic depth.
        ema: with averaged weights.
    """

    data: Path
    epochs: int = 3
    batch_size: int = 32
    recovery_interval: int = 10
    model_kwargs: Tuple[Tuple[str, Any], ...] = tuple(SMALL.items())
    processes: int = 1
    plain: bool = False
    ema: bool = True

    @property
    def updates_per_epoch(self) -> int:
        return len(list(self.data.glob("train/*/*.png"))) // self.processes // self.batch_size


@dataclass(frozen=True)
class Ran:
    """A run that has ended, by itself or by the probe: the probe's events of all processes."""

    events: List[Dict[str, Any]]

    def first_update_s(self) -> float:
        """From the start of the process to the end of its first update."""
        return next(event["seconds"] for event in self.events if "update" in event)

    def evaluated(self) -> int:
        """Images that went through the model in evaluation."""
        return sum(event.get("evaluated", 0) for event in self.events)


def this_project(folder: Path) -> Program:
    """This project's train.py in its checkout; going on needs no argument: the same command does."""

    def same_command(run: Path) -> Optional[Tuple[Path, List[str]]]:
        found = [run / name for name in ("last.pth.tar", "previous.pth.tar") if (run / name).is_file()]
        return (found[0], []) if found else None

    saving = "tnt_timm.training.trainer:Trainer.save"
    ways = {"the same command": same_command}
    return Program("this project", folder, saving, ("--recovery-minutes", "0"), (), (), True, ways)


def timms(folder: Path) -> Program:
    """timm's train.py in a checkout; --resume takes a file, and starts the epoch after that file's.

    Raises:
        UserError: there is no train.py.
    """
    if not (folder / "train.py").is_file():
        raise UserError(f"--timm-train: {folder}: holds no train.py; give a checkout of pytorch-image-models")

    def newest(run: Path) -> Optional[Path]:
        found = [*run.glob("recovery-*-*.pth.tar"), *run.glob("checkpoint-*.pth.tar"), *run.glob("last.pth.tar")]
        return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)

    def next_epoch(run: Path) -> Optional[Tuple[Path, List[str]]]:
        path = newest(run)
        return (path, ["--resume", str(path)]) if path else None

    def epoch_again(run: Path) -> Optional[Tuple[Path, List[str]]]:
        path = newest(run)
        if path is None or not path.name.startswith("recovery-"):
            return next_epoch(run)
        return path, ["--resume", str(path), "--start-epoch", path.name.split("-")[1]]

    def whole_epochs(run: Path) -> Optional[Tuple[Path, List[str]]]:
        found = sorted(run.glob("last.pth.tar")) or sorted(run.glob("checkpoint-*.pth.tar"))[-1:]
        return (found[0], ["--resume", str(found[0])]) if found else None

    ways = {
        "newest file": next_epoch,
        "newest file, `--start-epoch` of its epoch": epoch_again,
        "last.pth.tar": whole_epochs,
    }
    saving = "timm.utils.checkpoint_saver:CheckpointSaver.save_recovery"
    size = (("img_size", 32),)
    return Program("timm", folder.resolve(), saving, (), size, ("--results-format", "json"), False, ways)


def write_digits(root: Path, train: int = 1437, validation: int = 355) -> Path:
    """scikit-learn's digits as an image folder, so many of a split, as equal in number as can be; none of 2, 3, 7 divides 355."""
    for split, count in (("train", train), ("validation", validation)):
        images = Digits(split)
        seen: Counter = Counter()
        turns = []  # (how many of its class came before, class, index)
        for index, target in enumerate(images.targets):
            turns.append((seen[target], target, index))
            seen[target] += 1
        for _, target, index in sorted(turns)[:count]:
            image, _ = images.load(index)
            folder = root / split / str(target)
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{index:04}.png")
    return root


def train_arguments(program: Program, settings: Settings, run: Path) -> List[str]:
    """The command line of a run after train.py."""
    return [
        *_common(program, settings),
        *("--epochs", str(settings.epochs), "--opt", "adamw", "--lr", "1.5e-3", "--sched", "cosine"),
        *("--warmup-epochs", "1", "--cooldown-epochs", "0", "--seed", "42"),
        *(("--model-ema", "--model-ema-decay", "0.99") if settings.ema else ()),
        *("--recovery-interval", str(settings.recovery_interval)),
        *(PLAIN if settings.plain else RECIPE),
        *("--output", str(run.parent), "--experiment", run.name),
        *program.own,
    ]


def validate_arguments(program: Program, settings: Settings, weights: Path, results: Path) -> List[str]:
    """The command line of an evaluation after validate.py, whose results go to a .json file."""
    files = ("--checkpoint", str(weights), "--results-file", str(results))
    return [*_common(program, settings), *files, *program.own_of_validate]


def _common(program: Program, settings: Settings) -> List[str]:
    kwargs = [f"{name}={value}" for name, value in (*settings.model_kwargs, *program.model_kwargs)]
    return [
        *("--data-dir", str(settings.data), "--model", "tnt_s_patch16_224", "--img-size", "32", "--num-classes", "10"),
        *(("--model-kwargs", *kwargs) if kwargs else ()),
        *("--batch-size", str(settings.batch_size), "--workers", "1", "--device", "cpu"),
    ]


def execute(program: Program, script: str, arguments: Sequence[str], processes: int = 1, **probe: Any) -> Ran:
    """Run a script to its end, or until the probe kills it; then every process of it is killed.

    Args:
        script: train.py or validate.py.
        probe: its settings, see probe.py.

    Raises:
        UserError: it failed, with its last line.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: List[subprocess.Popen] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        try:
            for rank in range(processes):
                (scratch / f"events{rank}").touch()
                env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(program.folder)}
                if processes > 1:
                    env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                    env |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                env["PROBE"] = json.dumps({"log": f"{scratch}/events{rank}", "started": time.monotonic(), **probe})
                command = [sys.executable, str(PROBE), str(program.folder / script), *arguments]
                with open(scratch / f"said{rank}", "wb") as said:
                    streams: Dict[str, Any] = dict(stdout=said, stderr=said, stdin=subprocess.DEVNULL)
                    ranks.append(subprocess.Popen(command, env=env, start_new_session=True, **streams))
            statuses = _until_one_fails(ranks)
        finally:
            _kill(ranks)
        if -signal.SIGKILL not in statuses and any(statuses):
            failed = next(rank for rank, status in enumerate(statuses) if status)
            said = (scratch / f"said{failed}").read_text().splitlines()
            why = next(filter(str.strip, reversed(said)), "without a word")
            raise UserError(f"{program.name}: {script} failed: {why}")
        lines = [line for rank in range(processes) for line in (scratch / f"events{rank}").open()]
        return Ran([json.loads(line) for line in lines])


def _until_one_fails(ranks: Sequence[subprocess.Popen]) -> List[Optional[int]]:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        statuses = [rank.poll() for rank in ranks]
        if None not in statuses or any(statuses):
            return statuses
        if time.monotonic() > deadline:
            raise UserError(f"{' '.join(map(str, ranks[0].args))}: did not end within {PATIENCE_S} s")
        time.sleep(0.01)


def _kill(ranks: Sequence[subprocess.Popen]) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)  # loader processes too
        rank.wait()


def train(program: Program, settings: Settings, run: Path, more: Sequence[str] = (), **probe: Any) -> Ran:
    """Start a run, or with `more` of a way let it go on."""
    return execute(program, "train.py", [*train_arguments(program, settings, run), *more], settings.processes, **probe)
