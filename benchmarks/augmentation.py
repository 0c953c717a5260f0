#!/usr/bin/env python3
"""Does it matter for the accuracy where images are augmented? Train both ways, with `python benchmarks/augmentation.py`.

The small networks of configs/digits.yaml and configs/fashion/tnt.yaml are trained with RandAugment in workers and on the device,
from the same seeds. Writes benchmarks/augmentation.md. Needs `pip install '.[miniature]'`, and Fashion-MNIST as
benchmarks/miniature does.
"""

import csv
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from scipy.stats import ttest_rel

from tnt_timm.atomic_files import replace_text
from tnt_timm.commands.entry_point import run
from tnt_timm.console import say, show, table
from tnt_timm.data.workers import usable_cores
from tnt_timm.errors import UserError
from tnt_timm.settings.command_line import setting
from tnt_timm.settings.paths import PathText
from tnt_timm.settings.schema import Group, OutputFile, PositiveInt

ROOT = Path(__file__).resolve().parents[1]
POLICY = "rand-m9-mstd0.5-inc1"  # of the recipe
WAYS = ("worker", "device")
# Data -> flags of train.py. The accuracy after the last epoch counts, so that the test images choose nothing.
DATA: Dict[str, Tuple[str, ...]] = {
    "Digits": ("--config", "digits", "--workers", "0"),
    "Fashion-MNIST": ("--config", "fashion/tnt", "--val-split", "test"),
}


class Settings(Group):
    """Train small networks on digits and Fashion-MNIST with RandAugment in workers and on the device, and compare their
    accuracies. Finished runs are skipped."""

    seeds: PositiveInt = setting(5, "runs of each kind", ge=2)
    jobs: PositiveInt = setting(len(usable_cores()), "runs at a time")
    epochs: int = setting(0, "epochs of a run, for a quick test (default: those of the config)", ge=0)
    data_dir: PathText = setting("", "folder of Fashion-MNIST (default: of Debian's package)")
    output: PathText = setting("output/augmentation", "folder of the runs", min_length=1)
    report: OutputFile = setting("benchmarks/augmentation.md", "page")


class Run(NamedTuple):
    """A training run."""

    data: str
    way: str
    seed: int
    epochs: int  # 0: those of the config

    @property
    def name(self) -> str:
        length = f"-{self.epochs}epochs" if self.epochs else ""
        return f"{self.data}-{self.way}-seed{self.seed}{length}".lower()


def main(argv: Sequence[str]) -> int:
    """Return the exit status."""
    return run(study, argv, Settings)


def study(own: Settings) -> None:
    """Run the command.

    Raises:
        UserError: a run failed.
    """
    seeds = range(1, own.seeds + 1)
    runs = [Run(data, way, seed, own.epochs) for data in DATA for seed in seeds for way in WAYS]
    (Path(own.output) / "logs").mkdir(parents=True, exist_ok=True)
    pool, processes = ThreadPoolExecutor(own.jobs), []
    try:
        found = dict(zip(runs, pool.map(lambda run: train(run, own, processes), runs)))
    finally:  # after a failure or a signal, no run is started, and the others save and stop
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        pool.shutdown()
    text = "\n".join(
        [_heading([Path(own.output) / run.name for run in runs]), *(_section(data, found) for data in DATA)]
    )
    show(text)
    replace_text(Path(own.report), text)


def train(run: Run, own: Settings, processes: List[subprocess.Popen]) -> float:
    """Train unless the run is finished, and return its accuracy in percent. The process is added to `processes`.

    Raises:
        UserError: it failed.
    """
    log = Path(own.output) / "logs" / f"{run.name}.txt"
    flags = [*DATA[run.data], "--aa", POLICY, "--augment-on", run.way, "--seed", str(run.seed), "--device", "cpu"]
    flags += ["--output", own.output, "--experiment", run.name]
    flags += ["--epochs", str(own.epochs), "--warmup-epochs", "0"] if own.epochs else []
    flags += ["--data-dir", own.data_dir] if own.data_dir and run.data != "Digits" else []
    with open(log, "w") as file:
        command = [sys.executable, str(ROOT / "train.py"), *flags]
        processes.append(process := subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
        status = process.wait()
    if status:
        raise UserError(f"{log}: the run failed: {(log.read_text().strip().splitlines() or ['no message'])[-1]}")
    with open(Path(own.output) / run.name / "summary.csv", newline="") as file:
        accuracy = float(list(csv.DictReader(file))[-1]["eval_top1"])
    say(f"{run.name}: {accuracy:.2f} %")
    return accuracy


def _heading(folders: Sequence[Path]) -> str:
    origins: List[Dict[str, Any]] = [json.loads((folder / "run.json").read_text()) for folder in folders]
    made = dict.fromkeys(_made_with(origin) for origin in origins)  # several, if the study was interrupted
    return (
        f"# Accuracy with augmentation in workers and on the device\n\n`{' '.join(['python', *sys.argv])}`: top-1 accuracy in "
        f"percent after the last epoch, with RandAugment `{POLICY}`.\n" + "".join(f"{line}.\n" for line in made)
    )


def _made_with(origin: Dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return f"{origin['device']} ({origin['instruction_set']}), {versions}, commit {str(origin['commit'])[:12]}"


def _section(data: str, found: Dict[Run, float]) -> str:
    both: List[List[float]] = [
        [accuracy for run, accuracy in found.items() if (run.data, run.way) == (data, way)] for way in WAYS
    ]
    rows = [[str(seed), *(f"{value:.2f}" for value in pair)] for seed, pair in enumerate(zip(*both), 1)]
    rows.append(["mean", *(f"{mean(values):.2f} ± {stdev(values):.2f}" for values in both)])
    interval = ttest_rel(both[1], both[0]).confidence_interval(0.95)
    difference = (
        f"{mean(both[1]) - mean(both[0]):+.2f} points, 95 % interval {interval.low:+.2f} to {interval.high:+.2f}"
    )
    flags = " ".join(DATA[data])
    return (
        f"## {data}\n\n`train.py {flags} --aa {POLICY}`\n\n{table(('seed', *WAYS), rows, 'markdown')}\n"
        f"Mean ± standard deviation. Device minus worker, paired by seed: {difference}.\n"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
