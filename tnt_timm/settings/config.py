"""Turn YAML files and the command line into one frozen, validated object.

Precedence: defaults < the file named by `base:` < the file of `--config` < command line. Each key is replaced as a whole, lists
and dicts too. Every mistake is a ConfigError of one line: the file or flag, the key, the value and what was expected.
"""

import importlib.util
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type, TypeVar

from pydantic import BaseModel, ValidationError

from tnt_timm.errors import ConfigError, one_line
from tnt_timm.settings import command_line, yaml_file
from tnt_timm.settings.command_line import given_as, is_text, setting
from tnt_timm.settings.no_effect import without_effect
from tnt_timm.settings.paths import PathText, expand_at
from tnt_timm.settings.schema import Group, TrainConfig
from tnt_timm.settings.shipped import find_config
from tnt_timm.settings.timm_keys import TIMM_KEYS_LEFT_OUT, TIMM_KEYS_WITHOUT_MEANING

GROUPS = {name: field.annotation for name, field in TrainConfig.model_fields.items()}
GROUP_OF = {key: name for name, group in GROUPS.items() for key in group.model_fields}
FIELDS = {key: field for group in GROUPS.values() for key, field in group.model_fields.items()}
TEXTS = {"base", "data"} | {key for key, field in FIELDS.items() if is_text(field.annotation)}
WORDING = {  # pydantic's -> ours, in this order
    "Input should be ": "",
    "List should have ": "",
    "String should have ": "",
    "String should match": "text that matches",
    " after validation": "",
    "valid integer": "whole number",
    "a valid boolean": "true or false (not yes, no, on or off), without quotes",
    "valid ": "",
}
Own = TypeVar("Own", bound=BaseModel)  # settings of one command


class Arguments(Group):
    """Train TNT, or any timm model, for image classification. Settings come from a YAML file and from flags of the same names;
    flags win. Run the same command again to resume an interrupted run."""

    dir: PathText = setting("", "dataset folder, as --data-dir", positional="DIR")
    config: Optional[PathText] = setting(
        None, "YAML file, or name of a shipped one: tnt_s, finetune/tnt_s_pets", flag="-c"
    )
    print_config: bool = setting(False, "print the resolved settings as YAML and exit")
    repeated_aug: bool = setting(False, "the official script's name for --aug-repeats 3")


class Resolved(NamedTuple):
    config: TrainConfig
    notices: List[str]  # settings without effect
    print_only: bool  # --print-config


def resolve(argv: Sequence[str]) -> Resolved:
    """Return the training config for a command line.

    Raises:
        ConfigError: any mistake on the command line or in the files that it names.
        SystemExit: after printing --help.
    """
    sections = {group.__doc__: group.model_fields for group in GROUPS.values()}
    arguments, given = read_with(Arguments, argv, sections)
    if arguments.dir.lower() in ("true", "false"):
        raise ConfigError(f"command line: {arguments.dir!r}: a switch takes no value; write --amp or --no-amp")
    if arguments.dir:
        given.setdefault("data_dir", arguments.dir)
    if arguments.repeated_aug:
        given.setdefault("aug_repeats", 3)
    path = find_config(arguments.config) if arguments.config is not None else None

    settings: Dict[str, Any] = {}
    sources: Dict[str, str] = {}
    layers = [*(_files(path) if path else []), ("command line", given)]
    for source, layer in layers:
        settings.update(layer)
        sources.update(dict.fromkeys(layer, source))
    settings, notices = _without_timm_only_keys(settings, sources)
    if settings.get("experiment", "") == "":
        name = path.stem if path else str(settings.get("model", "tnt_s"))
        settings["experiment"] = name.rstrip("/").rpartition("/")[2]  # of hf-hub:timm/NAME
    config = validate(settings, sources)
    teacher = config.distillation.kd_model_name
    for key, name in (("model", config.network.model), ("kd_model_name", teacher)):
        if name:
            check_model_name(name, sources.get(key, "command line"), key)
    notices += [
        f"{sources[key]}: {key} has no effect {why}"
        for key, why in without_effect(config)
        if key in sources and not _was_switched_off(key, sources[key], layers)
    ]
    _check_optimizer_name(config.optimizer.opt, sources.get("opt", "command line"))
    if config.run.log_tensorboard and importlib.util.find_spec("tensorboard") is None:
        given = f"{sources['log_tensorboard']}: log_tensorboard"
        raise ConfigError(f"{given}: tensorboard is not installed; pip install 'tnt-timm[tensorboard]'")
    return Resolved(config, notices, arguments.print_config)


def _was_switched_off(key: str, source: str, layers: Sequence[Tuple[str, Mapping[str, Any]]]) -> bool:
    """Return whether a setting has an effect in the file that gives it, so that what came later took it away on purpose."""
    settings: Dict[str, Any] = {}
    for place, layer in layers:
        settings.update(layer)
        if place == source:
            break
    try:
        config = validate(_without_timm_only_keys(settings, dict.fromkeys(settings, source))[0])
    except ConfigError:  # the file alone is not complete
        return True
    return key not in dict(without_effect(config))


def read(settings: Type[Own], argv: Sequence[str]) -> Own:
    """Return a command's settings for its command line. The docstring of their class is the command's description.

    Raises:
        ConfigError: the first mistake on the command line.
        SystemExit: after printing --help.
    """
    return read_with(settings, argv, {})[0]


