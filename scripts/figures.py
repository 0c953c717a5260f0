#!/usr/bin/env python3
"""Figures: `python scripts/figures.py curves output/digits --output curves.png`. Each picture has its numbers beside it.

Wiring only; the work is in tnt_timm/analysis/.
"""

import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Literal, NamedTuple, Optional, Sequence, Tuple, Type

import torch
from pydantic import Field, ValidationError

from tnt_timm.analysis import (
    accuracy_cost,
    attention,
    attention_picture,
    confusion,
    curves,
    features,
    images,
    picture,
    positions,
    tokens,
    tsne,
)
from tnt_timm.console import run, say
from tnt_timm.data.datasets import open_dataset
from tnt_timm.errors import ConfigError
from tnt_timm.training import command_line, config
from tnt_timm.training.opening import Opened, open_model
from tnt_timm.training.schema import Group

MODEL = "run folder, checkpoint, file of weights with --model, folder of timm's, or name of a model"
IMAGE = "a file, a folder (a picture each), china or flower (photographs of scikit-learn's), or digits/NUMBER"
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


class Pictured(Source):
    """Of which networks and image"""

    image: str = Field("china", description=IMAGE)
    img_size: Optional[int] = Field(None, gt=0, description="edge of the square input in pixels (default: the model's)")
    blocks: Optional[List[int]] = Field(None, min_length=1, description="counted from 1 (default: first, middle, last)")


class FeatureMaps(Pictured):
    """Feature maps"""

    img_size: int = Field(1024, gt=0, description="edge of the square input in pixels")


class TsneMaps(Source):
    """t-SNE of feature maps"""

    image: str = Field("china", description=IMAGE)
    img_size: int = Field(1024, gt=0, description="edge of the square input in pixels")
    block: Optional[int] = Field(None, gt=0, description="counted from 1 (default: the last)")
    perplexity: float = Field(30.0, gt=0, description="of t-SNE")


class TsneClasses(Source):
    """t-SNE of what the head reads"""

    dataset: str = Field("", description="as in train.py (default: what the run of the first model validated on)")
    data_dir: str = Field("", description="folder of the data set")
    split: str = Field("validation", min_length=1, description="of the data set")
    num_images: int = Field(1000, gt=1, description="at most so many, drawn at random")
    perplexity: float = Field(30.0, gt=0, description="of t-SNE")


class Attention(Pictured):
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


class AccuracyCost(Output):
    """Accuracy against cost"""

    costs: List[Literal[tuple(accuracy_cost.COSTS)]] = Field(
        list(accuracy_cost.COSTS), min_length=1, description=f"panels, of {', '.join(accuracy_cost.COSTS)}"
    )
    published: bool = Field(True, description="show the paper's rows as well")


def feature_maps(inputs: Sequence[str], own: FeatureMaps) -> Tuple[Any, picture.Numbers]:
    image = images.open_image(own.image)
    shown = []
    for given, opened in zip(inputs, _open(inputs, own)):
        shot = images.show(image, opened.data_config(own.img_size))
        title = _title(given, opened)
        shown.append(features.draw_maps(opened.model, shot.tensor, own.blocks, given, title, own.seed))
    caption = f"{features.NUM_MAPS} feature maps per block, drawn with seed {own.seed}; "
    caption += f"{_name(own.image)}, {own.img_size} pixels"
    return features.draw(shown, shot.pixels, caption), features.numbers(shown, shot.pixels)


def tsne_maps(inputs: Sequence[str], own: TsneMaps) -> Tuple[Any, picture.Numbers]:
    image = images.open_image(own.image)
    clouds = []
    for given, opened in zip(inputs, _open(inputs, own)):
        shot = images.show(image, opened.data_config(own.img_size))
        block = own.block or features.depth_of(opened.model)
        (maps,) = features.feature_maps(opened.model, shot.tensor, [block], given)
        title = f"{_title(given, opened)}\n{len(maps)} maps of block {block}"
        clouds.append(tsne.Cloud(title, tsne.embed(maps, own.perplexity, own.seed)))
    caption = f"t-SNE of feature maps, perplexity {own.perplexity:g}, seed {own.seed}; "
    caption += f"{_name(own.image)}, {own.img_size} pixels"
    return tsne.draw(clouds, None, caption), tsne.numbers(clouds, None, own.perplexity, own.seed)


