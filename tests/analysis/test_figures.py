"""scripts/figures.py: each figure once, as a user types it, and the mistakes that users make."""

import csv
import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPO = Path(__file__).parents[2]
SMALL = ["--img-size", "32", "--image", "china"]
CONFUSION = ",a,b\na,3,1\nb,0,4\n"

FIGURES = {
    "feature-maps": (["{run}", "deit_tiny_patch16_224", "--blocks", "1", "2", *SMALL], ".npz"),
    "tsne-maps": (["{run}", "deit_tiny_patch16_224", "--perplexity", "5", *SMALL], ".csv"),
    "tsne-classes": (["{run}", "--num-images", "40", "--perplexity", "5"], ".csv"),
    "word-maps": (["{run}", "--image", "digits/3"], ".npz"),
    "attention": (["{run}", "--image", "flower", "--kind", "word", "--sentence", "0", "1", "--word", "3", "2"], ".npz"),
    "positions": (["{run}"], ".npz"),
    "accuracy-cost": ([], ".csv"),
    "curves": (["{run}", "{run}/summary.csv"], ".csv"),
    "confusion": (["{data}/confusion.csv"], ".csv"),
}


def drawn(run_figures, run, folder, name, suffix=".png", *more):
    (folder / "confusion.csv").write_text(CONFUSION)
    argv, beside = FIGURES[name]
    picture = folder / "new" / f"{name}{suffix}"
    argv = [arg.format(run=run, data=folder) for arg in argv]
    out = run_figures(name, *argv, "--output", picture, "--dpi", 60, *more)
    assert out.status == 0, out.err
    assert f"{picture} and its numbers, {picture.with_suffix(beside)}" in out.out
    return picture, picture.with_suffix(beside)


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_is_a_picture_with_its_numbers(run_figures, digits_run, tmp_path, name):
    picture, beside = drawn(run_figures, digits_run, tmp_path, name)
    with Image.open(picture) as image:
        assert image.width > 100 and np.asarray(image.convert("L")).std() > 5  # something is on it
    if beside.suffix == ".npz":
        arrays = np.load(beside, allow_pickle=False)
        assert len(arrays.files) > 0 and all(arrays[key].size for key in arrays.files)
    else:
        with beside.open() as file:
            assert len(list(csv.DictReader(file))) > 1


@pytest.mark.parametrize("name", ["positions", "confusion"])
def test_svg(run_figures, digits_run, tmp_path, name):
    picture, _ = drawn(run_figures, digits_run, tmp_path, name, ".svg")
    assert b"<svg" in picture.read_bytes()


def test_attention_numbers_sum_to_one(run_figures, digits_run, tmp_path):
    _, beside = drawn(run_figures, digits_run, tmp_path, "attention")
    arrays = np.load(beside)
    assert arrays["block2_heads"].shape == (2, 4, 4) and np.allclose(arrays["block2_heads"].sum((1, 2)), 1, atol=1e-5)


def test_tsne_of_classes_names_the_classes(run_figures, digits_run, tmp_path):
    _, beside = drawn(run_figures, digits_run, tmp_path, "tsne-classes")
    with beside.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and {row["class"] for row in rows} <= set("0123456789")
    assert {(row["perplexity"], row["seed"]) for row in rows} == {("5.0", "0")}


def test_an_untrained_network_says_so(run_figures, tmp_path):
    argv = ["feature-maps", "deit_tiny_patch16_224", *SMALL, "--output", tmp_path / "f.png", "--dpi", 60]
    assert run_figures(*argv).status == 0
    assert np.load(tmp_path / "f.npz")["models"].tolist() == ["deit_tiny_patch16_224, untrained weights"]
    first = (tmp_path / "f.npz").read_bytes()
    assert run_figures(*argv).status == 0 and np.load(tmp_path / "f.npz")["model0_block12_maps"].any()
    assert (tmp_path / "f.npz").read_bytes() == first  # the seed holds for untrained weights too


