"""Losses of 20 training steps with stochastic depth, by any backend. golden_losses.json has those of the reference in float64.

python tests/ops/twenty_steps.py BACKEND STEPS DTYPE [DTYPE ...]     (JSON by dtype; TRITON_INTERPRET=1 for triton on CPU)
"""

import json
import sys
from pathlib import Path
from typing import List
from unittest import mock

import timm
import torch
from timm.layers import DropPath

import tnt_timm  # noqa: F401
from tnt_timm.ops import dispatch


class DropPathFromCpu(DropPath):
    """Stochastic depth that draws on the CPU, so that the losses are the same on every device."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.drop_prob > 0.0):
            return x
        keep = 1 - self.drop_prob
        kept = torch.empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)
        return x * (kept / keep).to(x)


GOLDEN = json.loads(Path(__file__).with_name("golden_losses.json").read_text())["float64"]
STEPS = 20


def losses(
    backend: str, dtype: torch.dtype = torch.float32, compiled: bool = False, device: str = "cpu", steps: int = STEPS
) -> List[float]:
    """Train with `dtype`: that of the network, or of autocast if it is a 16-bit one."""
    with mock.patch.object(dispatch, "wanted", backend):
        return _losses(dtype, compiled, device, steps)


def error(found: List[float]) -> float:
    """Return the largest relative difference from the golden losses, of the first steps or of all."""
    assert 0 < len(found) <= len(GOLDEN)
    return max(abs(a / b - 1) for a, b in zip(found, GOLDEN))


def _losses(dtype: torch.dtype, compiled: bool, device: str, steps: int) -> List[float]:
    mixed = dtype in (torch.bfloat16, torch.float16)
    torch.manual_seed(0)
    network = timm.create_model("tnt_ti", img_size=32, depth=1, embed_dim=48, num_classes=4, drop_path_rate=0.2)
    for block in network.blocks:
        block.drop_path = DropPathFromCpu(block.drop_path.drop_prob)
    network = network.to(device, torch.float32 if mixed else dtype).train()
    call = torch.compile(network, backend="aot_eager", fullgraph=True) if compiled else network
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images, targets = images.to(device, next(network.parameters()).dtype), torch.arange(4, device=device)
    found = []
    for _ in range(steps):
        with torch.autocast(device, dtype if mixed else torch.bfloat16, enabled=mixed):
            logits = call(images)
        loss = torch.nn.functional.cross_entropy(logits.to(images.dtype), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


if __name__ == "__main__":
    backend, steps, *dtypes = sys.argv[1:]
    json.dump({dtype: losses(backend, getattr(torch, dtype), steps=int(steps)) for dtype in dtypes}, sys.stdout)
