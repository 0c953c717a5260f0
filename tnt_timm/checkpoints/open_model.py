"""Open the model that a person names: one way from what is typed to a network with its weights and preprocessing.

`read_source` finds and reads what is named, `load` creates the network and gives it the weights, `open_model` does both.
"""

import logging
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import timm
import torch
from timm.data import resolve_data_config
from timm.models._hub import load_model_config_from_hf
from torch import Tensor, nn

import tnt_timm  # noqa: F401  (registers the models)
from tnt_timm.checkpoints import choose_weights, description, file_format
from tnt_timm.checkpoints.description import Description
from tnt_timm.checkpoints.run_settings import run_settings
from tnt_timm.errors import ConfigError, UserError, one_line
from tnt_timm.export.folder import CONFIG, WEIGHTS
from tnt_timm.models.convert_weights import differences
from tnt_timm.settings import command_line, config

_logger = logging.getLogger(__name__)
LIMIT = 600  # characters of timm's messages: the one on published weights says how to get them
NOTHING: Mapping[str, Any] = MappingProxyType({})
FOLDER, HUB = "local-dir:", ("hf-hub:", "hf_hub:")
ANOTHER = "weights of another architecture"


class Source(NamedTuple):
    """What a person named: an architecture, and the content of the file with its weights, if there is one."""

    place: str  # the file, or the name as typed
    described: Description  # by the file; of a name, only the name
    state: Optional[Mapping[str, Any]] = None
    pretrained: bool = False  # there is no file, but there are published weights

    def settings(self, given: Mapping[str, Any] = NOTHING) -> Dict[str, Any]:
        """Return the settings for validation in the file, except those that are given, checked."""
        return run_settings((self.state or {}).get("config"), self.place, given)


class Opened(NamedTuple):
    """A network, and what its file says about it."""

    model: nn.Module
    name: str  # timm's, of the architecture
    classes: Optional[List[str]] = None
    preprocessing: Mapping[str, Any] = NOTHING  # what differs from the architecture's
    arguments: Mapping[str, Any] = NOTHING  # that recreate the architecture
    trained: bool = True
    new_head: bool = False  # the file has no head that fits
    source: Optional[Source] = None

    def data_config(self, img_size: Optional[int] = None, **given: Any) -> Dict[str, Any]:
        """Return input size, normalization, resize and crop as `timm.data.resolve_data_config` does.

        Args:
            img_size: edge of the square input in pixels (default: the network's own).
            given: crop_pct, mean, std, interpolation; what is None or "" is the network's own.

        Raises:
            UserError: the network does not take RGB images.
        """
        values = {**self.preprocessing, **{key: value for key, value in given.items() if value not in (None, "")}}
        channels = {values.get("input_size", (3,))[0], getattr(self.model, "in_chans", 3)} - {3}
        if channels:
            raise UserError(
                f"in_chans: {self.name} takes images of {channels.pop()} channels, but images are read as RGB"
            )
        if img_size is not None:
            values = {**values, "input_size": None, "img_size": img_size}
        return resolve_data_config(values, model=self.model)


def open_model(
    given: str,
    model: str = "",
    arguments: Mapping[str, Any] = NOTHING,
    pretrained: bool = False,
    untrained: bool = False,
) -> Opened:
    """Create the model that a command line names, with its weights. See `read_source` and `load`."""
    return load(read_source(given, model, pretrained, untrained), arguments)


def read_source(given: str, model: str = "", pretrained: bool = False, untrained: bool = False) -> Source:
    """Find what a person names, and read it.

    Args:
        given: a run folder, a checkpoint of this project, a file of weights for `model`, a folder that timm reads, or a
            model's name.
        model: the name of the model that a file of weights belongs to.
        pretrained: if `given` is a name, its published weights are wanted.
        untrained: if `given` is a name, random weights are acceptable.

    Raises:
        UserError: there is no such model, its file cannot be read, or says what a file may not say.
    """
    path = Path(given.removeprefix(FOLDER))
    if path.exists() and pretrained and not given.startswith(FOLDER):
        raise ConfigError(f"command line: pretrained: {given} has weights of its own; leave the setting out")
    if given.startswith(FOLDER) or (path.is_dir() and not file_format.in_folder(path)):
        if not (path / CONFIG).is_file():
            raise UserError(f"{path}: neither a run folder (no {file_format.BEST}) nor timm's (no {CONFIG})")
        described, path = description.of_folder(path), weights_file(given)
        state: Mapping[str, Any] = file_format.read(path)
    elif path.exists():
        path = weights_file(given)
        state = file_format.read(path)
        if not model and "arch" not in state:
            raise UserError(f"{path}: does not say what model it is; pass --model NAME")
        if not model:
            described = description.of_checkpoint(state, str(path))
    else:
        return _by_name(given, model, pretrained, untrained)
    if model:
        config.check_model_name(model, "command line")
        described = Description(model, {}, description.classes_of(state.get("classes"), str(path)), {})
    return Source(str(path), described, state)


