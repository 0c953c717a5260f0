"""Read and write YAML by the rules of YAML 1.2's core schema, where `064` is 64, and `yes`, `1:30` and `2026-01-01` are text.

PyYAML itself follows YAML 1.1. What `dump` writes is read back as the same value. A repeated key is an error.
"""

import re
from pathlib import Path
from typing import Any, Callable, Container, Dict, Mapping, NamedTuple

import yaml

from tnt_timm.errors import ConfigError, one_line


class _Scalar(NamedTuple):
    """A kind of value that is written without quotes (YAML 1.2.2, section 10.3.2)."""

    pattern: "re.Pattern[str]"
    begins: str  # the characters that it may begin with
    value: Callable[[str], Any]


def _whole_number(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text if base == 10 else text[2:], base)


SCALARS = {
    "null": _Scalar(re.compile(r"(~|null|Null|NULL)?\Z"), "~nN", lambda text: None),
    "bool": _Scalar(re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"), "tTfF", lambda text: text.lower() == "true"),
    "int": _Scalar(re.compile(r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), "-+0123456789", _whole_number),
    "float": _Scalar(
        re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"),
        "-+.0123456789",
        lambda text: float(re.sub(r"\.(?=[iInN])", "", text)),
    ),
}
TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: Dict[str, list] = {}
    yaml_constructors: Dict[Any, Callable] = {}
    texts: Container[str] = ()  # keys of the file whose values are text, even if they look like numbers

    def construct_document(self, node: yaml.Node) -> Any:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in self.texts:
                _keep_text(value)
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Dict[Any, Any]:
        lines: Dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {line}: expected a name before the colon, found a {key.id}")
            if key.value in lines:
                raise yaml.YAMLError(f"{key.value} is given twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_plain(self, node: yaml.Node) -> Any:
        text, kind = self.construct_scalar(node), node.tag.removeprefix(TAG)
        if not SCALARS[kind].pattern.match(text):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {text!r}: expected a value of type {kind}")
        return SCALARS[kind].value(text)

    def refuse(self, node: yaml.Node) -> Any:
        raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {node.tag.replace(TAG, '!!')}: no such type here")


def _keep_text(node: yaml.Node) -> None:
    """Make text of a number, or of the numbers in a list: `experiment: 1e-3` names the run as it is written."""
    for each in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if each.tag in (TAG + "int", TAG + "float"):
            each.tag = TAG + "str"


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: Dict[str, list] = {}

    def represent_text(self, text: str) -> yaml.Node:
        # Quoted if a reader could not see what it is. Double quotes keep line breaks on one line.
        return self.represent_scalar(TAG + "str", text, style=None if text.isprintable() else '"')


for _kind, _scalar in SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(TAG + _kind, _scalar.pattern, [*_scalar.begins, *[""] * (_kind == "null")])
    _Loader.add_constructor(TAG + _kind, _Loader.construct_plain)
_Loader.add_constructor(TAG + "str", _Loader.construct_scalar)
_Loader.add_constructor(TAG + "seq", lambda loader, node: loader.construct_sequence(node, deep=True))
_Loader.add_constructor(TAG + "map", lambda loader, node: loader.construct_mapping(node, deep=True))
_Loader.add_constructor(None, _Loader.refuse)
_Dumper.add_representer(str, _Dumper.represent_text)


def parse_value(text: str) -> Any:
    """Return a value as if it stood after `key: ` in a file; text that is not YAML is returned as it is."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return text


def read_mapping(path: Path, texts: Container[str] = ()) -> Dict[str, Any]:
    """Return the mapping in a YAML file. The values of the keys in `texts` stay text if they look like numbers.

    Raises:
        ConfigError: the file is unreadable, empty, not YAML, not a mapping, or repeats a key.
    """

    class Loader(_Loader):
        pass

    Loader.texts = texts
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {one_line(error)}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {one_line(error)}") from None
    if found is None:
        raise ConfigError(f"{path}: the file is empty; write settings as `key: value` lines")
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found a {type(found).__name__}")
    return {str(key): value for key, value in found.items()}


def dump(mapping: Mapping[str, Any], ascii: bool = False) -> str:
    """Return `key: value` lines; a list or dict stays on its line. `ascii` escapes all other characters."""

    def inline(value: Any) -> str:
        style = dict(default_flow_style=True, allow_unicode=not ascii, width=float("inf"), sort_keys=False)
        text = yaml.dump(value, Dumper=_Dumper, **style)
        return text.removesuffix("...\n").rstrip()  # PyYAML ends a scalar document with dots

    return "".join(f"{key}: {inline(value)}\n" for key, value in mapping.items())
