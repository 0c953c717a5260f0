"""The native backend with other instruction sets than this CPU's: AVX2, NEON (emulated), and one that is not supported."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tnt_timm import cpu_info
from tnt_timm.ops import native_backend
from tnt_timm.ops.self_check import NAMES, Case, differences, errors, expected, make_inputs

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from compare import NATIVE_CASES  # noqa: E402

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
needs_avx2 = pytest.mark.skipif(
    not COMPILER or "avx2" not in (cpu_info.cpu_info("flags") or "").split(), reason="needs a C++ compiler and AVX2"
)


@needs_avx2
@pytest.mark.parametrize("case", [case for case in NATIVE_CASES if case.width in (12, 28, 40)], ids=lambda c: c.name)
def test_avx2_gives_the_references_output_and_gradients(case, as_new, monkeypatch):
    monkeypatch.setenv("TNT_MARCH", "x86-64-v3")
    assert max(errors(case, "native").values()) < 3e-6
    assert native_backend.library(case.width, case.heads, 4 * case.width).instruction_set == "AVX2"


@needs_avx2
@pytest.mark.parametrize("march, chosen", [("x86-64-v3", "native (AVX2)"), ("x86-64-v2", "reference (native does not")])
def test_the_log_names_the_instruction_set(march, chosen, as_new, monkeypatch):
    monkeypatch.setenv("TNT_MARCH", march)
    log = as_new("auto")
    assert f"inner transformer backend: {chosen}" in log
    assert ("needs AVX-512, AVX2 with FMA, or NEON" in log) == (march == "x86-64-v2")


@needs_avx2
@pytest.mark.skipif("avx512f" in (cpu_info.cpu_info("flags") or "").split(), reason="this CPU has AVX-512")
def test_an_instruction_set_that_the_cpu_does_not_have_is_not_used(as_new, monkeypatch):
    monkeypatch.setenv("TNT_MARCH", "x86-64-v4")
    assert "TNT_MARCH asks for AVX-512, which the CPU does not have" in as_new("auto")


@pytest.fixture(scope="module")
def neon(tmp_path_factory):
    """Return a function that runs the native backend for ARM under an emulator."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user")
    folder = tmp_path_factory.mktemp("neon")

    def call(case, inputs):
        C, F = case.width, 4 * case.width
        program = folder / f"driver_{C}_{case.heads}_{case.sentence_norm}"
        if not program.exists():
            flags = [flag for flag in native_backend.FLAGS if flag not in ("-shared", "-fPIC", "-fopenmp")]
            defines = [f"-DC={C}", f"-DH={case.heads}", f"-DF={F}", "-static"]
            defines += ["-DSENTENCE_NORM"] * case.sentence_norm
            source = str(HERE / "native_driver.cpp")
            subprocess.run([compiler, *flags, *defines, source, "-o", str(program)], check=True, timeout=300)
        arrays = [*inputs.parameters.values(), *inputs.scales]
        present = bytes(x is not None for x in arrays)
        floats = [x.float().numpy().tobytes() for x in (inputs.words, inputs.grad, *arrays) if x is not None]
        asked = np.int64(case.sentences).tobytes() + present + b"".join(floats)
        answer = subprocess.run([emulator, str(program)], input=asked, capture_output=True, check=True, timeout=300)
        numbers = torch.from_numpy(np.frombuffer(answer.stdout, np.float32).copy())
        size = inputs.words.numel()
        out, grad_words, sums = numbers.split([size, size, len(numbers) - 2 * size])
        found = dict(zip(NAMES, native_backend.gradients(sums, C, F, case.sentence_norm)))
        found |= {"out": out.view_as(inputs.words), "words": grad_words.view_as(inputs.words)}
        return {name: x for name, x in found.items() if inputs.parameters.get(name, x) is not None}

    return call


NEON_CASES = [Case(3, 16, 12, 2, biased=True, drop_path=True), Case(3, 16, 24, 4), Case(2, 16, 40, 4)]
NEON_CASES += [Case(3, 16, width, heads, drop_path=True, sentence_norm=True) for width, heads in ((5, 1), (8, 2))]


@pytest.mark.parametrize("case", NEON_CASES, ids=lambda c: c.name)
def test_neon_gives_the_references_output_and_gradients(neon, case):
    inputs = make_inputs(case)
    right = expected(case, inputs)
    found = neon(case, inputs)
    assert set(found) == set(right)
    assert max(differences(right, found).values()) < 3e-6
    wrong = make_inputs(case)
    wrong.words[0, 0, 0] += 1e-3  # the comparison detects a small change of one input
    assert max(differences(right, neon(case, wrong)).values()) > 3e-6
