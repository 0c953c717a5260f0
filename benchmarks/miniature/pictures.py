"""Draw the study's pictures with `scripts/figures.py`, from its first trained pair and its table of sizes."""

from pathlib import Path
from typing import Dict, List, Sequence

from records import Folders

from tnt_timm.commands import figures

PAIR = ("tnt-seed1", "deit-seed1")
IMAGE = ["--image", "torch/fashion_mnist/0"]


def draw(folders: Folders, sizes: Path, pictures: Path, data_dir: Sequence[str] = ()) -> None:
    """Draw the pictures whose runs are finished.

    Args:
        folders: of the study.
        sizes: table of the networks' accuracy and cost.
        pictures: folder to write to.
        data_dir: flag that says where Fashion-MNIST is.

    Raises:
        UserError: a picture cannot be drawn.
    """
    wanted: Dict[str, List[str]] = {}
    if sizes.exists():
        wanted["miniature-cost"] = ["accuracy-cost", str(sizes), "--no-published", "--costs", "gmacs", "params_m"]
    if all(folders.record(name).exists() for name in PAIR):
        pair = [str(folders.run(name)) for name in PAIR]
        wanted["diversity"] = [
            "diversity",
            *pair,
            *data_dir,
            *(["--dataset", "torch/fashion_mnist"] if data_dir else []),
        ]
        wanted["feature-maps"] = ["feature-maps", *pair, *IMAGE, *data_dir, "--img-size", "256"]
        wanted["tsne-maps"] = ["tsne-maps", *pair, *IMAGE, *data_dir, "--img-size", "256"]
    for name, command in wanted.items():
        figures.figures([*command, "--dpi", "110", "--output", str(pictures / f"{name}.png")])
