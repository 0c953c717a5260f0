"""A model in other formats. Each file is loaded back and compared with the network before it takes its place.

timm          config.json and model.safetensors, as in folder.py
safetensors   model.safetensors, the weights alone
torch-export  model.pt2, a program of torch.export: runs in PyTorch without this package
onnx          model.onnx, one file below 2 GB, else with model.onnx.data beside it
onnx-int8     model_int8.onnx, its linears' weights in 8 bits; the rest is computed in float32

The last three take any batch size. What config.json says is inside them too: `extra_files` of the one, metadata of the others.
"""

import contextlib
import copy
import importlib.util
import logging
import os
import tempfile
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Sequence, Tuple

import safetensors.torch
import timm
import torch
from timm.data import resolve_input_data_config
from timm.utils import unwrap_model
from torch import Tensor, nn

from tnt_timm.errors import UserError, one_line
from tnt_timm.export import folder as model_folder

OPSET = 23  # the first with an operator for attention; torch and onnxruntime take newer ones, with the same graph
PROTOBUF_LIMIT = 2 * 1000**3 - 50 * 1000**2  # bytes of weights that fit into one .onnx file, with room for the graph
ROUNDING = 1e-4  # the same arithmetic in another order; measured: 1e-6 of the largest logit
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Network = Callable[[Tensor], Tensor]  # (B, C, H, W) -> (B, classes)


