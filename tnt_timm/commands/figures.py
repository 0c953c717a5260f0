"""Figures: `python scripts/figures.py curves output/digits --output curves.png`. Each picture has its numbers beside it."""

from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Literal, NamedTuple, Optional, Sequence, Tuple, Type

import torch
from pydantic import Field, model_validator
from torch import nn

from tnt_timm.checkpoints.model_from_path import Opened, open_model
from tnt_timm.commands.entry_point import run
from tnt_timm.console import say
from tnt_timm.data.datasets import open_dataset
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.figures import (
    accuracy_cost,
    attention,
    attention_picture,
    confusion,
    curves,
    features,
    growth,
    images,
    picture,
    positions,
    tokens,
    tsne,
)
from tnt_timm.settings import command_line, config
from tnt_timm.settings.schema import Group

MODEL = "run folder, checkpoint, file of weights with --model, folder of timm's, or name of a model"
IMAGE = "a file, a folder (a picture each), china or flower (photographs of scikit-learn's), or digits/NUMBER"
PERPLEXITY = "of t-SNE (default: 30, or for few points a third of their number less one)"
UNTRAINED = "untrained weights"


class Output(Group):
    """Where to"""

    output: str = Field("", description="the picture, .png or .svg; its numbers go beside it as .npz or .csv")
    dpi: int = Field(200, ge=30, le=1200, description="dots per inch of a PNG")


class Source(Output):
    """Of which networks"""

    pretrained: bool = Field(False, description="published weights for the models given by name (else: untrained)")
    model: str = Field("", description="the model that a file of weights belongs to")
    seed: int = Field(0, ge=0, description="of untrained weights and of everything that is drawn at random")


class OfImage(Source):
    """Of which networks and image"""

    image: str = Field("china", description=IMAGE)
    img_size: Optional[int] = Field(None, gt=0, description="edge of the square input in pixels (default: the model's)")


class OfBlocks(OfImage):
    """Of which networks, blocks and image"""

    blocks: Optional[List[int]] = Field(None, min_length=1, description="counted from 1 (default: first, middle, last)")


class FeatureMaps(OfBlocks):
    """Feature maps"""

    img_size: int = Field(1024, gt=0, description="edge of the square input in pixels")


class TsneMaps(OfImage):
    """t-SNE of feature maps"""

    img_size: int = Field(1024, gt=0, description="edge of the square input in pixels")
    block: Optional[int] = Field(None, gt=0, description="counted from 1 (default: the last)")
    perplexity: Optional[float] = Field(None, gt=0, description=PERPLEXITY)


class TsneClasses(Source):
    """t-SNE of what the head reads"""

    dataset: str = Field("", description="as in train.py (default: what the run of the first model validated on)")
    data_dir: str = Field("", description="folder of the data set")
    split: str = Field("validation", min_length=1, description="of the data set")
    num_images: int = Field(1000, gt=3, description="at most so many, drawn at random")
    perplexity: Optional[float] = Field(None, gt=0, description=PERPLEXITY)


class Attention(OfBlocks):
    """Attention of one query"""

    kind: Literal[attention.KINDS] = Field(
        "class", description="class (token to sentences), sentence (to sentences), word (to the words of its sentence)"
    )
    sentence: Optional[List[int]] = Field(
        None, min_length=2, max_length=2, description="row and column of the query, or of its sentence, from 0"
    )
    word: Optional[List[int]] = Field(
        None, min_length=2, max_length=2, description="row and column of the word in its sentence, from 0"
    )

    @model_validator(mode="after")
    def _of_this_kind(self) -> "Attention":
        if self.sentence is not None and self.kind == "class":
            raise ValueError("sentence: has no effect with --kind class")
        if self.word is not None and self.kind != "word":
            raise ValueError(f"word: has no effect with --kind {self.kind}; pass --kind word")
        return self


class AccuracyCost(Output):
    """Accuracy against cost"""

    costs: List[Literal[tuple(accuracy_cost.COSTS)]] = Field(
        list(accuracy_cost.COSTS), min_length=1, description=f"panels, of {', '.join(accuracy_cost.COSTS)}"
    )
    published: bool = Field(True, description="show the paper's rows as well")


