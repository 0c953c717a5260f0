"""Count parameters and multiply-adds of models, and compare them with published values."""

import csv
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tnt_timm  # noqa: F401  (registers the models)
from tnt_timm.errors import UserError, one_line

PUBLISHED = Path(__file__).with_name("published.csv")
HEADER = "model timm_name image_size params_m published_params_m gmacs published_gmacs differs source".split()


class Published(NamedTuple):
    """A row of a paper's table. Values that the paper does not give are None."""

    model: str
    timm_name: str  # empty if timm has no such model
    image_size: int
    params_m: Optional[float]
    gmacs: Optional[float]
    top1: Optional[float]
    top5: Optional[float]
    source: str


class Cost(NamedTuple):
    """The counted cost of a model, and its published cost, if any."""

    model: str
    timm_name: str
    image_size: int
    params_m: float
    gmacs: float
    published: Optional[Published]


def published() -> List[Published]:
    """Return the rows of published.csv."""
    numbers = ("params_m", "gmacs", "top1", "top5")
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        return [
            Published(
                **row
                | {"image_size": int(row["image_size"])}
                | {key: float(row[key]) if row[key] else None for key in numbers}
            )
            for row in csv.DictReader(file)
        ]


def count(model: nn.Module, input_size: Tuple[int, int, int]) -> Tuple[int, int]:
    """Return the number of trainable parameters and of multiply-adds for one image.

    As in the papers, matrix products and convolutions count; norms, activations and additions do not. On the "meta" device,
    nothing is computed and no memory is allocated. The model is left in evaluation mode.

    Args:
        model: on any device.
        input_size: channels, height and width of the image.
    """
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, *input_size, device=device))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return parameters, counter.get_total_flops() // 2


def create_for_size(
    timm_name: str, image_size: Optional[int] = None, device: str = "cpu"
) -> Tuple[nn.Module, Tuple[int, int, int]]:
    """Create a model for square images of this size in pixels (default: its own); return it and its input size."""
    model = timm.create_model(timm_name, device=device)
    channels, *default_size = model.pretrained_cfg["input_size"]
    if image_size is None:
        return model, (channels, *default_size)
    if image_size != default_size[-1] and model.pretrained_cfg.get("fixed_input_size"):
        model = timm.create_model(timm_name, device=device, img_size=image_size)
    return model, (channels, image_size, image_size)


def cost(timm_name: str, image_size: Optional[int] = None, row: Optional[Published] = None) -> Cost:
    """Count a model that timm can create; `row` is its published cost.

    Raises:
        UserError: timm cannot create the model, or the model does not take images of this size.
    """
    try:
        model, input_size = create_for_size(timm_name, image_size, "meta")
        parameters, multiply_adds = count(model, input_size)
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError, OSError) as error:
        raise UserError(f"{timm_name}: cannot be counted: {one_line(error)}") from None
    return Cost(row.model if row else timm_name, timm_name, input_size[-1], parameters / 1e6, multiply_adds / 1e9, row)


def published_costs() -> List[Cost]:
    """Count every published model that timm has, at the published image size."""
    return [cost(row.timm_name, row.image_size, row) for row in published() if row.timm_name]


def rows(costs: Sequence[Cost]) -> List[List[str]]:
    """Return the cells of a table below HEADER.

    The column `differs` names the counts that differ from the published values after rounding to one decimal, as the papers do.
    """
    found = []
    for model, timm_name, size, params_m, gmacs, known in costs:
        cells: List[Any] = [model, timm_name, size]
        differs = []
        for name, counted, value in (
            ("params", params_m, known and known.params_m),
            ("gmacs", gmacs, known and known.gmacs),
        ):
            cells += [f"{counted:.2f}", "" if value is None else f"{value:.1f}"]
            if value is not None and round(counted, 1) != value:
                differs.append(name)
        found.append([*map(str, cells), " ".join(differs), known.source if known else ""])
    return found
