"""The training scripts under comparison, run from the command line with a probe that counts and kills."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from tnt_timm.data.digits import Digits
from tnt_timm.errors import UserError

Events = List[Dict[str, Any]]  # of all ranks, as the probe writes them
Resume = Optional[Tuple[Path, List[str]]]  # a checkpoint and the arguments that resume from it; None: start over

PROBE = Path(__file__).with_name("probe.py")
TIMEOUT_S = 1800  # for one run
SMALL = {"depth": 4, "embed_dim": 192, "inner_dim": 12, "num_heads_inner": 2, "num_heads_outer": 3}
# The random parts of the paper's recipe, without RandAugment: timm 1.0.29.dev0's fails with Pillow 13 (posterize to 0 bits).
RECIPE = "--color-jitter 0.4 --mixup 0.8 --cutmix 1.0 --reprob 0.25 --drop-path 0.1".split()


class Program(NamedTuple):
    """A checkout with train.py and validate.py."""

    name: str
    folder: Path
    saving: str  # its function that saves inside an epoch, for the probe
    ways: Mapping[str, Callable[[Path], Resume]]  # how it resumes: name -> function of the run folder
    train_arguments: Sequence[str] = ()  # in addition to those of both programs
    validate_arguments: Sequence[str] = ()
    model_kwargs: Mapping[str, Any] = MappingProxyType({})
    validates_distributed: bool = False


class Settings(NamedTuple):
    """What is trained, the same for all programs."""

    data: Path  # an image folder from `write_digits`
    epochs: int = 3
    batch_size: int = 32
    recovery_interval: int = 10  # updates between two saves inside an epoch; 0 is never
    model_kwargs: Mapping[str, Any] = MappingProxyType(SMALL)  # of timm's tnt_s_patch16_224 at 32x32
    processes: int = 1  # ranks in training
    plain: bool = False  # without augmentation, mixing and stochastic depth
    ema: bool = True

    @property
    def updates_per_epoch(self) -> int:
        return len(list(self.data.glob("train/*/*.png"))) // self.processes // self.batch_size


def this_project(folder: Path) -> Program:
    def same_command(run: Path) -> Resume:
        return next(((run / name, []) for name in ("last.pth.tar", "previous.pth.tar") if (run / name).is_file()), None)

    return Program(
        "this project",
        folder,
        "tnt_timm.training.trainer:Trainer.save",
        {"the same command": same_command},
        train_arguments=("--recovery-minutes", "0"),
        validates_distributed=True,
    )


def timms(folder: Path) -> Program:
    """Return timm's scripts. Their --resume FILE starts the epoch after the file's.

    Raises:
        UserError: the folder has no train.py.
    """
    if not (folder / "train.py").is_file():
        raise UserError(f"--timm-train: {folder}: no train.py in this folder; give a checkout of pytorch-image-models")

    def newest_file(run: Path) -> Resume:
        patterns = ("recovery-*-*.pth.tar", "checkpoint-*.pth.tar", "last.pth.tar")
        found = [path for pattern in patterns for path in run.glob(pattern)]
        path = max(found, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)
        return path and (path, ["--resume", str(path)])

    def epoch_again(run: Path) -> Resume:
        path, more = newest_file(run) or (None, [])
        if path is not None and path.name.startswith("recovery-"):
            more += ["--start-epoch", path.name.split("-")[1]]
        return path and (path, more)

    def whole_epochs(run: Path) -> Resume:
        found = sorted(run.glob("last.pth.tar")) or sorted(run.glob("checkpoint-*.pth.tar"))[-1:]
        return (found[0], ["--resume", str(found[0])]) if found else None

    ways = {
        "newest file": newest_file,
        "newest file, `--start-epoch` of its epoch": epoch_again,
        "last.pth.tar": whole_epochs,
    }
    saving = "timm.utils.checkpoint_saver:CheckpointSaver.save_recovery"
    results = ("--results-format", "json")
    return Program("timm", folder.resolve(), saving, ways, (), results, {"img_size": 32})


def write_digits(root: Path, train: int = 1437, validation: int = 355) -> Path:
    """Write scikit-learn's digits as an image folder with balanced classes. None of 2, 3 and 7 divides 355."""
    for split, count in (("train", train), ("validation", validation)):
        images = Digits(split)
        targets = list(images.targets)
        balanced = sorted((targets[:index].count(target), target, index) for index, target in enumerate(targets))
        for _, target, index in balanced[:count]:
            image, _ = images.load(index)
            folder = root / split / str(target)
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{index:04}.png")
    return root