class Network(NamedTuple):
    """A network as it was given, and opened."""

    given: str
    opened: Opened

    @property
    def model(self) -> nn.Module:
        return self.opened.model

    @property
    def title(self) -> str:
        name = _name(self.given)
        name = name if self.opened.name in name else f"{name} ({self.opened.name})"
        return name if self.opened.trained else f"{name}, {UNTRAINED}"


class Drawn(NamedTuple):
    """A figure and the numbers that it shows."""

    figure: Any
    numbers: picture.Numbers
    left_out: Sequence[str] = ()  # a line per image that is missing from it


def feature_maps(networks: Sequence[Network], own: FeatureMaps) -> Drawn:
    image = images.open_image(own.image)
    shown = []
    for network in networks:
        shot = images.show(image, network.opened.data_config(own.img_size))
        shown.append(features.draw_maps(network.model, shot.tensor, own.blocks, network.given, network.title, own.seed))
    caption = f"{features.NUM_MAPS} feature maps each, drawn with seed {own.seed}; {_seen(own, shot)}"
    return Drawn(features.draw(shown, shot.pixels, caption), features.numbers(shown, shot.pixels))


def tsne_maps(networks: Sequence[Network], own: TsneMaps) -> Drawn:
    image = images.open_image(own.image)
    clouds = []
    for network in networks:
        shot = images.show(image, network.opened.data_config(own.img_size))
        block = own.block or features.depth_of(network.model)
        (maps,) = features.feature_maps(network.model, shot.tensor, [block], network.given)
        about = f"{len(maps)} maps of {features.unit_of(network.model)} {block}"
        clouds.append(tsne.embed(network.title, about, maps, own.perplexity, own.seed))
    caption = f"t-SNE of feature maps, {tsne.how(clouds, own.seed)}; {_seen(own, shot)}"
    return Drawn(tsne.draw(clouds, None, caption), tsne.numbers(clouds, None, own.seed))


def tsne_classes(networks: Sequence[Network], own: TsneClasses) -> Drawn:
    settings = {} if own.dataset or own.data_dir else networks[0].opened.settings
    chosen = ("dataset", own.dataset), ("data_dir", own.data_dir)
    where = {key: settings.get(key) or given for key, given in chosen}
    dataset = open_dataset(split=own.split, is_training=False, name=where.pop("dataset"), **where)
    _check_apart(Path(own.output), images.folders_of(dataset))
    clouds = []
    for network in networks:
        preprocessing = network.opened.data_config()
        found = images.labelled(dataset, preprocessing, own.num_images, own.seed)
        read = features.head_features(network.model, images.normalised(found.pixels, preprocessing), network.given)
        clouds.append(tsne.embed(network.title, "", read, own.perplexity, own.seed, found.targets))
    caption = f"t-SNE of what the head reads of {len(found.targets)} images, {tsne.how(clouds, own.seed)}"
    figure = tsne.draw(clouds, dataset.classes, caption)
    return Drawn(figure, tsne.numbers(clouds, dataset.classes, own.seed), found.left_out)


def word_maps(networks: Sequence[Network], own: OfBlocks) -> Drawn:
    network, shot = _one_network(networks, own)
    maps = tokens.word_maps(network.model, shot.tensor, own.blocks, network.given)
    caption = f"words averaged over their channels; {_seen(own, shot)}; each map has its own range of colours"
    arrays = {"image": shot.pixels, **{f"block{number}": values for number, values in maps.items()}}
    return Drawn(attention_picture.draw_words(maps, shot.pixels, network.title, caption), arrays)


def attention_of(networks: Sequence[Network], own: Attention) -> Drawn:
    network, shot = _one_network(networks, own)
    model, kind = network.model, own.kind
    found = attention.attended(model, shot.tensor, kind, own.blocks, own.sentence, own.word, network.given)
    grid = tokens.sentence_grid(model, shot.tensor)
    marks = [] if kind == "class" else [attention_picture.query_mark(shot.pixels, grid, own.sentence)]
    if kind == "word":
        words = tokens.word_grid(model)
        marks.append(attention_picture.query_mark(shot.pixels, grid, own.sentence, words, own.word))
    what = {"class": "the class token to the sentences", "sentence": "one sentence to all"}
    caption = f"attention of {what.get(kind, 'one word to the words of its sentence')}; {_seen(own, shot)}; "
    caption += "each map has its own range of colours"
    figure = attention_picture.draw_attention(found, shot.pixels, marks, network.title, caption)
    return Drawn(figure, attention_picture.attention_numbers(found, shot.pixels))


