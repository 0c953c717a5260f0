"""What a checkpoint or a folder says of its network, checked, because it may come from anyone: SECURITY.md lists the rules.

A file can name an architecture of the registry and give its own arguments, class names and preprocessing. It cannot name
another file, an address or a program, nor ask for a network that is larger than its weights.
"""

import contextlib
import inspect
import json
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Literal,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from timm.models import build_model_with_cfg
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from tnt_timm.errors import UserError, one_line
from tnt_timm.settings.schema import Filter

LARGEST_NUMBER = 1 << 20  # of an argument
LARGEST_SIDE = 4096  # pixels
# Arguments of timm's factory: they name files and addresses, or change what is built
FACTORY = {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
FACTORY |= {"features_only", "feature_cls", "out_indices", "pruned", "device", "dtype"}
SPARE_ELEMENTS, SPARE_TENSORS = 1 << 25, 1000  # what a network may have beyond its file: buffers, or a head

Number = Annotated[float, Field(gt=-1e3, lt=1e3)]
Positive = Annotated[float, Field(gt=0, lt=1e3)]
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Channels = Annotated[int, Field(ge=1, le=16)]


class _Preprocessing(BaseModel):
    """The keys of timm's pretrained_cfg that concern images; others are ignored."""

    model_config = ConfigDict(allow_inf_nan=False)
    input_size: Optional[Tuple[Channels, Side, Side]] = None
    interpolation: Optional[Filter] = None
    crop_pct: Optional[Annotated[float, Field(gt=0.05, le=2)]] = None
    crop_mode: Optional[Literal["center", "squash", "border"]] = None
    mean: Optional[Annotated[List[Number], Field(min_length=1, max_length=16)]] = None
    std: Optional[Annotated[List[Positive], Field(min_length=1, max_length=16)]] = None


class Description(NamedTuple):
    """A network as its file describes it."""

    name: str  # timm's, of the architecture
    arguments: Dict[str, Any]
    classes: Optional[List[str]]
    preprocessing: Dict[str, Any]


def of_checkpoint(state: Mapping[str, Any], place: str) -> Description:
    """Return the description in a checkpoint of this project, or of timm.

    Raises:
        UserError: it says something that a file cannot be trusted with.
    """
    preprocessing = preprocessing_of(state.get("preprocessing"), place)
    config = state.get("config")
    size = config.get("img_size") if isinstance(config, Mapping) else None
    if not preprocessing and size is not None:
        preprocessing = preprocessing_of({"input_size": [3, size, size]}, place)
    arguments = arguments_of(state.get("model_kwargs"), f"{place}: model_kwargs")
    return Description(name_of(state["arch"], place), arguments, classes_of(state.get("classes"), place), preprocessing)


def of_folder(path: Path) -> Description:
    """Return the description in timm's config.json of a folder.

    Raises:
        UserError: there is no such file, or it says something that a file cannot be trusted with.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config = {**config.get("pretrained_cfg", {}), **config}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path / 'config.json'}: not a description of a model: {one_line(error)}") from None
    return of_config(config, str(path / "config.json"))


def of_config(config: Mapping[str, Any], place: str) -> Description:
    """Do the same for the content of config.json, with its pretrained_cfg merged into it."""
    arguments = {
        "num_classes": config.get("num_classes"),
        **arguments_of(config.get("model_args"), f"{place}: model_args"),
    }
    arguments = arguments_of({key: value for key, value in arguments.items() if value is not None}, place)
    classes = classes_of(config.get("label_names") or config.get("labels"), place)
    return Description(name_of(config.get("architecture"), place), arguments, classes, preprocessing_of(config, place))


def name_of(name: object, place: str) -> str:
    """Return an architecture's name, if timm's registry has it."""
    if not isinstance(name, str) or not name.isprintable() or not timm.is_model(name.split(".")[0]):
        raise UserError(
            f"{place}: its architecture {str(name)[:80]!r} is none of timm's registry, which is all that a file may name; "
            "pass --model NAME"
        )
    return name


def arguments_of(arguments: object, place: str) -> Dict[str, Any]:
    """Return arguments of a model: plain values of moderate size, and none of the factory's."""
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise UserError(f"{place}: not arguments by name; pass --model NAME with the weights")
    for key, value in arguments.items():
        if key in FACTORY:
            raise UserError(f"{place}: {key}: a file may not set this argument; pass --model NAME with the weights")
        if not _is_plain(value):
            raise UserError(
                f"{place}: {key[:80]}: not a plain value of moderate size; pass --model NAME with the weights"
            )
    return dict(arguments)


def _is_plain(value: object, depth: int = 0) -> bool:
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, (int, float)):
        return abs(value) <= LARGEST_NUMBER
    if isinstance(value, str):
        return len(value) <= 200 and value.isprintable()
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    return (
        isinstance(value, (list, tuple))
        and len(value) <= 1000
        and depth < 3
        and all(_is_plain(v, depth + 1) for v in value)
    )


def classes_of(classes: object, place: str) -> Optional[List[str]]:
    """Return names of classes. They may hold any character: `console` escapes what a terminal would obey."""
    if classes is None:
        return None
    names = classes if isinstance(classes, (list, tuple)) else [None]
    if not all(isinstance(name, str) and len(name) <= 1000 for name in names):
        raise UserError(f"{place}: classes: expected a list of names; use another copy")
    return list(names)


def preprocessing_of(values: object, place: str) -> Dict[str, Any]:
    """Return the preprocessing among values, each in range."""
    if values is None:
        return {}
    known = values if isinstance(values, Mapping) else {"input_size": values}
    try:
        return _Preprocessing(**{key: known[key] for key in _Preprocessing.model_fields if key in known}).model_dump(
            exclude_none=True
        )
    except ValidationError as error:
        mistake = error.errors()[0]
        raise UserError(f"{place}: preprocessing: {mistake['loc'][0]}: {mistake['msg']}; use another copy") from None


def check_size(create: Callable[[], nn.Module], tensors: Sequence[Tensor], place: str) -> None:
    """Create a network without memory for it, and stop as soon as it is larger than its file.

    Args:
        create: creates it. Other errors are left to the caller, who creates it once more in earnest.
        tensors: all of the file.
        place: name of the file in the error.

    Raises:
        UserError: the network is larger.
    """
    with _no_larger_than(tensors, place), torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                create()
        except UserError:
            raise
        except Exception:  # some networks compute with values when they are created; arguments may be wrong
            with contextlib.suppress(TypeError, ValueError, AssertionError, RuntimeError):
                create()


@contextlib.contextmanager
def _no_larger_than(tensors: Sequence[Tensor], place: str) -> Iterator[None]:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    elements, count = sum(storages.values()) + SPARE_ELEMENTS, 2 * len(tensors) + SPARE_TENSORS

    def subtract(module: nn.Module, name: str, value: Optional[Tensor]) -> None:
        nonlocal elements, count
        if value is not None:
            elements, count = elements - value.numel(), count - 1
        if elements < 0 or count < 0:
            raise UserError(f"{place}: describes a network that is larger than the file; pass --model NAME")

    hooks = register_module_parameter_registration_hook(subtract), register_module_buffer_registration_hook(subtract)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