def read_named(name: str, pretrained: bool) -> Source:
    """Do the same for a setting that is always a model's name, whatever files there are of that name."""
    return read_source(name) if name.startswith(FOLDER) else _by_name(name, "", pretrained, untrained=True)


def _by_name(name: str, model: str, pretrained: bool, untrained: bool) -> Source:
    is_name = name.startswith(HUB) or timm.is_model(name.split(".")[0])
    if model and is_name:
        raise ConfigError(f"command line: model: {model}: {name} is no file of weights for it")
    if model:
        raise UserError(f"{name}: no such checkpoint")
    if not is_name:
        hint = command_line.nearest(name, timm.list_models())
        raise ConfigError(f"command line: {name}: no such file, folder or model{hint}")
    pretrained = pretrained or name.startswith(HUB)
    if not (pretrained or untrained):
        raise UserError(f"{name}: has no weights; pass --pretrained for the published ones, or a file with --model")
    return Source(name, Description(name, {}, None, {}), pretrained=pretrained)


def weights_file(given: str) -> Path:
    """Return the file of weights that a path means: itself, or that of a run folder or of timm's folder.

    Raise UserError if the folder has none.
    """
    path = Path(given.removeprefix(FOLDER))
    if not path.is_dir():
        return path
    found = None if given.startswith(FOLDER) else file_format.in_folder(path)
    names = (WEIGHTS, "pytorch_model.bin", "pytorch_model.pth", "model.pth")  # as timm looks for them
    found = found or next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise UserError(
            f"{path}: no {file_format.BEST} in this folder, and no {WEIGHTS}; give a run folder or a checkpoint"
        )
    return found


def timm_model(
    name: str, arguments: Mapping[str, Any], more: Mapping[str, Any] = NOTHING
) -> Tuple[nn.Module, Dict[str, Any]]:
    """Call `timm.create_model`; return the model, and the arguments that it accepted.

    An `img_size` is dropped if the network accepts any size and has no such argument.

    Args:
        name: of the model.
        arguments: of the architecture.
        more: arguments of training and loading.

    Raises:
        UserError: timm refuses.
    """
    try:
        if name.startswith(FOLDER):
            description.of_folder(Path(name.removeprefix(FOLDER)))  # refuses what timm would believe
        elif name.startswith(HUB):
            description.of_config(_hub_config(name), name)
        model, accepted = _create(name, arguments, more)
        # a folder's own arguments belong to those that recreate the model by its architecture's name
        return model, {**(getattr(model, "pretrained_model_args", {}) if ":" in name else {}), **accepted}
    except TypeError as error:
        raise UserError(f"model_kwargs: {name}: {one_line(error)}") from None
    except (ValueError, AssertionError, RuntimeError, OSError, ArithmeticError, IndexError) as error:
        raise UserError(f"model: {name}: {one_line(error, LIMIT).removeprefix(f'{name}: ')}") from None


def _hub_config(name: str) -> Dict[str, Any]:
    try:
        cfg, architecture, arguments = load_model_config_from_hf(name.partition(":")[2])
        return {**cfg, "architecture": architecture, "model_args": arguments}
    except Exception as error:  # of the Hub, of the network, or of another library's config.json
        raise UserError(f"model: {name}: {one_line(error, LIMIT)}; is it a model of timm's?") from None


def _create(name: str, arguments: Mapping[str, Any], more: Mapping[str, Any]) -> Tuple[nn.Module, Dict[str, Any]]:
    try:
        return timm.create_model(name, **arguments, **more), dict(arguments)
    except TypeError as error:
        if "'img_size'" not in str(error) or "img_size" not in arguments:
            raise
        return _create(name, {key: value for key, value in arguments.items() if key != "img_size"}, more)


def load(
    source: Source,
    wanted: Mapping[str, Any] = NOTHING,
    more: Mapping[str, Any] = NOTHING,
    classes: Optional[Sequence[str]] = None,
    use_ema: Optional[bool] = None,
    exact: bool = False,
) -> Opened:
    """Create a network with the weights of a source.

    Weights that fit are loaded as they are. Others are adapted by timm like published ones: names, positions, channels. The
    head is kept if it has the right size and its classes have the right names. Otherwise it is new. Everything else must be
    in the file and fit: timm alone does not check that if the head is new.

    Args:
        source: of `read_source`.
        wanted: arguments of the model, e.g. img_size. They override the file's.
        more: arguments of training.
        classes: names of the dataset's classes, if a head for others must be replaced.
        use_ema: choose the averaged or the raw weights (default: those that training selected, else EMA if there are any).
        exact: refuse weights that have to be adapted.

    Raises:
        UserError: arguments that the model does not accept, or weights that are missing or do not fit.
    """
    name, arguments = source.described.name, {**source.described.arguments, **wanted}
    about = dict(classes=source.described.classes, preprocessing=_preprocessing(source, wanted), source=source)
    if source.state is None:
        model, arguments = timm_model(name, arguments, {**more, "pretrained": source.pretrained})
        name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or name
        return Opened(model, name, arguments=arguments, trained=source.pretrained, **about)
    _check_size(source)
    random_state = torch.get_rng_state()
    fresh, arguments = timm_model(name, arguments, more)
    which = {None: "", True: "ema", False: "raw"}[use_ema]
    weights, notice = choose_weights.choose(source.state, fresh.state_dict(), which, source.place)
    head = _head_of(fresh)
    in_file = next((len(weights[key]) for key in head if key in weights and weights[key].ndim), fresh.num_classes)
    if "num_classes" not in arguments and in_file != fresh.num_classes:
        torch.set_rng_state(random_state)
        return load(source, {**wanted, "num_classes": in_file}, more, classes, use_ema, exact)
    if notice:
        _logger.info("%s: %s", source.place, notice)
    if others := other_classes(source.described.classes, classes):
        weights = {key: value for key, value in weights.items() if key not in head}
        _logger.info("%s: its head is for other classes (%s), so a new one is trained", source.place, others)
    problems = differences(weights, fresh.state_dict())
    if not problems:
        fresh.load_state_dict(weights)
        return Opened(fresh, name, arguments=arguments, **about)
    adapting = source.place, name, {**arguments, **more}, fresh, weights, random_state
    if exact:
        raise UserError(f"{source.place}: {ANOTHER}: {'; '.join(problems)}{_hint_to_adapt(*adapting)}")
    model, new_head = _adapted(*adapting)
    return Opened(model, name, arguments=arguments, new_head=new_head, **about)


