"""Backends as in a new process: the native one, and the CUDA kernels under Triton's interpreter."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pytest
import timm
import torch

import tnt_timm  # noqa: F401  (registers the models)
from tnt_timm.ops import dispatch, native


@pytest.fixture
def as_new(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], str]]:
    """as_new(TNT_BACKEND) -> the log of a network in a new process, with the test's environment variables."""

    def network(backend: str) -> str:
        native.library.cache_clear()
        caplog.clear()
        monkeypatch.setattr(dispatch, "_logged", set())
        monkeypatch.setattr(dispatch, "wanted", backend)
        model = timm.create_model("tnt_ti", img_size=32, depth=1).eval()
        with caplog.at_level(logging.INFO, "tnt_timm.ops"), torch.no_grad():
            assert model(torch.ones(1, 3, 32, 32)).shape == (1, 1000)
        return caplog.text

    native.library.cache_clear()
    yield network
    native.library.cache_clear()


@pytest.fixture(scope="session")
def interpreted() -> Callable[..., Any]:
    """interpreted(script, *arguments) -> the JSON that a script of this folder prints under Triton's interpreter.

    It runs in a new process, because the interpreter is chosen before Triton is imported.
    """
    triton = pytest.importorskip("triton")

    def run(script: str, *arguments: str) -> Any:
        env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        if "only 0-dimensional arrays can be converted to Python scalars" in done.stdout + done.stderr:
            pytest.skip(f"Triton {triton.__version__}'s interpreter does not work with NumPy {np.__version__}")
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return run