def learned_positions(networks: Sequence[Network], own: Source) -> Drawn:
    (network,) = networks
    found = positions.similarities(network.model, network.given)
    caption = "each small map: how similar one position is to all others"
    return Drawn(positions.draw(found, network.title, caption), positions.numbers(found))


def accuracy_costs(tables: Sequence[Path], own: AccuracyCost) -> Drawn:
    if not tables and not own.published:
        raise ConfigError("command line: no table to draw; give one, or leave --no-published out")
    points = accuracy_cost.read([*(accuracy_cost.PUBLISHED if own.published else ()), *tables])
    return Drawn(accuracy_cost.draw(points, own.costs), accuracy_cost.numbers(points))


def training_curves(paths: Sequence[Path], own: Output) -> Drawn:
    runs = [curves.read_run(path) for path in paths]
    return Drawn(curves.draw(runs), curves.numbers(runs))


def cost_growth(paths: Sequence[Path], own: Output) -> Drawn:
    found = growth.read(paths)
    return Drawn(growth.draw(found), growth.numbers(found))


def confusion_matrix(paths: Sequence[Path], own: Output) -> Drawn:
    matrix = confusion.read(paths[0])
    return Drawn(confusion.draw(matrix), confusion.numbers(matrix))


class Command(NamedTuple):
    settings: Type[Output]  # a Source's inputs are networks; others' are paths of tables
    draw: Callable[[Sequence[Any], Any], Drawn]
    inputs: str  # what they are; in the plural where there may be more than one
    least: int
    most: Optional[int]
    about: str


