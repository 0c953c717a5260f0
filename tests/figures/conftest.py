"""Tiny networks, the command in this process, and the shared style of figures."""

import functools

import pytest
import timm
import torch

import tnt_timm  # noqa: F401  (registers the models)
from tnt_timm.checkpoints.open_model import Opened
from tnt_timm.commands.train import main
from tnt_timm.figures import picture
from tnt_timm.figures.network import Network

SHORT = "-b 90 --epochs 2 --warmup-epochs 0 --cooldown-epochs 0 --workers 0 --crop-pct 1.0".split()


@pytest.fixture(autouse=True)
def style():
    with picture.style():
        yield


@pytest.fixture(scope="session")
def named():
    """named(model, name) -> Network"""
    return lambda model, name="t": Network(name, Opened(model, name))


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
def tnt(named):
    torch.manual_seed(0)
    model = timm.create_model(
        "tnt_s", img_size=(48, 32), depth=3, embed_dim=24, inner_dim=8, num_heads_inner=2, num_heads_outer=3
    )
    for parameter in model.parameters():  # the fresh ones are so small that attention would be uniform
        torch.nn.init.normal_(parameter, std=0.5)
    return named(model.eval())


@pytest.fixture
def image():
    return torch.randn(1, 3, 48, 32, generator=torch.Generator().manual_seed(1))
