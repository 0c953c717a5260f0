"""Read and write YAML as this project uses it: flat mappings, `1e-3` is a number, a repeated key is an error."""

import re
from pathlib import Path
from typing import Any, Dict, Mapping

import yaml

from tnt_timm.errors import ConfigError, one_line


class _Loader(yaml.SafeLoader):
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


_Loader.add_implicit_resolver(  # PyYAML follows YAML 1.1, where 1e-3 is text
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """Return a value as if it stood after `key: ` in a file; text that is not YAML is returned as it is."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def read_mapping(path: Path) -> Dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ConfigError: the file is unreadable, empty, not YAML, not a mapping, or repeats a key.
    """
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {one_line(error)}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {one_line(error)}") from None
    if found is None:
        raise ConfigError(f"{path}: the file is empty; write settings as `key: value` lines")
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found a {type(found).__name__}")
    return {str(key): value for key, value in found.items()}


def dump(mapping: Mapping[str, Any]) -> str:
    """Return `key: value` lines; a list or dict stays on its line."""

    def inline(value: Any) -> str:
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
        return text.removesuffix("...\n").rstrip()  # PyYAML ends a scalar document with dots

    return "".join(f"{key}: {inline(value)}\n" for key, value in mapping.items())
