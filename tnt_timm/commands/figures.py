"""tnt-figures: draw a figure and save it with its numbers, as in `tnt-figures curves output/digits --output curves.png`."""

from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type

from tnt_timm.commands.entry_point import run
from tnt_timm.console import say, show
from tnt_timm.errors import ConfigError
from tnt_timm.figures import (
    accuracy_cost,
    attention,
    confusion,
    curves,
    diversity,
    feature_maps,
    growth,
    picture,
    positions,
    tsne,
)
from tnt_timm.figures.network import NetworkSettings, Output, open_networks
from tnt_timm.settings import command_line, config
from tnt_timm.settings.paths import expand_at

# What an input is: its name in the usage, and its help.
MODEL = "MODEL", "run folder, checkpoint, file of weights with --model, folder of timm's, or name of a model"
RUN = "RUN", "run folder or summary.csv"
BENCHMARK = "FILE", "JSON of benchmark.py --output"
TABLE = "TABLE", "CSV of rows, or JSON of benchmark.py --output"
COUNTS = "TABLE", "CSV of counts, true classes down, predicted ones across"


class Figure(NamedTuple):
    """A row of the table."""

    settings: Type[Output]  # with NetworkSettings, inputs are opened as networks; else they are paths
    draw: Callable[[Sequence[Any], Any], picture.Drawn]  # its docstring is the help
    inputs: Tuple[str, str]
    nargs: Optional[str] = "+"  # how many inputs, as argparse counts them; None is exactly one


FIGURES: Dict[str, Figure] = {
    "feature-maps": Figure(feature_maps.FeatureMapSettings, feature_maps.draw_feature_maps, MODEL),
    "diversity": Figure(diversity.DiversitySettings, diversity.draw_diversity, MODEL),
    "tsne-maps": Figure(tsne.MapSettings, tsne.draw_maps, MODEL),
    "tsne-classes": Figure(tsne.ClassSettings, tsne.draw_classes, MODEL),
    "word-maps": Figure(feature_maps.BlockSettings, feature_maps.draw_words, MODEL, None),
    "attention": Figure(attention.AttentionSettings, attention.draw_attention, MODEL, None),
    "positions": Figure(NetworkSettings, positions.draw_positions, MODEL, None),
    "accuracy-cost": Figure(accuracy_cost.AccuracyCostSettings, accuracy_cost.draw_accuracy_cost, TABLE, "*"),
    "growth": Figure(Output, growth.draw_growth, BENCHMARK),
    "curves": Figure(Output, curves.draw_curves, RUN),
    "confusion": Figure(Output, confusion.draw_confusion, COUNTS, None),
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Return the exit status."""
    return run(figures, argv)


def figures(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        UserError: the figure cannot be drawn; nothing has been written.
    """
    if not argv or argv[0] in ("-h", "--help"):
        show("usage: tnt-figures FIGURE [INPUT ...] --output FILE.png|FILE.svg [--KEY VALUE ...]")
        say("")
        for name, figure in FIGURES.items():
            say(f"  {name:<14} {figure.draw.__doc__}")
        say("")
        say("`tnt-figures FIGURE --help` lists the settings of a figure.")
        return
    name = argv[0]
    if name not in FIGURES:
        hint = command_line.nearest(name, FIGURES)
        raise ConfigError(f"command line: {name}: no such figure{hint}; choose one of {', '.join(FIGURES)}")
    figure = FIGURES[name]
    inputs, own = _parse(name, figure, argv[1:])
    output = Path(own.output)
    _check_output(output, [*inputs, getattr(own, "image", ""), *accuracy_cost.PUBLISHED])
    with picture.style():
        subjects = open_networks(inputs, own) if isinstance(own, NetworkSettings) else inputs
        drawn, numbers = figure.draw(subjects, own)
        output.parent.mkdir(parents=True, exist_ok=True)
        numbers_path = picture.save(drawn, output, numbers, own.dpi)
    say(f"{output} and its numbers, {numbers_path}")


def _parse(name: str, figure: Figure, argv: Sequence[str]) -> Tuple[List[str], Output]:
    """Return the inputs and the checked settings."""
    metavar, help = figure.inputs
    fields = {figure.settings.__doc__: figure.settings.model_fields}
    parser = command_line.build_parser(fields, figure.draw.__doc__)
    shown = {None: metavar, "+": f"{metavar} ...", "*": f"[{metavar} ...]"}[figure.nargs]
    parser.usage = f"tnt-figures {name} {shown} --output FILE [--KEY VALUE ...]"
    parser.add_argument("inputs", metavar=metavar, nargs=figure.nargs, help=help)
    given = command_line.parse(parser, argv)
    inputs = given.pop("inputs", [])
    if not given.get("output"):
        raise ConfigError("command line: output: missing; add --output FILE.png or FILE.svg")
    inputs = [expand_at("command line", each) for each in ([inputs] if figure.nargs is None else inputs)]
    return inputs, config.own_settings(figure.settings, given)


def _check_output(output: Path, read: Sequence[Any]) -> None:
    """Refuse names that are no picture, and those of files that the figure is drawn from."""
    if output.suffix not in (".png", ".svg"):
        raise ConfigError(f"output: {output}: expected a name that ends with .png or .svg")
    sources = [path / curves.SUMMARY if path.is_dir() else path for path in map(Path, read)]
    for file in (output, output.with_suffix(".npz"), output.with_suffix(".csv")):
        if file.exists() and any(path.exists() and file.samefile(path) for path in sources):
            raise ConfigError(f"output: {output}: would overwrite {file}, which the figure is drawn from; rename it")
