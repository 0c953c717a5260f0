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
from typing import Any, Callable, ContextManager, Dict, Iterator, List, NamedTuple
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


class Way(NamedTuple):
    """One way to break a kernel, and what the warning says about it."""

    said: str
    kernel: str
    change: Change


class Edit(NamedTuple):
    """A change of the kernels' source, and what the warning says about it."""

    said: str
    old: str
    new: str


OUTPUT, GRADIENT = "the relative error of the output is ", "the relative error of the gradient of "
NO_COMPILER = "Failed to find C compiler"
WAYS = {
    "compile error": Way("no such instruction", "forward", fails(CompilationError("", None, "no such instruction"))),
    "shared memory": Way(
        "Required: 294912, Hardware limit: 101376",
        "mlp_backward",
        fails(OutOfResources(294912, 101376, "shared memory")),
    ),
    "registers": Way(
        "Required: 70000, Hardware limit: 65536", "forward", fails(OutOfResources(70000, 65536, "registers"))
    ),
    "launch": Way(
        "[CUDA]: invalid", "attention_backward", fails(RuntimeError("Triton Error [CUDA]: invalid argument"))
    ),
    "no C compiler": Way(NO_COMPILER, "pack", fails(RuntimeError(f"{NO_COMPILER}. Please specify via CC"))),
    "unwritten output": Way(OUTPUT + "nan", "forward", misses_a_sentence),
    "wrong output": Way(OUTPUT + "0.2", "forward", is_a_little_wrong),
    "NaN": Way(OUTPUT + "nan", "forward", gives_nan),
    "one wrong word": Way(OUTPUT, "forward", has_one_wrong_word),
    "one wrong word in a gradient": Way(GRADIENT + "words is", "attention_backward", has_one_wrong_word),
    "stochastic depth": Way(OUTPUT, "forward", ignores_stochastic_depth),
    "wrong gradient": Way(GRADIENT + "words is 0.2", "attention_backward", is_a_little_wrong),
    "wrong gradients of parameters": Way(GRADIENT, "unpack", is_a_little_wrong),
    "MLP gradients of the last tile only": Edit(GRADIENT, "d_mlp[part] + ", ""),
    "attention gradients of the last tile only": Edit(GRADIENT, "d_attention[4 * part + 2] + ", ""),
}


def broken(way: Way) -> ContextManager:
    """Replace one kernel."""
    module, name = triton_packing if way.kernel in ("pack", "unpack") else triton_kernels, f"{way.kernel}_kernel"
    return mock.patch.object(module, name, Broken(getattr(module, name), way.change))


@contextlib.contextmanager
def edited(edit: Edit) -> Iterator[None]:
    """Replace all kernels by those of the edited source."""
    source = Path(triton_kernels.__file__).read_text()
    assert edit.old in source
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "edited.py"
        file.write_text(source.replace(edit.old, edit.new))
        spec = importlib.util.spec_from_file_location("edited", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with mock.patch.object(triton_backend, "triton_kernels", module):
            yield


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
    found |= {name: report(broken(way) if isinstance(way, Way) else edited(way)) for name, way in WAYS.items()}
    json.dump({"ways": found, "modes": modes()}, sys.stdout)
