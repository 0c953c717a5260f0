"""Losses of 20 training steps with stochastic depth, by any backend; golden_losses.json has the reference's in float64.

python tests/ops/twenty_steps.py BACKEND DTYPE [DTYPE ...]     (JSON by dtype; TRITON_INTERPRET=1 for triton on CPU)
"""

import json
import sys
from pathlib import Path
from typing import List

import timm
import torch

import tnt_timm  # noqa: F401
from tnt_timm import ops

GOLDEN = json.loads(Path(__file__).with_name("golden_losses.json").read_text())["float64"]
STEPS = 20


def losses(backend: str, dtype: torch.dtype = torch.float32, compiled: bool = False) -> List[float]:
    """`dtype` is the network's, or, where it is one of mixed precision, autocast's."""
    before, ops._wanted = ops._wanted, backend
    try:
        return _losses(dtype, compiled)
    finally:
        ops._wanted = before


def error(found: List[float]) -> float:
    """The largest relative difference from the golden losses."""
    assert len(found) == len(GOLDEN)
    return max(abs(a / b - 1) for a, b in zip(found, GOLDEN))


def _losses(dtype: torch.dtype, compiled: bool) -> List[float]:
    mixed = dtype in (torch.bfloat16, torch.float16)
    torch.manual_seed(0)
    network = timm.create_model("tnt_ti", img_size=32, depth=1, embed_dim=48, num_classes=4, drop_path_rate=0.2)
    network = network.to(torch.float32 if mixed else dtype).train()
    call = torch.compile(network, backend="aot_eager", fullgraph=True) if compiled else network
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images, targets = images.to(next(network.parameters()).dtype), torch.arange(4)
    found = []
    for _ in range(STEPS):
        with torch.autocast("cpu", dtype if mixed else torch.bfloat16, enabled=mixed):
            logits = call(images)
        loss = torch.nn.functional.cross_entropy(logits.to(images.dtype), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


if __name__ == "__main__":
    json.dump({dtype: losses(sys.argv[1], getattr(torch, dtype)) for dtype in sys.argv[2:]}, sys.stdout)
