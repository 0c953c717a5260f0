"""The native backend on other instruction sets than this machine's: AVX2, NEON (emulated), and none that it supports."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tnt_timm import machine
from tnt_timm.ops import native

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from compare import NAMES, NATIVE_CASES, Case, differences, make_inputs, wanted  # noqa: E402

ON_X86 = "avx2" in (machine.cpu_info("flags") or "").split()


def run(*command, **env):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TNT_BACKEND": "auto", **env}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(not ON_X86, reason="this processor has no AVX2")
def test_avx2_gives_the_references_output_and_gradients():
    done = run(str(HERE / "compare.py"), "native", "12", "28", "40", TNT_MARCH="x86-64-v3")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert set(found) == {case.name for case in NATIVE_CASES if case.width in (12, 28, 40)}
    assert max(max(errors.values()) for errors in found.values()) < 3e-6


LOG = """
import logging, torch, timm, tnt_timm
logging.basicConfig(level=logging.INFO, format="%(message)s")
timm.create_model("tnt_ti", img_size=32, depth=1).eval()(torch.ones(1, 3, 32, 32))
"""


@pytest.mark.skipif(not ON_X86, reason="this processor has no AVX2")
@pytest.mark.parametrize("march, said", [("x86-64-v3", "native (AVX2)"), ("x86-64-v2", "reference (native does not")])
def test_the_log_names_the_instruction_set(march, said):
    done = run("-c", LOG, TNT_MARCH=march)
    assert done.returncode == 0 and f"inner transformer backend: {said}" in done.stderr
    assert ("needs AVX-512, AVX2 with FMA, or NEON" in done.stderr) == (march == "x86-64-v2")


@pytest.fixture(scope="module")
def neon(tmp_path_factory):
    """Builds the driver for ARM; returns a function that runs it under an emulator."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user")
    folder = tmp_path_factory.mktemp("neon")

    def call(case, inputs):
        C, F = case.width, 4 * case.width
        program = folder / f"driver_{C}_{case.heads}"
        if not program.exists():
            flags = [flag for flag in native.FLAGS if not flag.startswith(("-march", "-shared", "-fPIC", "-fopenmp"))]
            defines = [f"-DC={C}", f"-DH={case.heads}", f"-DF={F}", "-static"]
            source = str(HERE / "native_driver.cpp")
            subprocess.run([compiler, *flags, *defines, source, "-o", str(program)], check=True, timeout=300)
        arrays = [*inputs.parameters.values(), *inputs.scales]
        present = bytes(x is not None for x in arrays)
        floats = [x.float().numpy().tobytes() for x in (inputs.words, inputs.grad, *arrays) if x is not None]
        asked = np.int64(case.sentences).tobytes() + present + b"".join(floats)
        answer = subprocess.run([emulator, str(program)], input=asked, capture_output=True, check=True, timeout=300)
        width = int(np.frombuffer(answer.stdout, np.int64, 1)[0])
        numbers = torch.from_numpy(np.frombuffer(answer.stdout, np.float32, offset=8).copy())
        size = inputs.words.numel()
        out, grad_words, sums = numbers.split([size, size, len(numbers) - 2 * size])
        found = dict(zip(NAMES, native.gradients(sums, C, F, width)))
        found |= {"out": out.view_as(inputs.words), "words": grad_words.view_as(inputs.words)}
        return {name: x for name, x in found.items() if inputs.parameters.get(name, x) is not None}

    return call


@pytest.mark.parametrize(
    "case",
    [Case(3, 16, 12, 2, biased=True, drop_path=True), Case(3, 16, 24, 4), Case(2, 16, 40, 4)],
    ids=lambda c: c.name,
)
def test_neon_gives_the_references_output_and_gradients(neon, case):
    inputs = make_inputs(case)
    right = wanted(case, inputs)
    found = neon(case, inputs)
    assert set(found) == set(right)
    assert max(differences(right, found).values()) < 3e-6
    wrong = make_inputs(case)
    wrong.words[0, 0, 0] += 1e-3  # the comparison sees a small change of one input
    assert max(differences(right, neon(case, wrong)).values()) > 3e-6
