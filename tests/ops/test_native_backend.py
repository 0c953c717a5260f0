"""The native backend: equal to the reference, independent of the number of threads, and compatible with the rest of PyTorch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import tnt_timm  # noqa: F401
from tnt_timm import ops
from tnt_timm.ops import choose_backend, native_backend
from tnt_timm.ops.custom_op import inner_transformer
from tnt_timm.ops.self_check import Case, errors

sys.path.insert(0, str(Path(__file__).parent))
from compare import NATIVE_CASES
from twenty_steps import GOLDEN, error, losses

UNSUPPORTED = native_backend.library(12, 2, 48).unsupported
needs_native = pytest.mark.skipif(UNSUPPORTED is not None, reason=f"the native backend does not support {UNSUPPORTED}")
IMAGES = torch.ones(2, 3, 32, 32)


@needs_native
@pytest.mark.parametrize("case", [*NATIVE_CASES, Case(5, 16, 12, 3, mlp_width=36)], ids=lambda case: case.name)
def test_output_and_gradients_equal_the_references(case):
    assert max(errors(case, "native").values()) < 3e-6


def model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("tnt_ti", img_size=32, depth=2, embed_dim=48, num_classes=10, **kwargs)


def gradients(network, images):
    network(images).square().sum().backward()
    return {name: p.grad for name, p in network.named_parameters()}


@needs_native
def test_any_number_of_threads_gives_the_same_bits():
    before, found = torch.get_num_threads(), []
    words, block = torch.randn(45, 16, 12, requires_grad=True), model().blocks[0]
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
def test_compiled_training_steps_have_the_recorded_losses():
    torch._dynamo.reset()
    assert error(losses("native", compiled=True)) < 1e-5


@needs_native
def test_a_pyramid_computes_the_same_as_with_the_reference(monkeypatch):
    """Its widths of words are 5, 10 and 20, and its LayerNorm is over all words of a sentence."""
    sizes = dict(img_size=64, embed_dim=16, inner_dim=5, depths=(1, 1, 1, 1), num_heads_inner=1, num_heads_outer=2)
    torch.manual_seed(0)
    network = timm.create_model("pyramid_tnt_ti", **sizes, num_classes=10, drop_path_rate=0.2).train()
    images, found = torch.randn(2, 3, 64, 64), []
    for backend in ("native", "reference"):
        monkeypatch.setattr(choose_backend, "wanted", backend)
        network.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        found.append(gradients(network, images))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@needs_native
def test_multiply_adds_are_counted(monkeypatch):
    inference, training = [], []
    for backend in ("native", "reference"):
        monkeypatch.setattr(choose_backend, "wanted", backend)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model().eval()(IMAGES[:1])
        inference.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            model()(IMAGES[:1]).sum().backward()
        training.append(counter.get_total_flops())
    assert inference[0] == inference[1] > 0
    words = 4 * 16  # of the two inner layers, which backward computes again
    assert training[0] - training[1] == 2 * 2 * words * (12 * 12 * 12 + 2 * 16 * 12)


@pytest.mark.parametrize(
    "reason, change, precision",
    [
        ("native does not support dropout inside", dict(proj_drop_rate=0.1), torch.float32),
        ("native does not support sentences of other than 16 words", dict(first_stride=8), torch.float32),
        ("native does not support widths of 132 and 528", dict(inner_dim=132), torch.float32),
        ("native does not support words of torch.float32 with products of torch.bfloat16", {}, torch.bfloat16),
    ],
)
def test_the_reference_computes_what_is_not_supported_and_the_log_gives_the_reason(
    reason, change, precision, caplog, monkeypatch
):
    monkeypatch.setattr(choose_backend, "_logged", set())
    with caplog.at_level("INFO", "tnt_timm.ops"), torch.autocast("cpu", torch.bfloat16, precision == torch.bfloat16):
        model(**change).train()(IMAGES).sum().backward()
    (line,) = (record.message for record in caplog.records if "inner" in record.message)
    assert line.startswith(f"inner transformer backend: reference ({reason}")


def test_a_direct_call_of_the_operator_with_an_unsupported_layer_is_an_error():
    parameters = [x.detach() for x in model().blocks[0].parameters()][:12]
    with pytest.raises(ValueError, match="native does not support sentences of other than 16 words"):
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


@pytest.mark.parametrize("compiler, reason", [("/nowhere/g++", "No such file"), ("false", "compiler failed")])
def test_without_a_compiler_the_reference_computes(as_new, monkeypatch, tmp_path, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    log = as_new("auto")
    assert reason in log and "backend: reference" in log


@needs_native
def test_it_is_compiled_once_and_found_again(as_new, monkeypatch, tmp_path):
    assert native_backend.SOURCE.is_file() and native_backend.HEADER.is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "backend: native" in as_new("auto")
    (built,) = (tmp_path / "tnt_timm").iterdir()
    changed = built.stat().st_mtime_ns
    assert "backend: native" in as_new("auto")
    assert [built] == list((tmp_path / "tnt_timm").iterdir()) and built.stat().st_mtime_ns == changed


@needs_native
def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(choose_backend, "_logged", set())
    with caplog.at_level("INFO", "tnt_timm.ops"):
        for _ in range(2):
            model()(IMAGES)
    lines = [record.message for record in caplog.records]
    assert sum(line.startswith("inner transformer backend: native (") for line in lines) == 1
    assert len(lines) == len(set(lines))


def test_tnt_backend_overrides_the_choice(as_new):
    assert "backend" not in as_new("reference")
    assert ops.backends_used() == ["inner transformer backend: reference (TNT_BACKEND)"]
    assert "reference (triton does not support words on cpu)" in as_new("triton")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TNT_BACKEND": "cuda"}
    wrong = subprocess.run([sys.executable, "-c", "import tnt_timm"], env=env, capture_output=True, text=True)
    assert wrong.returncode != 0
    assert wrong.stderr.splitlines()[-1].endswith("TNT_BACKEND=cuda: choose auto, reference, native or triton")


def test_values_that_are_not_finite_stay_visible_and_in_their_sentence():
    block, words = model().blocks[0], torch.randn(4, 16, 12)
    clean = block.inner(words)
    words[1, 3, 5], words[2, 0, 0] = float("nan"), float("inf")
    out = block.inner(words)
    assert torch.isnan(out[1]).any() and not torch.isfinite(out[2]).all()
    assert torch.equal(out[[0, 3]], clean[[0, 3]])
