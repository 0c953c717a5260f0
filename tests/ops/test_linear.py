"""Linear layers by oneDNN: equal to PyTorch's own, used where they are faster, and compatible with the rest of PyTorch."""

import logging
import time

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._inductor.cpu_vec_isa import pick_vec_isa

import tnt_timm  # noqa: F401
from tnt_timm import machine
from tnt_timm.models.layers import Linear
from tnt_timm.ops import dispatch, linear_layer

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN is not in this build of torch")
onednn = linear_layer.onednn


@pytest.fixture
def faster(monkeypatch):
    monkeypatch.setattr(linear_layer, "faster_here", lambda: True)
    monkeypatch.setattr(dispatch, "_logged", set())


@pytest.fixture
def taken(monkeypatch, faster):
    """The shapes that oneDNN's operator is called with."""
    shapes = []

    def recorded(x, weight, bias):
        shapes.append(tuple(x.shape))
        return onednn(x, weight, bias)

    monkeypatch.setattr(linear_layer, "onednn", recorded)
    return shapes


def close(found, wanted):
    return (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def everything(function, dtype, shape, biased):
    """Output, gradients, and the gradients of the gradients' squares."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape), torch.randn(40, shape[-1]), *([torch.randn(40)] if biased else [])]
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    out = function(*tensors, *([] if biased else [None]))
    first = torch.autograd.grad(out.sigmoid().sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), tensors)
    return [out, *first, *second]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 197, 24), (2, 3, 5, 7)])
def test_values_and_derivatives_equal_pytorchs(shape, biased):
    found, wanted = everything(onednn, torch.float32, shape, biased), everything(F.linear, torch.float64, shape, biased)
    assert all(close(a, b) for a, b in zip(found, wanted))


def test_views_and_empty_tensors():
    x, weight = torch.randn(7, 6).t(), torch.randn(5, 14)[:, ::2]
    for bias in (None, torch.arange(10.0)[::2], torch.ones(1).expand(5)):
        assert close(onednn(x, weight, bias), F.linear(x, weight, bias))
    nothing = torch.randn(0, 2, 7, requires_grad=True)
    out = onednn(nothing, weight.requires_grad_(), None)
    out.sum().backward()
    assert out.shape == (0, 2, 5) and nothing.grad.shape == nothing.shape and weight.grad.abs().max() == 0


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8)])
def test_the_result_can_be_changed_in_place(faster, shape):
    x = torch.randn(shape, requires_grad=True)
    Linear(8, 4)(x).add_(1).div_(2).sum().backward()
    assert x.grad.shape == shape


def test_only_what_backward_needs_is_saved():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8)

    def saved(x, weight):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)), lambda t: t):
            onednn(x, weight, None)
        return shapes

    assert saved(x, weight) == [(4, 8)]
    assert saved(x.detach(), weight.requires_grad_()) == [(3, 8)]


def test_backward_for_class_tokens_is_no_slower_than_for_rows():
    """oneDNN multiplies by a matrix with gaps a thousand times as slowly."""
    tokens, weight = torch.randn(8, 197, 384), torch.randn(1000, 384, requires_grad=True)

    def seconds(x):
        out, taken = onednn(x, weight, None), []
        for _ in range(7):
            start = time.perf_counter()
            torch.autograd.grad(out, weight, torch.ones_like(out), retain_graph=True)
            taken.append(time.perf_counter() - start)
        return sorted(taken)[3]

    assert seconds(tokens[:, 0]) < 20 * seconds(tokens[:, 0].contiguous())


def test_the_operator_passes_pytorchs_checks():
    tensors = [torch.randn(2, 3, 8).requires_grad_(), torch.randn(4, 8).requires_grad_(), torch.randn(4)]
    torch.library.opcheck(onednn, tensors)


def test_a_model_computes_its_linear_layers_with_it(taken):
    torch.manual_seed(0)
    model = timm.create_model("tnt_ti", img_size=32, depth=1).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = model(images)
        assert len(taken) == 1 + 6 + 1  # words to sentences; fold, qk, v, proj, fc1, fc2; head
        assert close(found, model.double()(images.double()))
    assert len(taken) == 8


@pytest.mark.parametrize(
    "vendor, capability, wanted",
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),  # MKL is as good
        ("GenuineIntel", "AVX512", False),
        ("HygonGenuine", "AVX2", False),
    ],
)
def test_the_cpu_decides(vendor, capability, wanted, monkeypatch):
    monkeypatch.setattr(machine, "cpu_info", {"vendor_id": vendor}.get)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert linear_layer.faster_here.__wrapped__() is wanted


def test_pytorchs_own_computes_the_rest(taken, monkeypatch):
    layer, x = Linear(8, 4), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
    layer.float()
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "wanted", "reference")
        layer(x)
    with torch.autograd.forward_ad.dual_level():
        layer(x)
    with torch.backends.mkldnn.flags(enabled=False):
        layer(x)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        layer(torch.randn(2, 9))
    assert taken == []


class Quantized(torch.Tensor):
    """Weights with their own linear function, like those of quantization libraries."""

    calls = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_quantized_weights_use_their_own_function(taken):
    model = timm.create_model("tnt_ti", img_size=32, depth=1).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = torch.nn.Parameter(module.weight.detach().as_subclass(Quantized), requires_grad=False)
            module.register_parameter("weight", weight)
    Quantized.calls.clear()
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert taken == [] and Quantized.calls.count(F.linear) == 8 + 5  # with the inner transformer's


def test_the_choice_is_logged_once(faster, caplog):
    with caplog.at_level(logging.INFO, "tnt_timm.ops"):
        for _ in range(2):
            Linear(8, 4)(torch.randn(2, 8))
    assert [record.message for record in caplog.records] == ["linear layer backend: oneDNN"]


def test_compiled_without_a_graph_break(faster):
    torch._dynamo.reset()
    graphs, layer = [], Linear(8, 4)

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch.compile(layer, backend=backend, fullgraph=True)(torch.randn(3, 8))
    assert "tnt_timm.linear" in graphs[0]
    if not pick_vec_isa():
        pytest.skip("without vector instructions, inductor (torch 2.14) writes C++ that does not compile")
    x = torch.randn(3, 8, requires_grad=True)
    out = torch.compile(layer, fullgraph=True)(x)
    (found,) = torch.autograd.grad(out.sum(), x)
    assert close(out, F.linear(x, layer.weight, layer.bias)) and close(found, layer.weight.sum(0).expand(3, 8))