COMMANDS: Dict[str, Command] = {
    "feature-maps": Command(FeatureMaps, feature_maps, MODEL, 1, None, "twelve of each block, models side by side"),
    "tsne-maps": Command(TsneMaps, tsne_maps, MODEL, 1, None, "t-SNE of a block's feature maps, models side by side"),
    "tsne-classes": Command(TsneClasses, tsne_classes, MODEL, 1, None, "t-SNE of class tokens, coloured by class"),
    "word-maps": Command(OfBlocks, word_maps, MODEL, 1, 1, "words averaged over their channels, several depths"),
    "attention": Command(Attention, attention_of, MODEL, 1, 1, "of the class token, a sentence or a word, any block"),
    "positions": Command(Source, learned_positions, MODEL, 1, 1, "similarity of the learned positions"),
    "accuracy-cost": Command(
        AccuracyCost,
        accuracy_costs,
        "CSV of rows, or benchmark.py's JSON",
        0,
        None,
        "top-1 against FLOPs, parameters, images/s",
    ),
    "growth": Command(
        Output, cost_growth, "JSON of benchmark.py --output", 1, None, "time and memory against image size and batch"
    ),
    "curves": Command(Output, training_curves, "run folder or summary.csv", 1, None, "loss and top-1 by epoch"),
    "confusion": Command(
        Output, confusion_matrix, "CSV of counts: true classes down, predicted across", 1, 1, "confusion matrix"
    ),
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status."""
    return run(figures, argv)


def figures(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        UserError: what keeps the figure from being drawn, and nothing has been written then; or some images could not be
            read, and what could be is drawn.
    """
    if not argv or argv[0] in ("-h", "--help"):
        say("usage: figures.py FIGURE [INPUT ...] --output FILE.png|FILE.svg [--KEY VALUE ...]\n")
        for name, command in COMMANDS.items():
            say(f"  {name:<14} {command.about}")
        say("\n`figures.py FIGURE --help` lists its settings.")
        return
    if argv[0] not in COMMANDS:
        hint = command_line.nearest(argv[0], COMMANDS)
        raise ConfigError(f"command line: {argv[0]}: no such figure{hint}; there are {', '.join(COMMANDS)}")
    command = COMMANDS[argv[0]]
    inputs, own = _parse(argv[0], command, argv[1:])
    pictures = _pictures(own)
    for path, one in pictures:
        picture.check_path(path, _files_read(inputs, one))
    subjects = _open(inputs, own) if isinstance(own, Source) else [Path(given) for given in inputs]
    left_out: List[str] = []
    for path, one in pictures:
        try:
            drawn = command.draw(subjects, one)
        except images.Damaged as error:
            if len(pictures) == 1:
                raise
            left_out.append(str(error))
            continue
        beside = picture.save(drawn.figure, path, drawn.numbers, own.dpi)
        left_out.extend(drawn.left_out)
        say(f"{path} and its numbers, {beside}")
    for line in left_out:
        say(f"left out: {line}")
    if left_out:
        raise UserError(f"images that could not be read: {len(left_out)}; they are named above")


def _pictures(own: Output) -> List[Tuple[Path, Output]]:
    """The picture that is asked for; of a folder of images, one each."""
    path = Path(own.output)
    if not isinstance(own, OfImage):
        return [(path, own)]
    images.check_name(own.image)
    if not Path(own.image).is_dir():
        return [(path, own)]
    _check_apart(path, [Path(own.image)])
    return [
        (path.with_name(f"{path.stem}-{Path(image).name}{path.suffix}"), own.model_copy(update={"image": image}))
        for image in images.images_in(Path(own.image))
    ]


def _files_read(inputs: Sequence[str], own: Output) -> List[Path]:
    """The files that a picture is drawn from, as far as they can bear the name of what is written."""
    paths = [*map(Path, inputs), Path(getattr(own, "image", ""))]
    if isinstance(own, AccuracyCost) and own.published:
        paths += accuracy_cost.PUBLISHED
    return [path / curves.SUMMARY if path.is_dir() else path for path in paths]


def _check_apart(output: Path, folders: Iterable[Path]) -> None:
    """A picture among the images would be one of them the next time."""
    if any(output.parent.resolve() == folder.resolve() for folder in folders):
        raise ConfigError(f"command line: output: {output}: lies among the images that are read; choose another folder")


def _parse(name: str, command: Command, argv: Sequence[str]) -> Tuple[List[str], Output]:
    parser = command_line.build_parser({command.settings.__doc__: command.settings.model_fields}, command.about, {})
    many = "[INPUT ...]" if command.most is None else "INPUT"
    parser.usage = f"figures.py {name} {many} --output FILE [--KEY VALUE ...]"
    parser.add_argument("inputs", metavar="INPUT", nargs="*", default=[], help=command.inputs)
    given = command_line.parse(parser, argv)
    inputs = given.pop("inputs")
    if len(inputs) < command.least:
        raise ConfigError(f"command line: nothing to draw; give a {command.inputs}")
    if command.most is not None and len(inputs) > command.most:
        raise ConfigError(f"command line: {inputs[command.most]}: {name} takes one input")
    if not given.get("output"):
        raise ConfigError("command line: output: missing; say with --output where the picture shall go")
    return inputs, config.own_settings(command.settings, given)


def _open(inputs: Sequence[str], own: Source) -> List[Network]:
    """The networks; published weights and --model concern those that have no weights of their own."""
    if own.pretrained and all(Path(given).exists() for given in inputs):
        raise ConfigError(f"command line: pretrained: {inputs[0]} has weights of its own; leave the setting out")
    if own.model and not any(Path(given).is_file() for given in inputs):
        raise ConfigError(f"command line: model: {own.model}: {inputs[0]} is no file of weights for it")
    size = getattr(own, "img_size", None)
    opened = []
    for given in inputs:
        torch.manual_seed(own.seed)
        model = own.model if Path(given).is_file() else ""
        pretrained = own.pretrained and not Path(given).exists()
        arguments = {} if size is None else {"img_size": size}
        opened.append(Network(given, open_model(given, model, arguments, pretrained, untrained=True)))
    return opened


def _name(image: str) -> str:
    return Path(image).name if Path(image).exists() else image


def _seen(own: OfImage, shot: images.Shown) -> str:
    return f"{_name(own.image)}, {shot.pixels.shape[0]}\N{NO-BREAK SPACE}pixels"


def _one_network(networks: Sequence[Network], own: OfBlocks) -> Tuple[Network, images.Shown]:
    (network,) = networks
    return network, images.show(images.open_image(own.image), network.opened.data_config(own.img_size))
