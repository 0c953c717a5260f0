"""Break the CUDA kernels in many ways, and report what is logged, computed and raised. Runs under Triton's interpreter:

TRITON_INTERPRET=1 python tests/ops/broken_kernels.py

It prints one line of JSON.
"""

import importlib.util
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

import tnt_timm  # noqa: F401  (registers the models)
from tnt_timm import ops
from tnt_timm.errors import UserError
from tnt_timm.ops import triton_inner
from tnt_timm.ops.custom_op import BACKENDS

Launch = Callable[..., Any]
Change = Callable[[Launch, List[Any], Dict[str, Any]], None]
IMAGES = torch.ones(2, 3, 32, 32)


class Broken:
    """A kernel of which `change(launch, arguments, keywords)` is launched instead."""

    def __init__(self, kernel: Any, change: Change):
        self.kernel, self.change = kernel, change

    def __getitem__(self, grid: Any) -> Launch:
        return lambda *args, **kwargs: self.change(self.kernel[grid], list(args), kwargs)


def fails(error: Exception) -> Change:
    def change(launch, args, kwargs):
        raise error

    return change


def misses_a_sentence(launch, args, kwargs):
    args[5] -= 16  # of the words
    launch(*args, **kwargs)


def is_a_little_wrong(launch, args, kwargs):
    """The first argument is the result, or what it is made of."""
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


WAYS: Dict[str, Tuple[str, Change]] = {
    "nothing": ("_forward_kernel", lambda launch, args, kwargs: launch(*args, **kwargs)),
    "compile error": ("_forward_kernel", fails(CompilationError("x = 1", None, "no such instruction"))),
    "shared memory": ("_mlp_backward_kernel", fails(OutOfResources(294912, 101376, "shared memory"))),
    "registers": ("_forward_kernel", fails(OutOfResources(70000, 65536, "registers"))),
    "launch": ("_attention_backward_kernel", fails(RuntimeError("Triton Error [CUDA]: invalid argument"))),
    "no C compiler": ("pack_kernel", fails(RuntimeError("Failed to find C compiler. Please specify via CC"))),
    "unwritten output": ("_forward_kernel", misses_a_sentence),
    "wrong output": ("_forward_kernel", is_a_little_wrong),
    "NaN": ("_forward_kernel", gives_nan),
    "one wrong word": ("_forward_kernel", has_one_wrong_word),
    "one wrong word in a gradient": ("_attention_backward_kernel", has_one_wrong_word),
    "stochastic depth": ("_forward_kernel", ignores_stochastic_depth),
    "wrong gradient": ("_attention_backward_kernel", is_a_little_wrong),
    "wrong parameters' gradients": ("unpack_kernel", is_a_little_wrong),
}
EDITS = {  # of the source, by what they do
    "MLP gradients of the last tile only": ("d_mlp[part] + ", ""),
    "attention gradients of the last tile only": ("d_attention[4 * part + 2] + ", ""),
}


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: List[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def as_new(wanted: str) -> Log:
    """As in a process that has computed nothing yet, and that prefers the CUDA kernels."""
    for seen in (ops._said, ops._checks, ops._reasons, ops._forced):
        seen.clear()
    ops._wanted, ops.backend_for = wanted, lambda device: "reference" if wanted == "reference" else "triton"
    log = Log()
    logging.getLogger("tnt_timm").handlers = [log]
    logging.getLogger("tnt_timm").setLevel(logging.INFO)
    return log


def network(**kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("tnt_ti", img_size=32, depth=2, embed_dim=48, num_classes=4, **kwargs).eval()


def logits(model: Callable) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        return model(IMAGES)


def report(name: str, change: Change) -> Dict[str, Any]:
    """With one kernel's launch changed."""
    kernel = getattr(triton_inner, name)
    setattr(triton_inner, name, Broken(kernel, change))
    try:
        return _report()
    finally:
        setattr(triton_inner, name, kernel)


def report_edited(old: str, new: str) -> Dict[str, Any]:
    """With the kernels' source changed."""
    source = Path(triton_inner.__file__).read_text()
    assert old in source
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "edited.py"
        file.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location("edited", file)
        edited = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(edited)
        BACKENDS["triton"] = edited
        try:
            return _report()
        finally:
            BACKENDS["triton"] = triton_inner


def _report() -> Dict[str, Any]:
    as_new("reference")
    expected = logits(network())
    log, model = as_new("auto"), network()
    state = torch.random.get_rng_state()
    outs = [logits(model) for _ in range(2)]
    undisturbed = torch.equal(state, torch.random.get_rng_state())
    lines = list(log.lines)
    ops._wanted = "triton"
    raised = []
    for _ in range(2):
        try:
            logits(model)
        except UserError as error:
            raised.append(str(error))
    same = [torch.equal(out, expected) for out in outs]
    return {"log": lines, "reference": same, "raised": raised, "undisturbed": undisturbed}


def modes() -> Dict[str, List[str]]:
    """What is logged where the first call is in the middle of something else; the results are all the same."""
    as_new("auto")
    expected, found = logits(network()), {}

    def first_call(name: str, context: Any, call: Callable[[torch.nn.Module], torch.Tensor] = logits) -> None:
        log = as_new("auto")
        model = network()
        with context:
            out = call(model)
        assert torch.equal(out, expected), name
        assert not torch.are_deterministic_algorithms_enabled()
        found[name] = log.lines

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
    ways = {name: report(*way) for name, way in WAYS.items()}
    ways |= {name: report_edited(*edit) for name, edit in EDITS.items()}
    json.dump({"ways": ways, "modes": modes()}, sys.stdout)
