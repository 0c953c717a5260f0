#!/usr/bin/env python3
"""The paper in miniature: test its claims on Fashion-MNIST, with `python benchmarks/miniature`.

The data is torchvision's download (--data-dir DIR --dataset-download) or Debian's package
dataset-fashion-mnist. Needs `pip install '.[miniature]'`.
"""

import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Dict, List, Literal, Optional, Sequence

import page
import pictures
import plan
import small_mnist
from features import measure_features
from jobs import Study
from page import Cost, Page
from plan import Plan, Size
from pydantic import AfterValidator
from pydantic.types import NonNegativeFloat, PositiveInt
from records import Folders

from tnt_timm import ops
from tnt_timm.checkpoints.model_from_settings import create_model
from tnt_timm.commands.entry_point import run
from tnt_timm.console import say
from tnt_timm.costs.complexity import count
from tnt_timm.data.datasets import open_dataset
from tnt_timm.data.workers import usable_cores
from tnt_timm.errors import ConfigError
from tnt_timm.settings.command_line import setting
from tnt_timm.settings.paths import PathText
from tnt_timm.settings.schema import Group

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = "output/miniature"
REPORT = ROOT / "benchmarks" / "miniature.md"
PAIR = ("tnt", "deit")  # whose features are measured and drawn
JOBS_PER_GPU = 6
NUM_CLASSES = 10  # of all three datasets


def _is_markdown(path: str) -> str:
    if path and not path.endswith(".md"):
        raise ValueError(f"{path}: expected a name that ends with .md; the CSV files are written beside it")
    return path


class Settings(Group):
    """Test the paper's claims on Fashion-MNIST: train small TNTs and DeiTs, several side by side, and write a page with tables
    and pictures. Run the same command again to resume; finished runs are skipped."""

    minutes: Optional[NonNegativeFloat] = setting(
        None, "stop after this time; 0 only writes the page (default: no limit)"
    )
    device: Literal["cpu", "cuda"] = setting("cpu", "cuda trains in bfloat16")
    jobs: Optional[PositiveInt] = setting(
        None, f"runs at a time (default: one per core, on a GPU at most {JOBS_PER_GPU})"
    )
    images: PositiveInt = setting(12_000, "training images")
    held_out: PositiveInt = setting(4_000, "images that choose learning rates and epochs")
    epochs: PositiveInt = setting(6, "epochs of a run")
    seeds: PositiveInt = setting(3, "runs of each network")
    data_dir: PathText = setting("", "folder of Fashion-MNIST (default: of Debian's package)")
    dataset_download: bool = setting(False, "let torchvision download Fashion-MNIST")
    output: PathText = setting(OUTPUT, "folder of the runs", min_length=1)
    report: Annotated[PathText, AfterValidator(_is_markdown)] = setting(
        "", "page (default: benchmarks/miniature.md; with another --output, in it)"
    )
    pictures: PathText = setting("", "folder of the pictures (default: docs/figures; with another --output, in it)")


def main(argv: Sequence[str]) -> int:
    """Return the exit status."""
    return run(study, argv, Settings)


def study(own: Settings) -> None:
    """Run the command.

    Raises:
        UserError: a run failed, or finished runs have other settings. The page holds the finished runs.
    """
    until = math.inf if own.minutes is None else time.monotonic() + 60 * own.minutes
    output, is_default = Path(own.output), own.output == OUTPUT
    report = Path(own.report or (REPORT if is_default else output / REPORT.name))
    drawings = Path(own.pictures or (ROOT / "docs" / "figures" if is_default else output))
    size = Size(own.images, own.held_out, own.epochs, own.seeds)
    check_data(size, own)
    runs = list(Plan(size, output, data_flags(own)).runs())
    costs = costs_of([*plan.NETWORKS, *plan.TRANSFER])
    work = {run.name: run.images * run.epochs * costs[run.network.name].multiply_adds for run in runs}
    folders = Folders(output)
    made = Study(runs, work, folders, own.device, device_flags(own.device))
    small_mnist.write(output / "mnist")

    def write_page(features: Sequence[Dict[str, Any]] = ()) -> Path:
        return page.write(report, Page(made.wanted(), made.records, costs, size, features), drawings)

    write_page()  # a page that cannot be written should not be noticed after hours
    try:
        if own.minutes != 0:
            made.make(own.jobs or default_jobs(own.device), until)
    finally:
        write_page()
    trained = [plan.final_name(name, seed) for seed in range(1, size.seeds + 1) for name in PAIR]
    trained = [folders.run(name) for name in trained if name in made.records]
    if trained:
        sizes = write_page(measure_features(trained, own.data_dir))
        pictures.draw(trained[:2], sizes, drawings, place_of_data(own))
    done, wanted = len(made.records), len(made.wanted())
    say(f"{report}: {done} of {wanted} runs" + (", run the same command to go on" if done < wanted else ""))


def check_data(size: Size, own: Settings) -> None:
    """Open Fashion-MNIST, or download it if asked, before any run does.

    Raises:
        UserError: it is missing, or too small for the study.
    """
    images = open_dataset("torch/fashion_mnist", own.data_dir, "train", True, download=own.dataset_download)
    if size.images + size.held_out > len(images):
        raise ConfigError(
            f"command line: images: {size.images:,} and {size.held_out:,} held-out ones are more than the {len(images):,} "
            f"training images of {images.label}"
        )


def data_flags(own: Settings) -> List[str]:
    """Return where Fashion-MNIST is, for train.py."""
    return [*place_of_data(own), *(["--dataset-download"] if own.dataset_download else [])]


def place_of_data(own: Settings) -> List[str]:
    return ["--data-dir", own.data_dir] if own.data_dir else []


def device_flags(device: str) -> List[str]:
    on_gpu = ["--amp", "--amp-dtype", "bfloat16", "--workers", "2"]
    return ["--device", device, *(on_gpu if device == "cuda" else ())]


def default_jobs(device: str) -> int:
    return min(JOBS_PER_GPU, len(usable_cores())) if device == "cuda" else len(usable_cores())


def costs_of(networks: Sequence[plan.Network]) -> Dict[str, Cost]:
    """Return the parameters and multiply-adds of networks, by name."""
    found = {}
    for network in networks:
        settings = plan.settings(network)
        size = settings.network.img_size
        with ops.silent():
            model, _ = create_model(settings, NUM_CLASSES, continuing=True)
            found[network.name] = Cost(*count(model, (3, size, size)))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
