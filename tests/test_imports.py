"""Imports between the rooms of the package run one way, so that each room can be read without those above it."""

import ast
from pathlib import Path
from typing import Dict, Iterator, Set

import pytest

PACKAGE = Path(__file__).parent.parent / "tnt_timm"
BASE = {"errors", "atomic_files", "console", "cpu_info", "version"}  # files that every room may import
MAY_IMPORT: Dict[str, Set[str]] = {  # what a room may import besides those
    "ops": set(),
    "models": {"ops"},
    "data": set(),
    "settings": set(),
    "export": {"models"},
    "runtime": {"settings", "ops"},
    "checkpoints": {"export", "models", "data", "settings", "runtime", "ops"},
    "evaluation": {"checkpoints", "runtime", "data", "settings", "models", "export"},
    "tracking": {"settings"},
    "training": {"tracking", "evaluation", "checkpoints", "export", "runtime", "data", "settings", "models", "ops"},
    "costs": {"models"},
    "figures": {"costs", "models", "data", "evaluation", "checkpoints", "settings"},
}


def imported_rooms(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module != "tnt_timm" else [f"tnt_timm.{name}" for name in names]
        yield from (name.split(".")[1] for name in names if name.startswith("tnt_timm."))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_no_room_above_it(room):
    allowed = {room, *BASE, *MAY_IMPORT[room]}
    for file in (PACKAGE / room).rglob("*.py"):
        assert not set(imported_rooms(file)) - allowed, file


def test_every_room_is_in_the_table():
    assert {folder.parent.name for folder in PACKAGE.glob("*/__init__.py")} == {*MAY_IMPORT, "commands"}
