"""What a model costs: its parameters and multiply-adds, counted, and beside the published ones of TNT's tables."""

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


class Published(NamedTuple):
    """A row of a paper's table; None where the paper does not say."""

    model: str
    timm_name: str  # empty where timm has no such model
    image_size: int
    params_m: Optional[float]
    gmacs: Optional[float]
    top1: Optional[float]
    top5: Optional[float]
    source: str


class Cost(NamedTuple):
    """What was counted for a model, beside what was published (None where nothing was)."""

    model: str
    timm_name: str
    image_size: int
    params_m: float
    gmacs: float
    published: Optional[Published]

    @property
    def params_differ(self) -> bool:
        return self.published is not None and _differ(self.params_m, self.published.params_m)

    @property
    def gmacs_differ(self) -> bool:
        return self.published is not None and _differ(self.gmacs, self.published.gmacs)


def _differ(counted: float, published: Optional[float]) -> bool:
    """Whether a count, rounded as the papers round, is another number."""
    return published is not None and round(counted, 1) != published


def published() -> List[Published]:
    """The rows of published.csv."""
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def number(text: str) -> Optional[float]:
        return float(text) if text else None

    return [
        Published(
            **{
                **row,
                "image_size": int(row["image_size"]),
                **{key: number(row[key]) for key in ("params_m", "gmacs", "top1", "top5")},
            }
        )
        for row in rows
    ]


def count(model: nn.Module, input_size: Tuple[int, int, int]) -> Tuple[int, int]:
    """Trainable parameters, and multiply-adds of one image.

    Products of matrices and convolutions count, as in the papers; norms, activations and sums do not. On the device
    "meta" nothing is computed, and no memory is taken.

    Args:
        model: on any device; it is put in evaluation mode.
        input_size: channels, height and width of the image.
    """
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, *input_size, device=device))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return parameters, counter.get_total_flops() // 2


def cost(timm_name: str, image_size: Optional[int] = None, row: Optional[Published] = None, **kwargs: Any) -> Cost:
    """Count one of timm's models.

    Args:
        timm_name: of the model.
        image_size: edge of the square image in pixels (default: the model's own).
        row: what was published of it.
        **kwargs: for `timm.create_model`.

    Raises:
        UserError: no such model, or one that does not take such images.
    """
    try:
        model = timm.create_model(timm_name, device="meta", **kwargs)
        own = model.pretrained_cfg["input_size"]
        if image_size is not None and image_size != own[-1] and model.pretrained_cfg.get("fixed_input_size"):
            model = timm.create_model(timm_name, device="meta", img_size=image_size, **kwargs)
        size = image_size or own[-1]
        parameters, multiply_adds = count(model, (own[0], size, size))
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError, OSError) as error:
        raise UserError(f"{timm_name}: cannot be counted: {one_line(error)}") from None
    return Cost(row.model if row else timm_name, timm_name, size, parameters / 1e6, multiply_adds / 1e9, row)


def published_costs() -> List[Cost]:
    """Each published model that timm has, counted at the published image size."""
    return [cost(row.timm_name, row.image_size, row) for row in published() if row.timm_name]


# ---------------------------------------------------------------------------------------------------------- as a table

HEADER = "model timm_name image_size params_m published_params_m gmacs published_gmacs differs source".split()


def rows(costs: Sequence[Cost]) -> List[List[str]]:
    """The cells of a table under HEADER; `differs` names what was counted otherwise than published."""

    def text(value: Optional[float]) -> str:
        return "" if value is None else f"{value:.1f}"

    return [
        [
            c.model,
            c.timm_name,
            str(c.image_size),
            f"{c.params_m:.2f}",
            text(c.published and c.published.params_m),
            f"{c.gmacs:.2f}",
            text(c.published and c.published.gmacs),
            " ".join(["params"] * c.params_differ + ["gmacs"] * c.gmacs_differ),
            c.published.source if c.published else "",
        ]
        for c in costs
    ]
