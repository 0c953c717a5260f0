"""A command line made from a schema: one flag per field, grouped, with the errors of a good editor.

A value on the command line is what would stand after `key: ` in a YAML file, so both are checked by the same schema.
"""

import argparse
import difflib
import re
import typing
from types import MappingProxyType
from typing import Any, Dict, Iterable, Mapping, Sequence

from pydantic.fields import FieldInfo

from tnt_timm.errors import ConfigError
from tnt_timm.settings.yaml_file import parse_value


def nearest(name: str, known: Iterable[str]) -> str:
    """`; perhaps you meant ...` where something known is close to the name, else nothing."""
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; perhaps you meant {' or '.join(found)}" if found else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"command line: {message}")


def build_parser(
    sections: Mapping[str, Mapping[str, FieldInfo]],
    description: str,
    aliases: Mapping[str, Sequence[str]],
    bare_values: Mapping[str, str] = MappingProxyType({}),
    defaults: bool = True,
) -> argparse.ArgumentParser:
    """A parser with one flag per field.

    Args:
        sections: title -> fields of pydantic models; a field's description is its help.
        aliases: more names of a field's flag, as `-b`.
        bare_values: fields whose flag may stand alone, and what it then means.
        defaults: whether the help shows the fields' defaults.
    """
    parser = _Parser(
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE] [DIR] [--KEY VALUE ...]",
    )
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse before Python 3.14 takes -1e-3 for a flag
    for title, fields in sections.items():
        section = parser.add_argument_group(title)
        for name, field in fields.items():
            flags = ["--" + name.replace("_", "-"), *aliases.get(name, ())]
            options = _how_to_parse(name, field, bare_values)
            if defaults and field.default not in (None, "", {}, []):
                options["help"] += f" [{field.default}]".replace("%", "%%")
            section.add_argument(*flags, dest=name, **options)
    return parser


def _how_to_parse(name: str, field: FieldInfo, bare_values: Mapping[str, str]) -> Dict[str, Any]:
    kind = _without_none(field.annotation)
    options: Dict[str, Any] = {"help": (field.description or "").replace("%", "%%")}
    if kind is bool:
        if name.startswith("no_"):  # argparse would read --no-aug as the opposite of --aug
            return {**options, "action": "store_true"}
        return {**options, "action": argparse.BooleanOptionalAction}
    options["metavar"] = "|".join(typing.get_args(kind)) if typing.get_origin(kind) is typing.Literal else name.upper()
    if name in bare_values:
        return {**options, "nargs": "?", "const": bare_values[name]}
    origin = typing.get_origin(kind)
    if origin is list:
        text_items = typing.get_args(kind)[0] is str
        return {**options, "nargs": "+", "type": str if text_items else parse_value}
    if origin is dict:
        return {**options, "nargs": "*", "action": _NameValuePairs}
    if kind is str or origin is typing.Literal:
        return options
    return {**options, "type": parse_value}


def _without_none(annotation: Any) -> Any:
    args = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
    return args[0] if typing.get_origin(annotation) is typing.Union and len(args) == 1 else annotation


class _NameValuePairs(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for item in values:
            name, equals, value = item.partition("=")
            if not equals or not name:
                raise ConfigError(f"command line: {option_string}: {item!r}: expected name=value")
            if name in pairs:
                raise ConfigError(f"command line: {option_string}: {name} is given twice")
            pairs[name] = parse_value(value)
        setattr(namespace, self.dest, pairs)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Dict[str, Any]:
    """The settings that a command line gives, and only those.

    Raises:
        ConfigError: an unknown flag (with the nearest known ones), a missing value, or an argument too many.
    """
    argv = [_hyphens(arg) for arg in argv]
    given, unknown = parser.parse_known_args(argv)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for arg in unknown:
        if arg.startswith("-"):
            flag = arg.split("=")[0]
            raise ConfigError(f"command line: {flag}: no such setting{nearest(flag, flags)}")
    if unknown:
        raise ConfigError(f"command line: {unknown[0]!r} belongs to no setting")
    return vars(given)


def _hyphens(arg: str) -> str:
    """timm's users write --batch_size as well as --batch-size."""
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else arg