class Job:
    """A network that is being exported, and what several formats need of it.

    Args:
        model: on the CPU, in evaluation mode.
        classes, preprocessing, timm_names: as of `folder.write_model_folder`.
        opset: of ONNX.
        batch_size: of the example that the network is captured with.
    """

    def __init__(self, model, classes, preprocessing, timm_names: bool, opset: int, batch_size: int):
        self.model, self.classes, self.preprocessing, self.timm_names = model, classes, preprocessing, timm_names
        self.config = model_folder.config_text(model, classes, preprocessing, timm_names)
        self.input_size = resolve_input_data_config(model, preprocessing)["input_size"]
        self.opset, self.batch_size = opset, batch_size

    def images(self, batch_size: int) -> Tensor:  # (B, C, H, W)
        generator = torch.Generator().manual_seed(batch_size)
        return torch.randn(batch_size, *self.input_size, generator=generator)

    @torch.inference_mode()
    def logits(self, batch_size: int) -> Tensor:  # (B, classes)
        try:
            return self.model(self.images(batch_size))
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"model: it does not take images of {self.input_size}: {one_line(error)}") from None

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        batch = torch.export.Dim("batch")
        program = torch.export.export(self.model, (self.images(self.batch_size),), dynamic_shapes=({0: batch},))
        for node in program.graph.nodes:  # no paths of this machine into files for others
            node.meta.pop("stack_trace", None)
        return program

    @cached_property
    def onnx_program(self) -> torch.onnx.ONNXProgram:
        program = torch.onnx.export(
            self.program,
            dynamo=True,
            opset_version=self.opset,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
        written = program.model.opset_imports[""]
        if written != self.opset:  # the exporter keeps what it cannot convert, and says so in the log
            raise UserError(f"opset: {self.opset}: PyTorch {torch.__version__} cannot write it; try 20 to {OPSET}")
        program.model.metadata_props[model_folder.CONFIG] = self.config
        return program


def _write_folder(job: Job, folder: Path) -> None:
    weights = job.model.state_dict()
    model_folder.write_model_folder(folder, job.model, weights, job.classes, job.preprocessing, job.timm_names)


def _load_folder(job: Job, folder: Path) -> Network:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _write_weights(job: Job, folder: Path) -> None:
    model_folder.write_weights(folder / model_folder.WEIGHTS, job.model.state_dict())


def _load_weights(job: Job, folder: Path) -> Network:
    model = copy.deepcopy(job.model)
    model.load_state_dict(safetensors.torch.load_file(folder / model_folder.WEIGHTS))
    return model


def _write_program(job: Job, folder: Path) -> None:
    torch.export.save(job.program, folder / "model.pt2", extra_files={model_folder.CONFIG: job.config})


def _load_program(job: Job, folder: Path) -> Network:
    return torch.export.load(folder / "model.pt2").module()


def _write_onnx(job: Job, folder: Path) -> None:
    size = sum(value.nbytes for value in job.model.state_dict().values())
    job.onnx_program.save(folder / "model.onnx", external_data=size > PROTOBUF_LIMIT)


def _load_onnx(job: Job, folder: Path, name: str = "model.onnx") -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_int8(job: Job, folder: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _write_onnx(job, Path(scratch))
        quantize_dynamic(
            Path(scratch, "model.onnx"),
            folder / "model_int8.onnx",
            weight_type=QuantType.QInt8,
            per_channel=True,  # or one large weight coarsens a whole layer
            op_types_to_quantize=["MatMul", "Gemm"],  # of the others, onnxruntime's Attention in 8 bits does not load
        )


def _load_int8(job: Job, folder: Path) -> Network:
    return _load_onnx(job, folder, "model_int8.onnx")


@dataclass(frozen=True)
class Format:
    """How a format is written into a folder, loaded from it, and how far it may be from the network.

    tolerance: of the logits, as a part of the largest one.
    """

    write: Callable[[Job, Path], None]
    load: Callable[[Job, Path], Network]
    tolerance: float
    packages: Tuple[str, ...] = ()


FORMATS: Dict[str, Format] = {
    "timm": Format(_write_folder, _load_folder, 0.0),
    "safetensors": Format(_write_weights, _load_weights, 0.0),
    "torch-export": Format(_write_program, _load_program, ROUNDING),
    "onnx": Format(_write_onnx, _load_onnx, ROUNDING, ONNX_PACKAGES),
    "onnx-int8": Format(_write_int8, _load_int8, 0.2, ONNX_PACKAGES),  # measured: 0.01 to 0.05
}


@dataclass(frozen=True)
class Exported:
    """A format that was written and checked."""

    format: str
    files: Tuple[Path, ...]
    size: int  # bytes, of all files
    difference: float  # the largest of any logit
    largest: float  # logit of the network


def export(
    model: nn.Module,
    folder: Path,
    formats: Sequence[str],
    classes: Optional[Sequence[str]] = None,
    preprocessing: Optional[Mapping[str, Any]] = None,
    timm_names: bool = False,
    opset: int = OPSET,
    batch_size: int = 2,
) -> Iterator[Exported]:
    """Write a model in several formats, each checked at two batch sizes other than the example's.

    Args:
        model: made by `timm.create_model`, on the CPU and in float32; it is left in evaluation mode.
        folder: made where it is missing. A format's files get there when they have passed their check.
        formats: keys of FORMATS.
        classes, preprocessing, timm_names: as of `folder.write_model_folder`.
        opset: of ONNX.
        batch_size: of the example, 2 or more; of 1, torch.export would make a constant.

    Raises:
        UserError: a package is missing, the model cannot be written in a format, or a file does not compute the same.
    """
    check_packages(formats)
    job = Job(unwrap_model(model).eval(), classes, preprocessing, timm_names, opset, batch_size)
    expected = {size: job.logits(size) for size in (1, batch_size + 1)}
    largest = max(float(logits.abs().max()) for logits in expected.values())
    if not largest < float("inf"):
        raise UserError("the model's own output is not finite; its weights are damaged")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {folder}: cannot be written: {one_line(error)}") from None
    for name in formats:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
            difference = _write_and_compare(job, name, Path(scratch), expected)
            other_code = name == "timm" and timm_names  # timm's own implementation of the same network
            allowed = (ROUNDING if other_code else FORMATS[name].tolerance) * largest
            if not difference <= allowed:  # not-a-number is neither
                raise UserError(
                    f"{name}: the file differs from the model by {difference:.2g} ({allowed:.2g} is allowed); not written"
                )
            yield _put_in_place(name, Path(scratch), folder, difference, largest)


def check_packages(formats: Sequence[str]) -> None:
    """Raises UserError: a format needs a package that is not installed."""
    for name in formats:
        missing = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(f"{name}: needs {', '.join(missing)}; run: pip install {' '.join(ONNX_PACKAGES)}")


def _write_and_compare(job: Job, name: str, scratch: Path, expected: Mapping[int, Tensor]) -> float:
    try:
        with _quiet():
            FORMATS[name].write(job, scratch)
            loaded = FORMATS[name].load(job, scratch)
            with torch.inference_mode():
                return max(float((loaded(job.images(size)) - logits).abs().max()) for size, logits in expected.items())
    except (UserError, OSError):
        raise
    except Exception as error:  # exporters and runtimes have exceptions of their own, many without a common base
        raise UserError(f"{name}: this model cannot be exported: {type(error).__name__}: {one_line(error)}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on their own progress; what comes of it is checked."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _put_in_place(name: str, scratch: Path, folder: Path, difference: float, largest: float) -> Exported:
    moved = []
    for file in sorted(scratch.iterdir()):
        os.replace(file, folder / file.name)
        moved.append(folder / file.name)
    return Exported(name, tuple(moved), sum(file.stat().st_size for file in moved), difference, largest)
