"""Turn pydantic fields into command-line flags, and a command line into values for them.

A value is parsed as it would be after `key: ` in a YAML file, so the same schema checks both.
"""

import argparse
import difflib
import re
import typing
from typing import Any, Dict, Iterable, Mapping, Optional, Sequence

from pydantic import Field
from pydantic.fields import FieldInfo

from tnt_timm.errors import ConfigError
from tnt_timm.settings.yaml_file import parse_value


def setting(
    default: Any = ...,
    about: str = "",
    flag: str = "",
    positional: str = "",
    bare: Optional[str] = None,
    **bounds: Any,
) -> Any:
    """Declare a setting: a field of a pydantic model that says how it is given on the command line.

    Args:
        default: its value if it is not given (default: it must be given).
        about: its help.
        flag: another flag, besides `--its-name`.
        positional: its name in the usage line, if it is given without a flag.
        bare: what its flag means without a value.
        bounds: constraints, see pydantic's Field.
    """
    cli = {"flag": flag, "positional": positional, "bare": bare}
    return Field(default, description=about, json_schema_extra=cli, **bounds)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"command line: {message}")


def build_parser(
    sections: Mapping[str, Mapping[str, FieldInfo]], description: str, show_defaults: bool = True
) -> argparse.ArgumentParser:
    """Return a parser for the fields in `sections` (title -> fields); a field's description is its help."""
    parser = _Parser(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse before Python 3.14 takes -1e-3 for a flag
    usage = ["%(prog)s"]
    for title, fields in sections.items():
        section = parser.add_argument_group(title)
        for name, field in fields.items():
            positional, required = given_as(field, "positional"), field.is_required()
            about = field.description or ""
            if show_defaults and not required and field.default not in (None, "", {}, []):
                about += f" [{field.default}]"
            flags = ["--" + name.replace("_", "-"), *filter(None, [given_as(field, "flag")])]
            argument = section.add_argument(
                *([name] if positional else flags),
                **({} if positional else {"dest": name}),
                **_options(name, field),
                help=about.replace("%", "%%"),
            )
            argument.required = False  # pydantic reports what is missing, after a mistyped flag was reported
            if positional:
                several = f" [{positional} ...]" if argument.nargs in ("+", "*") else ""
                usage.append(f"{positional}{several}" if required else f"[{positional}{several}]")
            elif required:
                usage.append(f"{flags[0]} {name.upper()}")
    parser.usage = " ".join([*usage, "[--KEY VALUE ...]"])
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Dict[str, Any]:
    """Return the settings that a command line gives, and only those.

    Raises:
        ConfigError: an unknown flag (the message names the nearest ones), a missing value or a surplus argument.
        SystemExit: after printing --help.
    """
    given, unknown = parser.parse_known_args([_hyphens(arg) for arg in argv])
    for arg in unknown:
        if arg.startswith("-"):
            flag = arg.split("=")[0]
            raise ConfigError(f"command line: {flag}: no such setting{nearest(flag, parser._option_string_actions)}")
    if unknown:
        raise ConfigError(f"command line: {unknown[0]!r}: unexpected argument; give settings as --KEY VALUE")
    return vars(given)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; perhaps you meant ...` if known names are close to the given one, else an empty string."""
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; perhaps you meant {' or '.join(found)}" if found else ""


def given_as(field: FieldInfo, how: str) -> Optional[str]:
    """Return the `flag`, `positional` or `bare` that a setting was declared with."""
    return (field.json_schema_extra or {}).get(how)


def _options(name: str, field: FieldInfo) -> Dict[str, Any]:
    """Return what argparse must know of a field: its number of values and how to convert them."""
    kind = _without_none(field.annotation)
    origin, items = typing.get_origin(kind), typing.get_args(kind)
    if positional := given_as(field, "positional"):
        required, optional = ("+", "*") if origin is list else (None, "?")
        return {"metavar": positional, "nargs": required if field.is_required() else optional}
    if kind is bool:
        # argparse would read --no-aug as the opposite of --aug
        return {"action": "store_true" if name.startswith("no_") else argparse.BooleanOptionalAction}
    metavar = "|".join(filter(None, items)) if origin is typing.Literal else name.upper()
    if bare := given_as(field, "bare"):
        return {"metavar": metavar, "nargs": "?", "const": bare}
    if origin is list:
        return {"metavar": metavar, "nargs": "+", "type": str if is_text(items[0]) else _value}
    if origin is dict:
        return {"metavar": metavar, "nargs": "*", "action": _NameValuePairs}
    return {"metavar": metavar, "type": str if is_text(kind) else _value}


def is_text(kind: Any) -> bool:
    """Return whether values of a type, or of the items of a list type, are text, which is kept as it is written."""
    kind = _without_none(kind)
    if typing.get_origin(kind) is list:
        return is_text(typing.get_args(kind)[0])
    return kind is str or typing.get_origin(kind) is typing.Literal


def _value(text: str) -> Any:
    if not text.strip():  # as of `--lr "$LR"`, if the variable is not set
        raise argparse.ArgumentTypeError("the value is empty; give one, or leave the flag out")
    return parse_value(text)


def _without_none(kind: Any) -> Any:
    """Return T for Optional[T] and for Optional[Annotated[T, ...]]; pydantic itself strips an outer Annotated."""
    inside = [item for item in typing.get_args(kind) if item is not type(None)]
    if typing.get_origin(kind) is typing.Union and len(inside) == 1:
        kind = inside[0]
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


class _NameValuePairs(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for item in values:
            name, equals, value = item.partition("=")
            if not equals or not name or not value.strip():
                raise ConfigError(f"command line: {option_string}: {item!r}: expected name=value")
            if name in pairs:
                raise ConfigError(f"command line: {option_string}: {name} is given twice")
            pairs[name] = parse_value(value)
        setattr(namespace, self.dest, pairs)


def _hyphens(arg: str) -> str:
    """Accept --batch_size for --batch-size, as timm does."""
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else arg
