"""The native backend as in a process of its own."""

import logging
from typing import Callable, Iterator

import pytest
import timm
import torch

import tnt_timm  # noqa: F401  (registers the models)
from tnt_timm import ops
from tnt_timm.ops import native


@pytest.fixture
def as_new(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], str]]:
    """as_new(TNT_BACKEND) -> what a network logs that has this backend, and nothing compiled or logged before.

    What a test asks of the native backend is compiled, or looked for, under the test's own environment variables.
    """
    native.library.cache_clear()

    def network(backend: str) -> str:
        native.library.cache_clear()
        caplog.clear()
        monkeypatch.setattr(ops, "_said", set())
        monkeypatch.setattr(ops, "_wanted", backend)
        model = timm.create_model("tnt_ti", img_size=32, depth=1).eval()
        with caplog.at_level(logging.INFO, "tnt_timm.ops"), torch.no_grad():
            assert model(torch.ones(1, 3, 32, 32)).shape == (1, 1000)
        return caplog.text

    yield network
    native.library.cache_clear()
