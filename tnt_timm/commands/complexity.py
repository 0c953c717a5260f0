"""Costs: `python scripts/complexity.py`: parameters and multiply-adds, counted, beside the paper's."""

from pathlib import Path
from typing import List, Literal, Optional, Sequence

from pydantic import Field

from tnt_timm import files
from tnt_timm.commands.runner import run
from tnt_timm.console import say, table
from tnt_timm.costs.complexity import HEADER, cost, published_costs, rows
from tnt_timm.errors import ConfigError
from tnt_timm.settings import command_line, config
from tnt_timm.settings.schema import Group

DESCRIPTION = """Count parameters (millions) and multiply-adds (billions, of one image). Without a MODEL: every model of the
paper's tables 1 and 4 that timm has, beside the published figures. Nothing is computed, so it needs no GPU and no weights."""


class Own(Group):
    """What to count, and where to"""

    models: List[str] = Field([], description="names of timm's models instead of the paper's")
    img_size: Optional[int] = Field(
        None, gt=0, description="with MODEL: edge of the square image (default: the model's)"
    )
    format: Literal["table", "markdown", "csv"] = Field("table", description="of the output")
    output: str = Field("", description="file for it instead of the terminal")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status."""
    return run(complexity, argv)


def complexity(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        UserError: a model that cannot be counted, or a file that cannot be written.
    """
    own = _parse(argv)
    for name in own.models:
        config.check_model_name(name, "command line")
    costs = [cost(name, own.img_size) for name in own.models] if own.models else published_costs()
    text = table(HEADER, rows(costs), own.format)
    if own.output:
        files.replace_text(Path(own.output), text)
    else:
        say(text.rstrip("\n"))


def _parse(argv: Sequence[str]) -> Own:
    settings = {name: field for name, field in Own.model_fields.items() if name != "models"}
    parser = command_line.build_parser({Own.__doc__: settings}, DESCRIPTION, {})
    parser.usage = "%(prog)s [MODEL ...] [--KEY VALUE ...]"
    parser.add_argument("models", metavar="MODEL", nargs="*", default=[], help="names of timm's models")
    given = command_line.parse(parser, argv)
    if "img_size" in given and not given["models"]:
        raise ConfigError("command line: img_size: name a MODEL with it; the paper's have the paper's sizes")
    return config.own_settings(Own, given)
