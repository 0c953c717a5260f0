"""Write a model as the folder that timm and the Hugging Face hub read: config.json and model.safetensors.

    timm.create_model("local-dir:FOLDER", pretrained=True)

then returns the network with its weights, head and preprocessing. Architectures of this package need `import tnt_timm` first.
"""

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict
from timm.models._hub import save_config_for_hf
from timm.models.tnt import TNT as TimmTNT
from timm.utils import unwrap_model
from torch import Tensor, nn

from tnt_timm import atomic_files
from tnt_timm.errors import UserError, one_line
from tnt_timm.models import TNT
from tnt_timm.models.convert_weights import differences
from tnt_timm.models.timm_api import TimmModel
from tnt_timm.models.variants import VARIANTS

CONFIG = "config.json"
WEIGHTS = "model.safetensors"  # both names are timm's


def write_model_folder(
    folder: Path,
    model: nn.Module,
    weights: Mapping[str, Tensor],
    classes: Optional[Sequence[str]] = None,
    preprocessing: Optional[Mapping[str, Any]] = None,
    timm_names: bool = False,
) -> None:
    """Write a model into a folder. Each file is replaced as a whole or not at all; other files stay.

    Args:
        folder: created if it is missing.
        model: made by `timm.create_model`; it may be compiled or wrapped. It is not changed.
        weights: state dict of this network, on any device; prefixes of wrappers are removed.
        classes: class names, in the order of the logits.
        preprocessing: as `timm.data.resolve_data_config` returns it (default: the model's own).
        timm_names: give a TNT timm's name for it, so that it loads without this package.

    Raises:
        UserError: a file cannot be written, the preprocessing does not fit the model, or timm has no equal network.
        ValueError: the weights are another network's.
    """
    model, weights = unwrap_model(model), _plain_names(weights)
    problems = differences(weights, _plain_names(model.state_dict()))
    if problems:
        raise ValueError(f"weights of another network: {'; '.join(problems)}")
    config = config_text(model, classes, preprocessing, timm_names)
    make_folder(folder)
    _write_weights(folder / WEIGHTS, weights)
    atomic_files.replace_text(folder / CONFIG, config)


def architecture_name(name: str, model: nn.Module) -> str:
    """Return timm's name of an architecture; `name` may be that of a folder or of a model on the hub."""
    return model.pretrained_cfg["architecture"] if ":" in name else name


def make_folder(folder: Path) -> None:
    """Create a folder if it is missing; raise UserError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {one_line(error)}; choose another folder") from None


def _plain_names(weights: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Return weights by the names of the bare network; torch.compile adds its prefix to any part that it wraps."""
    return clean_state_dict({name.replace("_orig_mod.", ""): value for name, value in weights.items()})


def _write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a .safetensors file, and read it back before it replaces an older one."""
    whole = {  # safetensors accepts neither views of other tensors nor other memory layouts
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in weights.items()
    }
    content = safetensors.torch.save(whole, metadata={"format": "pt"})

    def check(written: Path) -> None:
        if written.read_bytes() != content:
            raise OSError("the file on disk differs from what was written")

    atomic_files.replace(path, lambda file: file.write(content), check)


def config_text(
    model: nn.Module,
    classes: Optional[Sequence[str]] = None,
    preprocessing: Optional[Mapping[str, Any]] = None,
    timm_names: bool = False,
) -> str:
    """Return the text of config.json: architecture and arguments, classes and preprocessing.

    The arguments are those of `write_model_folder`.

    Raises:
        UserError: the preprocessing does not fit the model, JSON cannot hold an argument, or timm has no equal network.
    """
    model = unwrap_model(model)
    more = {"label_names": list(classes)} if classes else {}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, CONFIG)  # timm writes the config into a file only
            save_config_for_hf(model, str(path), model_config=more, data_config=dict(preprocessing or {}))
            config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{CONFIG}: {one_line(error)}") from None
    if timm_names and isinstance(model, TimmModel):
        name, arguments = config["architecture"], config["model_args"]
        config["architecture"], config["model_args"] = _equal_in_timm(model, name, arguments)
    return json.dumps(config, indent=2) + "\n"


def _equal_in_timm(model: TimmModel, name: str, arguments: Mapping[str, Any]) -> Tuple[str, Dict[str, Any]]:
    """Return timm's name for a network of this package, and the arguments that make timm's network equal."""
    if not isinstance(model, TNT):
        raise UserError(f"timm names: timm has no {type(model).__name__}; leave --timm-names out")
    reason = ""
    arguments = {**VARIANTS.get(name, {}), **arguments}
    ours, theirs = inspect.signature(TNT).parameters, inspect.signature(TimmTNT).parameters
    for key, value in arguments.items():
        if key not in theirs and value != ours[key].default:
            reason = f" with {key}={value}"
    arguments = {key: value for key, value in arguments.items() if key in theirs}
    equal = "tnt_b_patch16_224" if name.startswith("tnt_b") else "tnt_s_patch16_224"
    if name in VARIANTS and not reason:
        parameters = timm.create_model(equal, **arguments, device="meta").state_dict()
        problems = differences(model.state_dict(), parameters)  # such as an mlp_ratio, which timm's inner MLP ignores
        reason = f" ({'; '.join(problems)})" if problems else ""
    if name not in VARIANTS or reason:
        raise UserError(f"timm names: {name}{reason} has no equal in timm; leave --timm-names out")
    return equal, arguments
