"""Break the CUDA kernels in many ways, and report what is logged, computed and raised. Runs under Triton's interpreter:

TRITON_INTERPRET=1 python tests/ops/broken_kernels.py

It prints one line of JSON.
"""

import contextlib
import importlib.util
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterator, List
from unittest import mock

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

import tnt_timm  # noqa: F401  (registers the models)
from tnt_timm.errors import UserError
from tnt_timm.ops import dispatch, self_check, triton_backend, triton_kernels, triton_packing

Launch = Callable[..., Any]
Change = Callable[[Launch, List[Any], Dict[str, Any]], None]
IMAGES = torch.ones(2, 3, 32, 32)


class Broken:
    """A kernel that calls `change(launch, arguments, keywords)` instead of launching."""

    def __init__(self, kernel: Any, change: Change):
        self.kernel, self.change = kernel, change

    def __getitem__(self, grid: Any) -> Launch:
        return lambda *args, **kwargs: self.change(self.kernel[grid], list(args), kwargs)


def fails(error: Exception) -> Change:
    def change(launch, args, kwargs):
        raise error

    return change


def misses_a_sentence(launch, args, kwargs):
    args[5] -= 16  # number of words
    launch(*args, **kwargs)


def is_a_little_wrong(launch, args, kwargs):
    """The first argument is the result, or the result is computed from it."""
    args[0].mul_(1.2)
    launch(*args, **kwargs)
    args[0].mul_(1.2)


def gives_nan(launch, args, kwargs):
    launch(*args, **kwargs)
    args[0].view(-1)[7] = float("nan")


def has_one_wrong_word(launch, args, kwargs):
    launch(*args, **kwargs)
    args[0].view(-1, kwargs["C"])[-1] *= 3


def ignores_stochastic_depth(launch, args, kwargs):
    args[3] = args[4] = None
    launch(*args, **kwargs)


def broken(kernel: str, change: Change) -> ContextManager:
    """Replace one kernel."""
    module, name = triton_packing if kernel in ("pack", "unpack") else triton_kernels, f"{kernel}_kernel"
    return mock.patch.object(module, name, Broken(getattr(module, name), change))


@contextlib.contextmanager
def edited(old: str, new: str) -> Iterator[None]:
    """Replace the kernels of the layer by those of an edited source."""
    source = Path(triton_kernels.__file__).read_text()
    assert old in source
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "edited.py"
        file.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location("edited", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with mock.patch.object(triton_backend, "triton_kernels", module):
            yield


OUTPUT, GRADIENT = "the relative error of the output is ", "the relative error of the gradient of "
NO_COMPILER, INVALID = "Failed to find C compiler", "Triton Error [CUDA]: invalid argument"
SHARED, REGISTERS = OutOfResources(294912, 101376, "shared memory"), OutOfResources(70000, 65536, "registers")
# what the warning contains, and how to break a kernel
WAYS = {
    "compile error": (
        "no such instruction",
        broken("forward", fails(CompilationError("", None, "no such instruction"))),
    ),
    "shared memory": ("Required: 294912, Hardware limit: 101376", broken("mlp_backward", fails(SHARED))),
    "registers": ("Required: 70000, Hardware limit: 65536", broken("forward", fails(REGISTERS))),
    "launch": (INVALID, broken("attention_backward", fails(RuntimeError(INVALID)))),
    "no C compiler": (NO_COMPILER, broken("pack", fails(RuntimeError(f"{NO_COMPILER}. Please specify via CC")))),
    "unwritten output": (OUTPUT + "nan", broken("forward", misses_a_sentence)),
    "wrong output": (OUTPUT + "0.2", broken("forward", is_a_little_wrong)),
    "NaN": (OUTPUT + "nan", broken("forward", gives_nan)),
    "one wrong word": (OUTPUT, broken("forward", has_one_wrong_word)),
    "one wrong word in a gradient": (GRADIENT + "words is", broken("attention_backward", has_one_wrong_word)),
    "stochastic depth": (OUTPUT, broken("forward", ignores_stochastic_depth)),
    "wrong gradient": (GRADIENT + "words is 0.2", broken("attention_backward", is_a_little_wrong)),
    "wrong gradients of parameters": (GRADIENT, broken("unpack", is_a_little_wrong)),
    "MLP gradients of the last tile only": (GRADIENT, edited("d_mlp[part] + ", "")),
    "attention gradients of the last tile only": (GRADIENT, edited("d_attention[4 * part + 2] + ", "")),
}


def as_new(wanted: str) -> List[str]:
    """Return the coming log of a process that has computed nothing yet, and that prefers the CUDA kernels."""
    for seen in (dispatch._logged, dispatch._reasons, dispatch._forced):
        seen.clear()
    self_check.failure.cache_clear()
    dispatch.wanted = wanted
    dispatch.backend_for = lambda device: "reference" if wanted == "reference" else "triton"
    lines: List[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")
    logging.getLogger("tnt_timm").handlers = [handler]
    logging.getLogger("tnt_timm").setLevel(logging.INFO)
    return lines


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("tnt_ti", img_size=32, depth=2, embed_dim=48, num_classes=4).eval()


def logits(model: Callable) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        return model(IMAGES)


def report(breaking: ContextManager) -> Dict[str, Any]:
    """Run a network twice with TNT_BACKEND=auto and twice with TNT_BACKEND=triton."""
    as_new("reference")
    expected = logits(network())
    log, model, raised = as_new("auto"), network(), []
    with breaking:
        state = torch.random.get_rng_state()
        outs = [logits(model) for _ in range(2)]
        undisturbed = torch.equal(state, torch.random.get_rng_state())
        lines = list(log)
        dispatch.wanted = "triton"
        for _ in range(2):
            try:
                logits(model)
            except UserError as error:
                raised.append(str(error))
    same = [torch.equal(out, expected) for out in outs]
    return {"log": lines, "reference": same, "raised": raised, "undisturbed": undisturbed}


def modes() -> Dict[str, List[str]]:
    """Return the logs of first calls inside of other contexts. The results are all the same."""
    as_new("auto")
    expected, found = logits(network()), {}

    def first_call(name: str, context: Any, call: Callable[[torch.nn.Module], torch.Tensor] = logits) -> None:
        log = as_new("auto")
        model = network()
        with context:
            out = call(model)
        assert torch.equal(out, expected), name
        assert not torch.are_deterministic_algorithms_enabled()
        found[name] = log

    first_call("inference mode", torch.inference_mode())
    counter = FlopCounterMode(display=False)
    first_call("counted", counter)
    with FlopCounterMode(display=False) as again:
        logits(network())
    assert counter.get_total_flops() == again.get_total_flops() > 0
    compiled = lambda model: logits(torch.compile(model, backend="aot_eager", fullgraph=True))  # noqa: E731
    first_call("compiled", torch.no_grad(), compiled)
    first_call("default device", torch.device("cpu"))
    return found


if __name__ == "__main__":
    found = {"nothing": report(contextlib.nullcontext())}
    found |= {name: report(breaking) for name, (_, breaking) in WAYS.items()}
    json.dump({"ways": found, "modes": modes()}, sys.stdout)