def test_a_folder_of_images_has_a_picture_each(run_figures, digits_run, tmp_path):
    for name in ("a.png", "a.jpg"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (40, 50), "red").save(tmp_path / "photos" / name)
    argv = ["word-maps", digits_run, "--image", tmp_path / "photos", "--output", tmp_path / "w.png", "--dpi", 60]
    assert run_figures(*argv).status == 0
    assert {file.name for file in tmp_path.glob("w*.png")} == {"w-a_jpg.png", "w-a_png.png"}


def test_help_lists_the_figures(run_figures):
    out = run_figures("--help").out
    assert all(name in out for name in FIGURES)


@pytest.mark.parametrize(
    "argv, status, error",
    [
        (["curve"], 2, "curve: no such figure; perhaps you meant curves"),
        (["curves", "--output", "{data}/f.png"], 2, "nothing to draw; give a run folder or summary.csv"),
        (["curves", "{run}"], 2, "output: missing; say with --output"),
        (["curves", "{run}", "--output", "{data}/f.pdf"], 2, "f.pdf: expected a name that ends with .png or .svg"),
        (["curves", "{data}", "--output", "{data}/f.png"], 1, "summary.csv: not a readable table"),
        (["confusion", "{data}/no.csv", "--output", "{data}/f.png"], 1, "no.csv: not a readable table"),
        (["confusion", "a.csv", "b.csv", "--output", "{data}/f.png"], 2, "b.csv: confusion takes one input"),
        (["positions", "tnt_z", "--output", "{data}/f.png"], 2, "tnt_z: no such file, folder or model"),
        (["positions", "{data}", "--output", "{data}/f.png"], 1, "neither a run folder"),
        (["positions", "{run}", "--pretrained", "--output", "{data}/f.png"], 2, "has weights of its own"),
        (["positions", "resnet18", "--output", "{data}/f.png"], 1, "resnet18: has no learned positions"),
        (["word-maps", "{run}", "--image", "chin", "--output", "{data}/f.png"], 2, "chin: no such file or folder"),
        (["word-maps", "deit_tiny_patch16_224", "--output", "{data}/f.png"], 1, "has no words; pass a TNT"),
        (["word-maps", "{run}", "--blocks", "3", "--output", "{data}/f.png"], 2, "blocks: 3: {run} has blocks 1 to 2"),
        (["attention", "{run}", "--word", "0", "0", "--output", "{data}/f.png"], 2, "no effect with --kind class"),
        (["attention", "{run}", "--kind", "wrod", "--output", "{data}/f.png"], 2, "kind: 'wrod'"),
        (["attention", "{run}", "--img-size", "33", "--output", "{data}/f.png"], 1, "(33, 33) is not a multiple"),
        (["tsne-classes", "tnt_ti", "--output", "{data}/f.png"], 1, "data_dir: no data set given"),
        (["accuracy-cost", "--costs", "watts", "--output", "{data}/f.png"], 2, "costs"),
        (["accuracy-cost", "--no-published", "--output", "{data}/f.png"], 2, "no table to draw"),
        (["positions", "{run}", "--ouput", "f.png"], 2, "perhaps you meant --output"),
    ],
)
def test_mistakes_are_one_line(run_figures, digits_run, tmp_path, argv, status, error):
    names = dict(run=digits_run, data=tmp_path)
    out = run_figures(*(arg.format(**names) for arg in argv))
    (line,) = [line for line in out.err.splitlines() if line.startswith("error: ")]
    assert (out.status, error.format(**names) in line) == (status, True), line
    assert "Traceback" not in out.err and not list(tmp_path.glob("f.*"))


def test_the_samples_in_the_docs_have_commands_that_are_understood():
    spec = importlib.util.spec_from_file_location("figures_script", REPO / "scripts" / "figures.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (REPO / "docs" / "figures.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^python scripts/figures.py (.*)$", text, re.MULTILINE)
    drawn = set()
    for command in commands:
        name, *argv = shlex.split(command)
        _, own = script._parse(name, script.COMMANDS[name], argv)
        drawn.add(own.output)
    shown = {f"docs/{path}" for path in re.findall(r"!\[.*?\]\((.*?)\)", text)}
    assert shown and shown <= drawn and all((REPO / path).is_file() for path in shown)
    assert {command.split()[0] for command in commands} == set(FIGURES)
