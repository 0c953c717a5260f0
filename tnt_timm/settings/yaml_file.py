"""YAML as this project reads and writes it: flat mappings, `1e-3` is a number, a key given twice is an error."""

import re
from pathlib import Path
from typing import Any, Dict, Mapping

import yaml

from tnt_timm.errors import ConfigError, one_line


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, where 1e-3 is text; people mean the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """One value, as it would stand after `key: ` in a file; text that is not YAML stands for itself."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def read_mapping(path: Path) -> Dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, unreadable, empty, not YAML, not a mapping, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {one_line(error)}") from None
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{path}: the file is empty; write settings as `key: value` lines")
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}: expected `key: value` lines, found a {node.id}")
        _refuse_repeated_keys(node, path)
        return {str(key): value for key, value in loader.construct_document(node).items()}
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {one_line(error)}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _refuse_repeated_keys(node: yaml.MappingNode, path: Path) -> None:
    lines: Dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{path}: line {line}: expected a name before the colon, found a {key.id}")
        if key.value in lines:
            raise ConfigError(f"{path}: {key.value} is given twice, in lines {lines[key.value]} and {line}")
        lines[key.value] = line
        if isinstance(value, yaml.MappingNode):
            _refuse_repeated_keys(value, path)


def dump(mapping: Mapping[str, Any]) -> str:
    """`key: value` lines; a list or dict stays on its line."""

    def inline(value: Any) -> str:
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
        return text.removesuffix("...\n").rstrip()  # PyYAML ends a document that is one scalar with dots

    return "".join(f"{key}: {inline(value)}\n" for key, value in mapping.items())
