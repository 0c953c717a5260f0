"""Small networks and images for the tests of this folder."""

import timm
import torch
from torch import nn

import tnt_timm  # noqa: F401  (registers the models)

SMALL = dict(img_size=64, num_classes=10, embed_dim=24, inner_dim=6, depth=2, num_heads_inner=2, num_heads_outer=3)
SMALL_PYRAMID = dict(
    img_size=64, num_classes=10, embed_dim=16, inner_dim=4, depths=(1, 2, 1, 1), num_heads_inner=1, num_heads_outer=2
)


def small(name: str = "tnt_ti", **kwargs) -> nn.Module:
    """Return a network that computes in milliseconds; the same bits each time."""
    torch.manual_seed(0)
    return timm.create_model(name, **{**(SMALL_PYRAMID if "pyramid" in name else SMALL), **kwargs})


def some_images(size=64, batch: int = 2, chans: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, chans, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(model, images: torch.Tensor):
    with torch.no_grad():
        return model(images)


def without_gradient(model: nn.Module) -> list:
    """Return the names of the parameters whose gradient is missing, zero or not finite."""
    return [n for n, p in model.named_parameters() if p.grad is None or not 0 < p.grad.abs().sum() < float("inf")]
