"""Export a model to other formats. Each file is reloaded and compared with the network before it is put into the folder.

timm          config.json and model.safetensors, see folder.py
torch-export  model.pt2, a program of torch.export; it runs in PyTorch without this package
onnx          model.onnx; from 2 GB on the weights are in model.onnx.data
onnx-int8     model_int8.onnx; the weights of linear layers have 8 bits, the rest is computed in float32

The last three accept any batch size. They contain the text of config.json: in `extra_files` or in the ONNX metadata.
"""

import contextlib
import importlib.util
import logging
import os
import tempfile
import warnings
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Sequence, Tuple

import timm
import torch
from timm.data import resolve_input_data_config
from timm.utils import unwrap_model
from torch import Tensor, nn

from tnt_timm.errors import UserError, one_line
from tnt_timm.export import folder as model_folder

OPSET = 23  # the first with an attention operator; newer ones give the same graph
PROTOBUF_LIMIT = 2 * 1000**3 - 50 * 1000**2  # bytes of weights in one .onnx file, with room for the graph
ROUNDING = 1e-4  # tolerance for the same arithmetic in another order; measured: 1e-6 of the largest logit
INT8_ERROR = 0.2  # tolerance for weights in 8 bits; measured: 0.01 to 0.05
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Network = Callable[[Tensor], Tensor]  # (B, C, H, W) -> (B, classes)


@dataclass
class Job:
    """A network to export, and the intermediate programs that formats share; the fields are the arguments of `export`."""

    model: nn.Module
    classes: Optional[Sequence[str]]
    preprocessing: Optional[Mapping[str, Any]]
    timm_names: bool
    opset: int
    batch_size: int

    def __post_init__(self):
        self.config = model_folder.config_text(self.model, self.classes, self.preprocessing, self.timm_names)
        self.input_size = resolve_input_data_config(self.model, self.preprocessing)["input_size"]

    def images(self, batch_size: int) -> Tensor:
        """Return random images (B, C, H, W), the same for the same batch size."""
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
        for node in program.graph.nodes:  # stack traces would put paths of this machine into the files
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
        if program.model.opset_imports[""] != self.opset:  # if it cannot convert, the exporter only logs that
            raise UserError(f"opset: {self.opset}: PyTorch {torch.__version__} cannot write it; try 20 to {OPSET}")
        program.model.metadata_props[model_folder.CONFIG] = self.config
        return program


def _write_folder(job: Job, folder: Path) -> None:
    weights = job.model.state_dict()
    model_folder.write_model_folder(folder, job.model, weights, job.classes, job.preprocessing, job.timm_names)


def _load_folder(job: Job, folder: Path) -> Network:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _write_program(job: Job, folder: Path) -> None:
    torch.export.save(job.program, folder / "model.pt2", extra_files={model_folder.CONFIG: job.config})


def _load_program(job: Job, folder: Path) -> Network:
    return torch.export.load(folder / "model.pt2").module()


def _write_onnx(job: Job, folder: Path) -> None:
    size = sum(value.nbytes for value in job.model.state_dict().values())
    job.onnx_program.save(folder / "model.onnx", external_data=size > PROTOBUF_LIMIT)


def _write_int8(job: Job, folder: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _write_onnx(job, Path(scratch))
        quantize_dynamic(
            Path(scratch, "model.onnx"),
            folder / "model_int8.onnx",
            weight_type=QuantType.QInt8,
            per_channel=True,  # otherwise a single large weight makes a whole layer inexact
            op_types_to_quantize=["MatMul", "Gemm"],  # onnxruntime cannot load its Attention operator in 8 bits
        )


def _load_onnx(job: Optional[Job], folder: Path, name: str = "model.onnx") -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@dataclass(frozen=True)
class Format:
    """How to write a format into a folder and load it; tolerance is the allowed difference over the largest logit."""

    write: Callable[[Job, Path], None]
    load: Callable[[Job, Path], Network]
    tolerance: float
    packages: Tuple[str, ...] = ()


FORMATS: Dict[str, Format] = {
    "timm": Format(_write_folder, _load_folder, 0.0),
    "torch-export": Format(_write_program, _load_program, ROUNDING),
    "onnx": Format(_write_onnx, _load_onnx, ROUNDING, ONNX_PACKAGES),
    "onnx-int8": Format(_write_int8, partial(_load_onnx, name="model_int8.onnx"), INT8_ERROR, ONNX_PACKAGES),
}


@dataclass(frozen=True)
class Exported:
    """A format that was written and checked."""

    format: str
    files: Tuple[Path, ...]
    size: int  # bytes of all files
    difference: float  # largest difference of a logit
    largest: float  # largest logit of the network


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
    """Write a model in several formats, and check each at two other batch sizes than the example's.

    Args:
        model: made by `timm.create_model`, on the CPU and in float32; it is left in evaluation mode.
        folder: created if it is missing; it receives the files of a format after the check.
        formats: keys of FORMATS.
        classes, preprocessing, timm_names: as in `folder.write_model_folder`.
        opset: ONNX operator set.
        batch_size: of the example images, at least 2; torch.export would make a constant of 1.

    Raises:
        UserError: a package is missing, the model cannot be written in a format, or a file gives other logits.
    """
    check_packages(formats)
    job = Job(unwrap_model(model).eval(), classes, preprocessing, timm_names, opset, batch_size)
    expected = {size: job.logits(size) for size in (1, batch_size + 1)}
    largest = max(float(logits.abs().max()) for logits in expected.values())
    if not largest < float("inf"):
        raise UserError("model: its output is not finite, so its weights are damaged; export another checkpoint")
    model_folder.make_folder(folder)
    for name in formats:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
            difference = _write_and_compare(job, name, Path(scratch), expected)
            other_code = name == "timm" and timm_names  # timm's implementation of the network loads this one
            allowed = (ROUNDING if other_code else FORMATS[name].tolerance) * largest
            if not difference <= allowed:  # also catches nan
                raise UserError(
                    f"{name}: the file differs from the model by {difference:.2g} ({allowed:.2g} is allowed); not written"
                )
            files = tuple(folder / file.name for file in sorted(Path(scratch).iterdir()))
            for file in files:
                os.replace(Path(scratch, file.name), file)
        yield Exported(name, files, sum(file.stat().st_size for file in files), difference, largest)


def check_packages(formats: Sequence[str]) -> None:
    """Raise UserError if a format needs a package that is not installed."""
    for name in formats:
        missing = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(f"{name}: needs {', '.join(missing)}; run: pip install {' '.join(ONNX_PACKAGES)}")


def _write_and_compare(job: Job, name: str, scratch: Path, expected: Mapping[int, Tensor]) -> float:
    """Write a format, load it, and return the largest difference of its logits from the expected ones."""
    try:
        with _quiet():
            FORMATS[name].write(job, scratch)
            loaded = FORMATS[name].load(job, scratch)
            with torch.inference_mode():
                return max(float((loaded(job.images(size)) - logits).abs().max()) for size, logits in expected.items())
    except (UserError, OSError):
        raise
    except Exception as error:  # the exceptions of exporters and runtimes have no common base class
        raise UserError(f"{name}: this model cannot be exported: {type(error).__name__}: {one_line(error)}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' progress messages; their result is checked anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
