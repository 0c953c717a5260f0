"""A model as a folder that timm reads and the Hugging Face hub takes: config.json and model.safetensors.

    timm.create_model("local-dir:FOLDER", pretrained=True)

is the network with these weights, its head and its preprocessing (after `import tnt_timm`, where the architecture is ours).
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

from tnt_timm import files
from tnt_timm.errors import UserError, one_line
from tnt_timm.models import TNT, checkpoints
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
    """Write a model into a folder, each file at once or not at all. What else lies there stays.

    Args:
        folder: made where it is missing.
        model: made by `timm.create_model`, perhaps compiled or wrapped since. It is read, never changed.
        weights: its state dict, or another of the same network, on any device; wrappers' prefixes are left out.
        classes: their names, in the order of the logits.
        preprocessing: what the images went through, as `timm.data.resolve_data_config` says it (default: the model's own).
        timm_names: write a TNT under timm's own name for it, so that it loads without this package.

    Raises:
        UserError: a file cannot be written, the preprocessing is not the model's, or timm has no equal network.
        ValueError: the weights are another network's.
    """
    model, weights = unwrap_model(model), plain_names(weights)
    problems = checkpoints.differences(weights, plain_names(model.state_dict()))
    if problems:
        raise ValueError(f"weights of another network: {'; '.join(problems)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {one_line(error)}") from None
    config = config_text(model, classes, preprocessing, timm_names, scratch=folder)
    write_weights(folder / WEIGHTS, weights)
    files.replace_text(folder / CONFIG, config)


def plain_names(weights: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Weights by the names of the bare network; torch.compile puts its prefix in front of any part that it wraps."""
    return clean_state_dict({name.replace("_orig_mod.", ""): value for name, value in weights.items()})


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a .safetensors file, with the prefixes of wrappers left out, and read it back.

    Raises:
        UserError: it cannot be written; the old one is still whole.
    """
    plain = {  # safetensors takes neither views of other tensors nor other memory layouts
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in plain_names(weights).items()
    }
    content = safetensors.torch.save(plain, metadata={"format": "pt"})

    def check(written: Path) -> None:
        if written.read_bytes() != content:
            raise OSError("read back, it is not what was written")

    files.replace(path, lambda file: file.write(content), check)


def config_text(
    model: nn.Module,
    classes: Optional[Sequence[str]] = None,
    preprocessing: Optional[Mapping[str, Any]] = None,
    timm_names: bool = False,
    scratch: Optional[Path] = None,
) -> str:
    """What config.json says of a model: its name and arguments, classes and preprocessing.

    Args:
        model, classes, preprocessing, timm_names: as of `write_model_folder`.
        scratch: folder for a file that is gone afterwards, since timm writes one (default: the system's).

    Raises:
        UserError: the preprocessing is not the model's, an argument fits into no JSON, or timm has no equal network.
    """
    model = unwrap_model(model)
    more = {"label_names": list(classes)} if classes else {}
    try:
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".config-") as inside:
            path = Path(inside, CONFIG)
            save_config_for_hf(model, str(path), model_config=more, data_config=dict(preprocessing or {}))
            config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{CONFIG}: {one_line(error)}") from None
    if timm_names and isinstance(model, TNT):
        name, arguments = config["architecture"], config["model_args"]
        config["architecture"], config["model_args"] = _equal_in_timm(model, name, arguments)
    return json.dumps(config, indent=2) + "\n"


def _equal_in_timm(model: TNT, name: str, arguments: Mapping[str, Any]) -> Tuple[str, Dict[str, Any]]:
    """timm's name for a TNT of ours, and the arguments that make them equal."""
    if name not in VARIANTS:
        raise UserError(f"timm names: {name} has no equal in timm; leave --timm-names out")
    arguments = {**VARIANTS[name], **arguments}
    ours, theirs = inspect.signature(TNT).parameters, inspect.signature(TimmTNT).parameters
    for key, value in arguments.items():
        if key not in theirs and value != ours[key].default:
            raise UserError(f"timm names: {name} with {key}={value} has no equal in timm; leave --timm-names out")
    arguments = {key: value for key, value in arguments.items() if key in theirs}
    equal = "tnt_b_patch16_224" if name.startswith("tnt_b") else "tnt_s_patch16_224"
    parameters = timm.create_model(equal, **arguments, device="meta").state_dict()
    problems = checkpoints.differences(model.state_dict(), parameters)
    if problems:  # as with an mlp_ratio, which timm keeps from the inner MLP
        problem = "; ".join(problems)
        raise UserError(f"timm names: {name} has no equal in timm ({problem}); leave --timm-names out")
    return equal, arguments