def tsne_classes(inputs: Sequence[str], own: TsneClasses) -> Tuple[Any, picture.Numbers]:
    networks = _open(inputs, own)
    settings = {} if own.dataset or own.data_dir else networks[0].settings
    chosen = ("dataset", own.dataset), ("data_dir", own.data_dir)
    where = {key: settings.get(key) or given for key, given in chosen}
    dataset = open_dataset(split=own.split, is_training=False, name=where.pop("dataset"), **where)
    clouds = []
    for given, opened in zip(inputs, networks):
        preprocessing = opened.data_config()
        pixels, targets = images.labelled(dataset, preprocessing, own.num_images, own.seed)
        found = features.head_features(opened.model, images.normalised(pixels, preprocessing), given)
        points = tsne.embed(found, own.perplexity, own.seed)
        clouds.append(tsne.Cloud(_title(given, opened), points, targets))
    caption = f"t-SNE of what the head reads, {len(targets)} images, perplexity {own.perplexity:g}, seed {own.seed}"
    rows = tsne.numbers(clouds, dataset.classes, own.perplexity, own.seed)
    return tsne.draw(clouds, dataset.classes, caption), rows


def word_maps(inputs: Sequence[str], own: Pictured) -> Tuple[Any, picture.Numbers]:
    opened, shot = _one_network(inputs, own)
    maps = tokens.word_maps(opened.model, shot.tensor, own.blocks, inputs[0])
    caption = f"words averaged over their channels; {_name(own.image)}, {shot.pixels.shape[0]} pixels"
    arrays = {"image": shot.pixels, **{f"block{number}": values for number, values in maps.items()}}
    return attention_picture.draw_words(maps, shot.pixels, _title(inputs[0], opened), caption), arrays


def attention_of(inputs: Sequence[str], own: Attention) -> Tuple[Any, picture.Numbers]:
    _check_query(own)
    opened, shot = _one_network(inputs, own)
    model, kind = opened.model, own.kind
    found = attention.attended(model, shot.tensor, kind, own.blocks, own.sentence, own.word, inputs[0])
    grid = tokens.sentence_grid(model, shot.tensor)
    marks = [] if kind == "class" else [attention_picture.query_mark(shot.pixels, grid, own.sentence)]
    if kind == "word":
        words = tokens.word_grid(model)
        marks.append(attention_picture.query_mark(shot.pixels, grid, own.sentence, words, own.word))
    what = {"class": "the class token to the sentences", "sentence": "one sentence to all"}
    caption = f"attention of {what.get(kind, 'one word to the words of its sentence')}; {_name(own.image)}, "
    caption += f"{shot.pixels.shape[0]} pixels; each map has its own range of colours"
    figure = attention_picture.draw_attention(found, shot.pixels, marks, _title(inputs[0], opened), caption)
    return figure, attention_picture.attention_numbers(found, shot.pixels)


def accuracy_costs(inputs: Sequence[str], own: AccuracyCost) -> Tuple[Any, picture.Numbers]:
    tables = [*(accuracy_cost.PUBLISHED if own.published else ()), *map(Path, inputs)]
    if not tables:
        raise ConfigError("command line: no table to draw; give one, or leave --no-published out")
    points = accuracy_cost.read(tables)
    return accuracy_cost.draw(points, own.costs), accuracy_cost.numbers(points)


def training_curves(inputs: Sequence[str], own: Output) -> Tuple[Any, picture.Numbers]:
    runs = [curves.read_run(Path(given)) for given in inputs]
    return curves.draw(runs), curves.numbers(runs)


