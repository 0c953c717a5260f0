#!/usr/bin/env python3
"""The paper in miniature: test its claims on Fashion-MNIST, with `python benchmarks/miniature`.

Trains small TNTs and DeiTs, several side by side, and writes a page with tables and pictures. Run the same command again to
resume: finished runs are skipped. The data is torchvision's download (--data-dir DIR --dataset-download) or Debian's package
dataset-fashion-mnist. Needs `pip install '.[miniature]'`.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NoReturn, Sequence

import page
import pictures
import plan
import small_mnist
from features import measure_features
from jobs import Study
from page import Cost, Page
from plan import Plan, Size
from records import Folders

from tnt_timm import ops
from tnt_timm.checkpoints.model_from_settings import create_model
from tnt_timm.commands.entry_point import run
from tnt_timm.console import say
from tnt_timm.costs.complexity import count
from tnt_timm.data.datasets import open_dataset
from tnt_timm.data.workers import usable_cores
from tnt_timm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = Path("output/miniature")
PAIR = ("tnt", "deit")  # whose features are measured and drawn
JOBS_PER_GPU = 6
NUM_CLASSES = 10  # of all three datasets


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}")


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def minutes(text: str) -> float:
    if not float(text) >= 0:  # nan neither
        raise ValueError
    return float(text)


def page_file(text: str) -> Path:
    if not text.endswith(".md"):
        raise ValueError
    return Path(text)


def parser() -> Parser:
    found = Parser("miniature", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add(
        "--minutes",
        type=minutes,
        default=float("inf"),
        help="stop after this time; the same command resumes; 0 only writes the page",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda trains in bfloat16")
    add("--jobs", type=positive, help=f"runs at a time (default: one per core, on a GPU at most {JOBS_PER_GPU})")
    add("--images", type=positive, default=12_000, help="training images")
    add("--held-out", type=positive, default=4_000, help="images that choose learning rates and epochs")
    add("--epochs", type=positive, default=6, help="epochs of a run")
    add("--seeds", type=positive, default=3, help="runs of each network")
    add("--data-dir", type=Path, help="folder of Fashion-MNIST (default: of Debian's package)")
    add("--dataset-download", action="store_true", help="let torchvision download Fashion-MNIST")
    add("--output", type=Path, default=OUTPUT, help="folder of the runs")
    elsewhere = "with another --output, in it"
    add(
        "--report",
        type=page_file,
        help=f"page, .md; its CSVs beside it (default: benchmarks/miniature.md; {elsewhere})",
    )
    add("--pictures", type=Path, help=f"folder of the pictures (default: docs/figures; {elsewhere})")
    return found


def main(argv: Sequence[str]) -> int:
    """Return the exit status."""
    return run(study, argv)


def study(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        UserError: a run failed, or finished runs have other settings. The page holds the finished runs.
    """
    options = parser().parse_args(argv)
    until = time.monotonic() + 60 * options.minutes
    output = options.output
    is_default = output == OUTPUT
    report = options.report or (ROOT / "benchmarks" if is_default else output) / "miniature.md"
    drawings = options.pictures or (ROOT / "docs" / "figures" if is_default else output)
    size = Size(options.images, options.held_out, options.epochs, options.seeds)
    check_data(size, options)
    runs = list(Plan(size, output, data_flags(options)).runs())
    costs = costs_of([*plan.NETWORKS, *plan.TRANSFER])
    work = {run.name: run.images * run.epochs * costs[run.network.name].multiply_adds for run in runs}
    folders = Folders(output)
    made = Study(runs, work, folders, options.device, device_flags(options.device))
    small_mnist.write(output / "mnist")

    def write_page(features: Sequence[Dict[str, Any]] = ()) -> Path:
        return page.write(report, Page(made.wanted(), made.records, costs, size, features), drawings)

    write_page()  # a page that cannot be written should not be noticed after hours
    try:
        if options.minutes:
            made.make(options.jobs or default_jobs(options.device), until)
    finally:
        write_page()
    trained = [plan.final_name(name, seed) for seed in range(1, size.seeds + 1) for name in PAIR]
    trained = [folders.run(name) for name in trained if name in made.records]
    if trained:
        sizes = write_page(measure_features(trained, str(options.data_dir or "")))
        pictures.draw(trained[:2], sizes, drawings, place_of_data(options))
    done, wanted = len(made.records), len(made.wanted())
    say(f"{report}: {done} of {wanted} runs" + (", run the same command to go on" if done < wanted else ""))


def check_data(size: Size, options: argparse.Namespace) -> None:
    """Open Fashion-MNIST, or download it if asked, before any run does.

    Raises:
        UserError: it is missing, or too small for the study.
    """
    place = str(options.data_dir or "")
    images = open_dataset("torch/fashion_mnist", place, "train", True, download=options.dataset_download)
    if size.images + size.held_out > len(images):
        raise ConfigError(
            f"command line: images: {size.images:,} and {size.held_out:,} held-out ones are more than the {len(images):,} "
            f"training images of {images.label}"
        )


def data_flags(options: argparse.Namespace) -> List[str]:
    """Return where Fashion-MNIST is, for train.py."""
    return [*place_of_data(options), *(["--dataset-download"] if options.dataset_download else [])]


def place_of_data(options: argparse.Namespace) -> List[str]:
    return ["--data-dir", str(options.data_dir)] if options.data_dir else []


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
