"""Tiny networks, the script of figures in this process, and a picture that can be read back."""

import functools

import pytest
import timm
import torch

import tnt_timm  # noqa: F401  (registers the models)
from tnt_timm.commands.train import main

SHORT = "-b 90 --epochs 2 --warmup-epochs 0 --cooldown-epochs 0 --workers 0 --crop-pct 1.0".split()


@pytest.fixture
def run_figures(run_script):
    return functools.partial(run_script, "figures")


@pytest.fixture(scope="session")
def digits_run(tiny, tmp_path_factory):
    """The folder of a short run on the digits."""
    output = tmp_path_factory.mktemp("output")
    assert main(["--dataset", "digits", *tiny, *SHORT, "--output", str(output), "--experiment", "run"]) == 0
    return output / "run"


@pytest.fixture
def tnt():
    torch.manual_seed(0)
    model = timm.create_model(
        "tnt_s", img_size=(48, 32), depth=3, embed_dim=24, inner_dim=8, num_heads_inner=2, num_heads_outer=3
    )
    for parameter in model.parameters():  # the fresh ones are so small that all attention would be even
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture
def image():
    return torch.randn(1, 3, 48, 32, generator=torch.Generator().manual_seed(1))