def read_with(
    settings: Type[Own], argv: Sequence[str], sections: Mapping[str, Mapping[str, Any]], show_defaults: bool = True
) -> Tuple[Own, Dict[str, Any]]:
    """Do the same for a command that takes training settings as well: `sections` has their fields by title.

    Returns:
        The command's settings, and the training settings that the command line gives, not yet validated.
    """
    parser = command_line.build_parser({"settings": settings.model_fields, **sections}, settings.__doc__, show_defaults)
    given = command_line.parse(parser, argv)
    own = {key: given.pop(key) for key in settings.model_fields if key in given}
    return own_settings(settings, own), given


def own_settings(settings: Type[Own], given: Mapping[str, Any]) -> Own:
    """Return a command's settings, validated.

    Raises:
        ConfigError: the first mistake among them.
    """
    try:
        return settings(**given)
    except ValidationError as error:
        mistake = error.errors()[0]
        if mistake["type"] == "missing":
            name = mistake["loc"][0]
            field = settings.model_fields[name]
            positional = given_as(field, "positional")
            remedy = field.description if positional else "--" + name.replace("_", "-")
            raise ConfigError(f"command line: {positional or name}: missing; pass {remedy}") from None
        raise ConfigError(_first_mistake(error, dict.fromkeys(given, "command line"))) from None


def _files(path: Path, seen: Tuple[Path, ...] = ()) -> List[Tuple[str, Dict[str, Any]]]:
    """Return the settings of a config file, after those of the files that it is based on."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base: the file is based on itself")
    layer = yaml_file.read_mapping(path, TEXTS)
    base = layer.pop("base", None)
    if base is None:
        return [(str(path), layer)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: {base!r}: expected the path of one YAML file")
    base = expand_at(f"{path}: base", base)
    if not (path.parent / base).is_file():
        raise ConfigError(f"{path}: base: {path.parent / base}: no such file")
    return [*_files(path.parent / base, (*seen, path.resolve())), (str(path), layer)]


def _without_timm_only_keys(
    settings: Mapping[str, Any], sources: Mapping[str, str]
) -> Tuple[Dict[str, Any], List[str]]:
    kept, notices = {}, []
    for key, value in settings.items():
        if key in ("data", "data_dir"):  # timm saves the argument without a flag as `data`, and then no data_dir
            kept["data_dir"] = value or kept.get("data_dir", "")
        elif key in TIMM_KEYS_WITHOUT_MEANING:
            notices.append(f"{sources[key]}: {key} is a timm setting that has no effect here")
        elif key in TIMM_KEYS_LEFT_OUT:
            if value not in TIMM_KEYS_LEFT_OUT[key] and value not in ("", [], {}):
                raise ConfigError(f"{sources[key]}: {key}: {value!r}: timm's setting is not available here; remove it")
        else:
            kept[key] = value
    return kept, notices


def validate(settings: Mapping[str, Any], sources: Optional[Mapping[str, str]] = None) -> TrainConfig:
    """Return a TrainConfig for flat settings; `sources` tells the error message where each one was given.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of bounds, or settings that do not fit together.
    """
    sources = sources or {}
    grouped: Dict[str, Dict[str, Any]] = {name: {} for name in GROUPS}
    for key, value in settings.items():
        if key not in GROUP_OF:
            raise ConfigError(_located(f"{key}: no such setting{command_line.nearest(key, GROUP_OF)}", sources))
        grouped[GROUP_OF[key]][key] = value
    try:
        return TrainConfig(**grouped)
    except ValidationError as error:
        raise ConfigError(_first_mistake(error, sources)) from None


def _first_mistake(error: ValidationError, sources: Mapping[str, str]) -> str:
    """Return the first mistake that pydantic found as one line: where, which key, what was given, what was expected."""
    mistake = error.errors()[0]
    place = mistake["loc"][1:] if mistake["loc"][:1] and mistake["loc"][0] in GROUPS else mistake["loc"]
    name = "".join(f"[{part}]" if isinstance(part, int) else str(part) for part in place)
    if "error" in mistake.get("ctx", {}):  # raised by a validator of ours, which names the key if it looks at several
        text = one_line(mistake["ctx"]["error"])
        return _located(f"{name}: {text}" if name else text, sources)
    expected = mistake["msg"]
    for pydantics, ours in WORDING.items():
        expected = expected.replace(pydantics, ours)
    return _located(f"{name}: {mistake['input']!r}: expected {expected}", sources)


def _located(text: str, sources: Mapping[str, str]) -> str:
    """Put the file or `command line` before a message that begins with a key."""
    key = text.split(":")[0].split("[")[0]
    return f"{sources[key]}: {text}" if key in sources else text


def check_model_name(name: str, source: str, key: str = "model") -> None:
    """Raise ConfigError if timm knows no such model."""
    import timm

    import tnt_timm  # noqa: F401  (registers its models)

    if not timm.is_model(name.split(".")[0]) and not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        raise ConfigError(f"{source}: {key}: {name!r}: no such model{command_line.nearest(name, timm.list_models())}")


def _check_optimizer_name(name: str, source: str) -> None:
    from timm.optim import list_optimizers

    known = list_optimizers()
    if name.lower() not in known:
        raise ConfigError(f"{source}: opt: {name!r}: no such optimizer{command_line.nearest(name, known)}")


def flat(config: TrainConfig) -> Dict[str, Any]:
    """Return the settings as one flat dict, in the order of the schema."""
    return {key: value for group in config.model_dump().values() for key, value in group.items()}


def to_yaml(config: TrainConfig, ascii: bool = False) -> str:
    """Return YAML that resolves to the same config, without other characters than ASCII's if asked."""
    return "\n".join(
        f"# {group.__doc__}\n{yaml_file.dump(dict(getattr(config, name)), ascii)}" for name, group in GROUPS.items()
    )
