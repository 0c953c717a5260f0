"""Count parameters and multiply-adds, next to the published ones: `tnt-complexity`."""

from typing import List, Literal, Optional, Sequence

from pydantic import PositiveInt

from tnt_timm.commands.entry_point import put, run
from tnt_timm.console import table
from tnt_timm.costs.complexity import HEADER, cost, published_costs, rows
from tnt_timm.errors import ConfigError
from tnt_timm.settings.command_line import setting
from tnt_timm.settings.config import check_model_name
from tnt_timm.settings.paths import PathText
from tnt_timm.settings.schema import Group, OutputFile


class Settings(Group):
    """Count parameters (millions) and multiply-adds (billions per image). Without a MODEL, list every model of the paper's
    tables 1 and 4 that timm has, next to the published figures. Needs no GPU and no weights."""

    models: List[PathText] = setting([], "timm model names", positional="MODEL")
    img_size: Optional[PositiveInt] = setting(None, "with MODEL: input height and width, pixels (default: the model's)")
    format: Literal["table", "markdown", "csv"] = setting("table", "output format")
    output: OutputFile = setting("", "output file (default: the terminal)")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Return the exit status."""
    return run(complexity, argv, Settings)


def complexity(settings: Settings) -> None:
    """Count, and print or write the table.

    Raises:
        UserError: a model cannot be counted, or the file cannot be written.
    """
    if settings.img_size and not settings.models:
        raise ConfigError("command line: img_size: name a MODEL with it; the paper's models have the paper's sizes")
    for name in settings.models:
        check_model_name(name, "command line")
    costs = [cost(name, settings.img_size) for name in settings.models] if settings.models else published_costs()
    put(table(HEADER, rows(costs), settings.format), settings.output)
