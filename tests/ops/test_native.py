"""The CPU's operator: equal to the reference, the same for any number of threads, and never in the way."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import tnt_timm  # noqa: F401
from tnt_timm import ops
from tnt_timm.ops import native
from tnt_timm.ops.custom_op import inner_transformer
from tnt_timm.ops.self_check import Case, errors

sys.path.insert(0, str(Path(__file__).parent))
from compare import NATIVE_CASES
from twenty_steps import GOLDEN, error, losses

WHY_NOT = native.library(12, 2, 48).why_not
needs_native = pytest.mark.skipif(WHY_NOT is not None, reason=f"the native backend does not support {WHY_NOT}")


@needs_native
@pytest.mark.parametrize("case", NATIVE_CASES, ids=lambda case: case.name)
def test_output_and_gradients_equal_the_references(case):
    assert max(errors(case, "native").values()) < 3e-6


@needs_native
def test_unusual_mlp():
    assert max(errors(Case(5, 16, 12, 3, mlp_width=36), "native").values()) < 3e-6


def model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("tnt_ti", img_size=32, depth=2, embed_dim=48, num_classes=10, **kwargs)


def gradients(network, images):
    network(images).square().sum().backward()
    return {name: p.grad for name, p in network.named_parameters()}


@needs_native
def test_any_number_of_threads_gives_the_same_bits():
    before = torch.get_num_threads()
    words = torch.randn(45, 16, 12, requires_grad=True)
    block = model().blocks[0]
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = block.inner(words)
            found.append([out, *torch.autograd.grad(out.square().sum(), [words, *block.mlp_in.parameters()])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_twenty_training_steps_have_the_recorded_losses(backend):
    assert GOLDEN[-1] < 0.7 * GOLDEN[0]
    assert error(losses(backend)) < 1e-5


@needs_native
def test_a_compiled_step_computes_with_the_same_operator():
    torch._dynamo.reset()
    assert error(losses("native", compiled=True)) < 1e-5


@needs_native
def test_multiply_adds_are_counted(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    counts, trained = [], []
    for backend in ("native", "reference"):
        monkeypatch.setattr(ops, "_wanted", backend)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model().eval()(torch.randn(1, 3, 32, 32))
        counts.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            model()(torch.randn(1, 3, 32, 32)).sum().backward()
        trained.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    words = 4 * 16  # of the two inner layers, which the operator computes again
    assert trained[0] - trained[1] == 2 * 2 * words * (12 * 12 * 12 + 2 * 16 * 12)


@pytest.mark.parametrize(
    "why, change",
    [
        ("dropout inside", dict(proj_drop_rate=0.1)),
        ("supports only (16,) words per sentence", dict(first_stride=8)),
        ("widths of 10 and 40", dict(inner_dim=10)),
    ],
)
def test_what_it_cannot_do_the_reference_does_and_the_log_says_so(why, change, caplog, monkeypatch):
    monkeypatch.setattr(ops, "_said", set())
    images = torch.randn(2, 3, 32, 32)
    with caplog.at_level(logging.INFO, "tnt_timm.ops"):
        model(**change).train()(images).sum().backward()
    (said,) = (record.message for record in caplog.records if "inner" in record.message)
    assert why in said and "backend: reference" in said


def test_low_precision_is_the_references(caplog, monkeypatch):
    monkeypatch.setattr(ops, "_said", set())
    with caplog.at_level(logging.INFO, "tnt_timm.ops"), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model()(torch.randn(2, 3, 32, 32))
    assert "bfloat16" in caplog.text and "backend: reference" in caplog.text


@needs_native
def test_the_choice_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(ops, "_said", set())
    with caplog.at_level(logging.INFO, "tnt_timm.ops"):
        for _ in range(2):
            model()(torch.randn(2, 3, 32, 32))
    said = [record.message for record in caplog.records]
    assert sum(line.startswith("inner transformer backend: native (") for line in said) == 1 and len(said) == len(
        set(said)
    )


def test_an_impossible_call_is_refused():
    parameters = [x.detach() for x in model().blocks[0].parameters()][:12]
    with pytest.raises(ValueError, match="9 words per sentence"):
        inner_transformer(torch.randn(2, 9, 12), parameters, 2, 1e-5, None, None, torch.float32, "native")


def test_torch_func_gives_the_gradients_of_each_image():
    network, images = model().eval(), torch.randn(3, 3, 32, 32)
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(network, parameters, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        network.zero_grad()
        wanted = gradients(network, image[None])
        for name in parameters:
            assert (found[name][i] - wanted[name]).abs().max() <= 2e-5 * wanted[name].abs().max(), name


@pytest.mark.parametrize("compiler, why", [("/nowhere/g++", "No such file"), ("false", "compiler failed")])
def test_without_a_compiler_the_reference_computes(as_new, monkeypatch, tmp_path, compiler, why):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    logged = as_new("auto")
    assert why in logged and "backend: reference" in logged


@needs_native
def test_built_once_and_found_again(as_new, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "backend: native" in as_new("auto")
    (built,) = (tmp_path / "tnt_timm").iterdir()
    changed = built.stat().st_mtime_ns
    assert "backend: native" in as_new("auto")
    assert [built] == list((tmp_path / "tnt_timm").iterdir()) and built.stat().st_mtime_ns == changed


def test_the_environment_names_a_backend(as_new):
    assert "backend" not in as_new("reference")
    assert ops.backends_used() == ["inner transformer backend: reference (TNT_BACKEND)"]
    assert "reference (triton does not support words on cpu)" in as_new("triton")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TNT_BACKEND": "cuda"}
    wrong = subprocess.run([sys.executable, "-c", "import tnt_timm"], env=env, capture_output=True, text=True)
    assert wrong.returncode != 0
    assert wrong.stderr.splitlines()[-1].endswith("TNT_BACKEND=cuda: choose auto, reference, native or triton")


def test_ships_with_its_source():
    assert native.SOURCE.is_file()


def test_what_is_not_finite_stays_visible_and_in_its_sentence():
    block, words = model().blocks[0], torch.randn(4, 16, 12)
    clean = block.inner(words)
    words[1, 3, 5], words[2, 0, 0] = float("nan"), float("inf")
    out = block.inner(words)
    assert torch.isnan(out[1]).any() and not torch.isfinite(out[2]).all()
    assert torch.equal(out[[0, 3]], clean[[0, 3]])