def confusion_matrix(inputs: Sequence[str], own: Output) -> Tuple[Any, picture.Numbers]:
    matrix = confusion.read(Path(inputs[0]))
    return confusion.draw(matrix), confusion.numbers(matrix)


def learned_positions(inputs: Sequence[str], own: Source) -> Tuple[Any, picture.Numbers]:
    (opened,) = _open(inputs, own)
    found = positions.similarities(opened.model, inputs[0])
    caption = "each small map: how similar one position is to all others"
    return positions.draw(found, _title(inputs[0], opened), caption), positions.numbers(found)


class Command(NamedTuple):
    settings: Type[Output]
    draw: Callable[[Sequence[str], Any], Tuple[Any, picture.Numbers]]
    inputs: str  # what they are; in the plural where there may be more than one
    least: int
    most: Optional[int]
    about: str


COMMANDS: Dict[str, Command] = {
    "feature-maps": Command(FeatureMaps, feature_maps, MODEL, 1, None, "twelve of each block, models side by side"),
    "tsne-maps": Command(TsneMaps, tsne_maps, MODEL, 1, None, "t-SNE of a block's feature maps, models side by side"),
    "tsne-classes": Command(TsneClasses, tsne_classes, MODEL, 1, None, "t-SNE of class tokens, coloured by class"),
    "word-maps": Command(Pictured, word_maps, MODEL, 1, 1, "words averaged over their channels, several depths"),
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
    "curves": Command(Output, training_curves, "run folder or summary.csv", 1, None, "loss and top-1 by epoch"),
    "confusion": Command(
        Output, confusion_matrix, "CSV of counts: true classes down, predicted across", 1, 1, "confusion matrix"
    ),
}


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    return run(figures, argv)


def figures(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        UserError: what keeps the figure from being drawn; nothing has been written then.
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
    picture.check_path(Path(own.output))
    for path, one in _pictures(own):
        figure, numbers = command.draw(inputs, one)
        beside = picture.save(figure, path, numbers, own.dpi)
        say(f"{path} and its numbers, {beside}")


def _pictures(own: Output) -> List[Tuple[Path, Output]]:
    """The picture that is asked for; of a folder of images, one each."""
    path, image = Path(own.output), getattr(own, "image", None)
    if image is None or not Path(image).is_dir():
        return [(path, own)]
    found = images.images_in(Path(image))
    names = [f"{path.stem}-{Path(image).name.replace('.', '_')}{path.suffix}" for image in found]
    return [(path.with_name(name), own.model_copy(update={"image": image})) for name, image in zip(names, found)]


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
    try:
        return inputs, command.settings(**given)
    except ValidationError as error:
        raise ConfigError(config.first_mistake(error, dict.fromkeys(given, "command line"))) from None


def _open(inputs: Sequence[str], own: Source) -> List[Opened]:
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
        opened.append(open_model(given, model, {} if size is None else {"img_size": size}, pretrained, untrained=True))
    return opened


def _name(image: str) -> str:
    return Path(image).name if Path(image).exists() else image


def _title(given: str, opened: Opened) -> str:
    name = _name(given)
    name = name if opened.name in name else f"{name} ({opened.name})"
    return name if opened.trained else f"{name}, {UNTRAINED}"


def _one_network(inputs: Sequence[str], own: Pictured) -> Tuple[Opened, images.Shown]:
    image = images.open_image(own.image)
    (opened,) = _open(inputs, own)
    return opened, images.show(image, opened.data_config(own.img_size))


def _check_query(own: Attention) -> None:
    if own.sentence is not None and own.kind == "class":
        raise ConfigError("command line: sentence: has no effect with --kind class")
    if own.word is not None and own.kind != "word":
        raise ConfigError(f"command line: word: has no effect with --kind {own.kind}; pass --kind word")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
