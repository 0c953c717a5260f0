"""YAML files and the command line become one frozen, validated object. Nobody else reads YAML.

Order: defaults < the file that `base:` names < the file of `--config` < command line. Each key is replaced whole (lists
and dicts too). Every mistake is a ConfigError of one line that names the file or flag, the key, the value and the mend.
"""

import importlib.util
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type, TypeVar

from pydantic import BaseModel, ValidationError

from tnt_timm.errors import ConfigError, one_line
from tnt_timm.settings import command_line, yaml_file
from tnt_timm.settings.schema import Distillation, TrainConfig
from tnt_timm.settings.timm_keys import TIMM_KEYS_LEFT_OUT, TIMM_KEYS_WITHOUT_MEANING

GROUPS = {name: field.annotation for name, field in TrainConfig.model_fields.items()}
GROUP_OF = {key: name for name, group in GROUPS.items() for key in group.model_fields}
FIELDS = {key: field for group in GROUPS.values() for key, field in group.model_fields.items()}

DESCRIPTION = """Train TNT, or any model of timm, for image classification. Settings come from a YAML file and from flags of
the same names; flags win. Run the same command again to continue an interrupted run."""
ALIASES = {"batch_size": ["-b"], "validation_batch_size": ["-vb"], "workers": ["-j"], "decay_rate": ["--dr"]}
BARE_VALUES = {"torchcompile": "inductor"}
Own = TypeVar("Own", bound=BaseModel)  # the settings of one command


class Resolved(NamedTuple):
    config: TrainConfig
    notices: List[str]  # what was read but has no meaning here
    print_only: bool  # --print-config


def resolve(argv: Sequence[str]) -> Resolved:
    """The config that a command line means.

    Raises:
        ConfigError: any mistake in it or in the files that it names.
        SystemExit: after printing --help.
    """
    sections = {group.__doc__: group.model_fields for group in GROUPS.values()}
    parser = command_line.build_parser(sections, DESCRIPTION, ALIASES, BARE_VALUES)
    parser.add_argument("positional_dir", metavar="DIR", nargs="?", help="the data set's folder, as --data-dir")
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file of settings")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as YAML and exit")
    parser.add_argument("--repeated-aug", action="store_const", const=3, help="the official name of --aug-repeats 3")
    given = command_line.parse(parser, argv)

    config_path = given.pop("config", None)
    print_only = given.pop("print_config", False)
    folder = given.pop("positional_dir", None)
    if folder is not None:
        if folder.lower() in ("true", "false"):
            raise ConfigError(f"command line: {folder!r}: a switch takes no value; write --amp or --no-amp")
        given.setdefault("data_dir", folder)
    if "repeated_aug" in given:
        given.setdefault("aug_repeats", given.pop("repeated_aug"))

    settings: Dict[str, Any] = {}
    sources: Dict[str, str] = {}
    for source, layer in [*(_files(Path(config_path)) if config_path is not None else []), ("command line", given)]:
        settings.update(layer)
        sources.update(dict.fromkeys(layer, source))
    settings, notices = _without_timm_only_keys(settings, sources)
    settings.setdefault("experiment", Path(config_path).stem if config_path else settings.get("model", "tnt_s"))
    config = validate(settings, sources)
    check_model_name(config.network.model, sources.get("model", "command line"))
    teacher = config.distillation.kd_model_name
    if teacher:
        check_model_name(teacher, sources.get("kd_model_name", "command line"), "kd_model_name")
    else:
        notices += _settings_of_no_teacher(config.distillation, sources)
    _check_optimizer_name(config.optimizer.opt, sources.get("opt", "command line"))
    if config.run.log_tensorboard and importlib.util.find_spec("tensorboard") is None:
        where = _where(sources, "log_tensorboard")
        raise ConfigError(f"{where}log_tensorboard: tensorboard is not installed; pip install 'tnt-timm[tensorboard]'")
    return Resolved(config, notices, print_only)