def train(program: Program, settings: Settings, run: Path, more: Sequence[str] = (), **probe: Any) -> Events:
    """Start a run, or resume it with the arguments `more`."""
    arguments = [
        *_common(program, settings),
        *("--epochs", str(settings.epochs), "--opt", "adamw", "--lr", "1.5e-3", "--sched", "cosine"),
        *("--warmup-epochs", "1", "--cooldown-epochs", "0", "--seed", "42"),
        *(("--model-ema", "--model-ema-decay", "0.99") if settings.ema else ()),
        *("--recovery-interval", str(settings.recovery_interval)),
        *(["--no-aug"] if settings.plain else RECIPE),
        *("--output", str(run.parent), "--experiment", run.name),
        *program.train_arguments,
    ]
    return execute(program, "train.py", [*arguments, *more], settings.processes, **probe)


def validate_arguments(program: Program, settings: Settings, weights: Path, results: Path) -> List[str]:
    files = ("--checkpoint", str(weights), "--results-file", str(results))
    return [*_common(program, settings), *files, *program.validate_arguments]


def _common(program: Program, settings: Settings) -> List[str]:
    kwargs = [f"{name}={value}" for name, value in {**settings.model_kwargs, **program.model_kwargs}.items()]
    return [
        *("--data-dir", str(settings.data), "--model", "tnt_s_patch16_224", "--img-size", "32", "--num-classes", "10"),
        *(("--model-kwargs", *kwargs) if kwargs else ()),
        *("--batch-size", str(settings.batch_size), "--workers", "1", "--device", "cpu"),
    ]


def execute(program: Program, script: str, arguments: Sequence[str], processes: int = 1, **probe: Any) -> Events:
    """Run train.py or validate.py until it ends or the probe (with settings `probe`) kills it; then kill all its processes.

    Raises:
        UserError: it failed, with its last line.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(PROBE), str(program.folder / script), *arguments]
    ranks: List[subprocess.Popen] = []
    with tempfile.TemporaryDirectory() as name:
        events, outputs = ([Path(name, f"{kind}{rank}") for rank in range(processes)] for kind in ("events", "output"))
        try:
            for rank in range(processes):
                events[rank].touch()
                env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(program.folder)}
                if processes > 1:
                    env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                    env |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                env["PROBE"] = json.dumps({"log": str(events[rank]), "started": time.monotonic(), **probe})
                with outputs[rank].open("wb") as output:
                    streams: Dict[str, Any] = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=output)
                    ranks.append(subprocess.Popen(command, env=env, start_new_session=True, **streams))
            statuses = _until_one_fails(ranks)
        finally:
            for process in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # workers too
                process.wait()
        if -signal.SIGKILL not in statuses and any(statuses):
            failed = next(rank for rank, status in enumerate(statuses) if status)
            lines = filter(str.strip, reversed(outputs[failed].read_text().splitlines()))
            raise UserError(f"{program.name}: {script} failed: {next(lines, 'without output')}")
        return [json.loads(line) for file in events for line in file.open()]


def _until_one_fails(ranks: Sequence[subprocess.Popen]) -> List[Optional[int]]:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        statuses = [rank.poll() for rank in ranks]
        if None not in statuses or any(statuses):
            return statuses
        if time.monotonic() > deadline:
            raise UserError(f"{' '.join(map(str, ranks[0].args))}: did not end within {TIMEOUT_S} s")
        time.sleep(0.01)
