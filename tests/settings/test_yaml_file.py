"""YAML by the rules of YAML 1.2's core schema; what is written is read back as itself."""

import math
import random

import pytest

from tnt_timm.errors import ConfigError
from tnt_timm.settings import config, yaml_file

AWKWARD = """yes no on off y null Null ~ true True TRUE trUe 0x1F 0X1F 0o17 017 064 1_000 2026-01-01 2026-13-45 1:30 190:20:30
    1e-3 12e4567 .5 1. +1 -.inf .nan nan inf << = [ { * & ! % @ ` ' " \\ - ? : | > *a &a !x --- ...""".split()
AWKWARD += [
    "",
    " ",
    " a",
    "a ",
    "a: b",
    "a #b",
    "- a",
    "a, b",
    "a\n\n  b",
    "\n",
    "\r\n",
    "\t",
    "\0",
    "\x1b[31m",
    "\x7f",
    "\x85",
]
AWKWARD += ["\u2028", "\ufeff", "\u200e", "\udce9", "\ud83d", "猫", "😀", "é", "e\u0301", "٣"]


def text(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(AWKWARD)
    length = 150 if rng.random() < 0.02 else rng.randrange(8)
    return "".join(chr(rng.randrange(rng.choice([0x80, 0x3000, 0x10000, 0x110000]))) for _ in range(length))


def number(rng: random.Random):
    numbers = [5e-324, 1e22, 1e16, -0.0, 0, 1.0, math.inf, True, False, None, rng.randrange(-(10**20), 10**20)]
    return rng.choice([*numbers, rng.uniform(-1, 1) * 10 ** rng.randrange(-320, 308)])


def value(rng: random.Random, depth: int = 3):
    kind = rng.random()
    if depth and kind < 0.15:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if depth and kind < 0.3:
        return {text(rng): value(rng, depth - 1) for _ in range(rng.randrange(4))}
    return text(rng) if kind < 0.7 else number(rng)


@pytest.mark.parametrize("ascii", [False, True])
def test_what_is_written_is_read_back_as_itself(tmp_path, ascii):
    rng, path = random.Random(0), tmp_path / "x.yaml"
    mappings = [{"key": each} for each in AWKWARD] + [{f"k{i}": value(rng) for i in range(5)} for _ in range(800)]
    for mapping in mappings:
        written = yaml_file.dump(mapping, ascii)
        assert written.count("\n") == len(mapping) and (written.isascii() or not ascii)
        path.write_text(written, encoding="utf-8", newline="")
        assert repr(yaml_file.read_mapping(path)) == repr(mapping), written  # repr: also the types, -0.0 and nan


@pytest.mark.parametrize(
    "text, value",
    [
        ("064", 64),
        ("-064", -64),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e3", 1000.0),
        (".5e-2", 0.005),
        ("1.", 1.0),
        ("-.INF", -math.inf),
        ("~", None),
        ("", None),
        ("TRUE", True),
        ("[1, 0x10, a]", [1, 16, "a"]),
        *((same, same) for same in "1:30 1_000 yes no on 2026-01-01 2026-13-45 0b1 << = 1e nan .e3".split()),
        *((same, same) for same in ("!!timestamp 2026-01-01", "!!int x", "!!bool 1", "!!binary x", "!x 3", "&a [*a]")),
        ("[" * 3000, "[" * 3000),
        ("9" * 5000, "9" * 5000),
    ],
    ids=lambda each: str(each)[:30],
)
def test_a_value_of_the_command_line(text, value):
    assert repr(yaml_file.parse_value(text)) == repr(value)


OTHER_TYPES = ["lr: !!int x", "lr: !!timestamp 2026-01-01", "lr: !!python/tuple [1]", "x: &a [*a]", "a: 1\n---\nb: 2"]


@pytest.mark.parametrize("text", OTHER_TYPES)
def test_a_file_with_other_types_is_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"x.yaml: not valid YAML"):
        yaml_file.read_mapping(tmp_path / "x.yaml")


@pytest.mark.parametrize("name", ["1e-3", "12e4567", "007", "0x1F", "2026-01-01", "1_000", "yes", "no", "1:30"])
def test_a_text_setting_keeps_a_number_as_it_is_written(tmp_path, name):
    """A run that is named by a git hash or a date; on the command line, in a file, and in what is printed."""
    (tmp_path / "x.yaml").write_text(
        f"  experiment: {name}\n  wandb_tags: [{name}, a]\n  model_kwargs: {{experiment: 1e-3}}\n"
    )
    for argv in (["--config", str(tmp_path / "x.yaml")], ["--experiment", name]):
        found = config.resolve(argv).config
        (tmp_path / "printed.yaml").write_text(config.to_yaml(found))
        assert found.run.experiment == name
        assert config.resolve(["--config", str(tmp_path / "printed.yaml")]).config == found
    assert config.resolve(["--config", str(tmp_path / "x.yaml")]).config.run.wandb_tags == [name, "a"]
    assert config.resolve(["--config", str(tmp_path / "x.yaml")]).config.network.model_kwargs == {"experiment": 0.001}


@pytest.mark.parametrize("argv", [["--lr", ""], ["--scale", "0.1", ""], ["-b", " "]])
def test_an_empty_value_is_no_value(argv):
    """As of --lr "$LR" without such a variable: it must not mean the default."""
    with pytest.raises(ConfigError, match=f"{argv[0]}.*the value is empty"):
        config.resolve(argv)