def _files(path: Path, seen: Tuple[Path, ...] = ()) -> List[Tuple[str, Dict[str, Any]]]:
    """A config file after the files that it is based on."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base: the file is based on itself")
    layer = yaml_file.read_mapping(path)
    base = layer.pop("base", None)
    if base is None:
        return [(str(path), layer)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: {base!r}: expected the path of one YAML file")
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
            notices.append(f"{sources[key]}: {key} is timm's and has no meaning here")
        elif key in TIMM_KEYS_LEFT_OUT:
            if value not in TIMM_KEYS_LEFT_OUT[key] and value not in ("", [], {}):
                raise ConfigError(f"{sources[key]}: {key}: {value!r}: timm's setting is not available here; remove it")
        else:
            kept[key] = value
    return kept, notices


def validate(settings: Mapping[str, Any], sources: Optional[Mapping[str, str]] = None) -> TrainConfig:
    """A TrainConfig from flat settings; `sources` says for the error message where each one was given.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of bounds, or settings that do not fit together.
    """
    sources = sources or {}
    grouped: Dict[str, Dict[str, Any]] = {name: {} for name in GROUPS}
    for key, value in settings.items():
        if key not in GROUP_OF:
            raise ConfigError(f"{_where(sources, key)}{key}: no such setting{command_line.nearest(key, GROUP_OF)}")
        grouped[GROUP_OF[key]][key] = value
    try:
        return TrainConfig(**grouped)
    except ValidationError as error:
        raise ConfigError(first_mistake(error, sources)) from None


def first_mistake(error: ValidationError, sources: Mapping[str, str]) -> str:
    """The first thing that pydantic found, as one line: where, which key, what was given, what was expected."""
    mistake = error.errors()[0]
    if "error" in mistake.get("ctx", {}):  # a check over several settings, which names them itself
        text = one_line(mistake["ctx"]["error"])
        return _where(sources, text.split(":")[0]) + text
    place = mistake["loc"][1:] if mistake["loc"][0] in GROUPS else mistake["loc"]
    key, *inside = place
    expected = mistake["msg"].replace("Input should be ", "").replace("valid integer", "whole number")
    expected = expected.replace("a valid boolean", "true or false, without quotes").replace("valid ", "")
    within = "".join(f"[{part}]" for part in inside)
    return f"{_where(sources, str(key))}{key}{within}: {mistake['input']!r}: expected {expected}"


def own_settings(settings: Type[Own], given: Mapping[str, Any]) -> Own:
    """A command's own settings, checked, from what its command line gives.

    Raises:
        ConfigError: the first mistake among them.
    """
    try:
        return settings(**given)
    except ValidationError as error:
        raise ConfigError(first_mistake(error, dict.fromkeys(given, "command line"))) from None


def _where(sources: Mapping[str, str], key: str) -> str:
    return f"{sources[key]}: " if key in sources else ""


def _settings_of_no_teacher(distillation: Distillation, sources: Mapping[str, str]) -> List[str]:
    return [
        f"{sources[key]}: {key} has no effect without a teacher (kd_model_name)"
        for key, field in Distillation.model_fields.items()
        if key in sources and getattr(distillation, key) not in (field.default, "")
    ]


def check_model_name(name: str, source: str, key: str = "model") -> None:
    import timm

    import tnt_timm  # noqa: F401  (registers ours)

    if timm.is_model(name.split(".")[0]) or name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    raise ConfigError(f"{source}: {key}: {name!r}: no such model{command_line.nearest(name, timm.list_models())}")


def _check_optimizer_name(name: str, source: str) -> None:
    from timm.optim import list_optimizers

    known = list_optimizers()
    if name.lower() not in known:
        raise ConfigError(f"{source}: opt: {name!r}: no such optimizer{command_line.nearest(name, known)}")


def flat(config: TrainConfig) -> Dict[str, Any]:
    """The settings as one flat dict, in the order of the schema."""
    return {key: value for group in config.model_dump().values() for key, value in group.items()}


def to_yaml(config: TrainConfig) -> str:
    """YAML that resolves to the same config when given back."""
    parts = []
    for name, group in GROUPS.items():
        parts.append(f"# {group.__doc__.strip()}\n{yaml_file.dump(getattr(config, name).model_dump())}")
    return "\n".join(parts)