def _preprocessing(source: Source, wanted: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the file's preprocessing, for the image size that is wanted."""
    size = wanted.get("img_size")
    if size is None:
        return dict(source.described.preprocessing)
    channels = {**source.described.arguments, **wanted}.get("in_chans", 3)
    sides = (size, size) if isinstance(size, int) else size
    return {**source.described.preprocessing, "input_size": (channels, *sides)}


def _check_size(source: Source) -> None:
    name, arguments = source.described.name, source.described.arguments
    if arguments:
        tensors = [tensor for _, table in choose_weights.tables(source.state) for tensor in table.values()]
        description.check_size(lambda: _create(name, arguments, {}), tensors, source.place)


def _adapted(
    place: str,
    name: str,
    arguments: Mapping[str, Any],
    fresh: nn.Module,
    weights: Mapping[str, Tensor],
    random_state: Tensor,
) -> Tuple[nn.Module, bool]:
    """Return a model with weights that timm adapts, and whether its head, or one of its two heads, is new."""
    head = _head_of(fresh)

    def create(num_classes: int) -> nn.Module:
        cfg = dict(state_dict=weights, file=place, source=None, num_classes=num_classes, label_offset=None)
        torch.set_rng_state(random_state)  # a new head gets the same random weights each time
        return timm.create_model(name, **arguments, pretrained=True, pretrained_cfg_overlay=cfg)

    try:
        try:
            model = create(fresh.num_classes)  # timm loads strictly if model and file claim the same number of classes
        except RuntimeError as error:
            misfits = _misfits(error)
            if not misfits or misfits - head.keys():
                raise
            model = create(-1)  # with another number timm leaves out the head; everything else is known to fit
            _logger.info("%s: adapted to %s with a new head of %d classes", place, name, model.num_classes)
    except Exception as error:  # a model's own filter may fail in any way on weights that are not its own
        raise UserError(f"{place}: {_why_not(error, head).removeprefix(f'{place}: ')}") from None
    model.pretrained_cfg.pop("state_dict", None)  # or timm would keep the weights of the file in memory
    loaded = model.state_dict()
    return model, any(torch.equal(loaded[key], value) for key, value in head.items() if value.ndim > 1)


def _hint_to_adapt(*adapting: Any) -> str:
    logging.disable()  # the attempt would log what becomes of the weights
    try:
        _adapted(*adapting)
    except UserError:
        return ""
    finally:
        logging.disable(logging.NOTSET)
    return "; to adapt head and positions, pass it as --pretrained-path instead"


def _head_of(model: nn.Module) -> Dict[str, Tensor]:
    """Return the tensors of the classifier, or of both if there are two."""
    names = model.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    return {key: value for key, value in model.state_dict().items() if key.startswith(prefixes)}


def _misfits(error: Exception) -> Set[str]:
    """Return the tensors that torch's strict loading complains about: missing, unknown, or of another shape."""
    return {quoted or named for quoted, named in re.findall(r'"([^"]+)"|size mismatch for ([^:]+):', str(error))}


def _why_not(error: Exception, head: Mapping[str, Tensor]) -> str:
    misfits = sorted(_misfits(error) - head.keys()) if isinstance(error, RuntimeError) else []
    if not misfits:
        return one_line(error, LIMIT)
    more = f" and {len(misfits) - 3} more tensors" if len(misfits) > 3 else ""
    return f"{ANOTHER}: missing, unknown or of another shape: {', '.join(misfits[:3])}{more}"


def other_classes(ours: Optional[Sequence[str]], theirs: Optional[Sequence[str]]) -> str:
    """Return the first names of a checkpoint's classes, if they are known and differ from the dataset's."""
    return ", ".join([*ours[:3], "..."]) if ours and theirs is not None and list(ours) != list(theirs) else ""
