"""scripts/figures.py: each figure once, as a user types it, and the mistakes that users make."""

import csv
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPO = Path(__file__).parents[2]
SMALL = ["--img-size", "32", "--image", "china"]
CONFUSION = ",a,b\na,3,1\nb,0,4\n"

FIGURES = {
    "feature-maps": (["{run}", "deit_tiny_patch16_224", "--blocks", "1", "2", *SMALL], ".npz"),
    "diversity": (["{run}", "deit_tiny_patch16_224", "--num-images", "40"], ".csv"),
    "tsne-maps": (["{run}", "deit_tiny_patch16_224", "--perplexity", "5", *SMALL], ".csv"),
    "tsne-classes": (["{run}", "--num-images", "40", "--perplexity", "5"], ".csv"),
    "word-maps": (["{run}", "--image", "digits/3"], ".npz"),
    "attention": (["{run}", "--image", "flower", "--kind", "word", "--sentence", "0", "1", "--word", "3", "2"], ".npz"),
    "positions": (["{run}"], ".npz"),
    "accuracy-cost": ([], ".csv"),
    "curves": (["{run}", "{run}/summary.csv"], ".csv"),
    "confusion": (["{data}/confusion.csv"], ".csv"),
    "growth": ([str(REPO / "benchmarks" / "growth_size.json"), str(REPO / "benchmarks" / "growth_batch.json")], ".csv"),
}


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def draw(run_figures, digits_run, tmp_path):
    """draw(name of a figure) -> path of the picture, its numbers: arrays by name, or rows"""

    def draw(name, suffix=".png"):
        (tmp_path / "confusion.csv").write_text(CONFUSION)
        argv, ending = FIGURES[name]
        picture = tmp_path / "new" / f"{name}{suffix}"
        argv = [arg.format(run=digits_run, data=tmp_path) for arg in argv]
        out = run_figures(name, *argv, "--output", picture, "--dpi", 60)
        assert out.status == 0, out.err
        numbers = picture.with_suffix(ending)
        assert f"{picture} and its numbers, {numbers}" in out.out
        return picture, dict(np.load(numbers, allow_pickle=False)) if ending == ".npz" else read_rows(numbers)

    return draw


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_is_a_picture_with_its_numbers(draw, name):
    picture, numbers = draw(name)
    with Image.open(picture) as image:
        assert image.width > 100 and np.asarray(image.convert("L")).std() > 5  # something is on it
    assert all(array.size for array in numbers.values()) if isinstance(numbers, dict) else len(numbers) > 1
    assert numbers


@pytest.mark.parametrize("name", ["positions", "confusion"])
def test_svg(draw, name):
    assert b"<svg" in draw(name, ".svg")[0].read_bytes()


def test_attention_numbers_sum_to_one(draw):
    heads = draw("attention")[1]["block2_heads"]
    assert heads.shape == (2, 4, 4) and np.allclose(heads.sum((1, 2)), 1, atol=1e-5)


def test_tsne_of_classes_names_the_classes(draw):
    _, rows = draw("tsne-classes")
    assert len(rows) == 40 and {row["class"] for row in rows} <= set("0123456789")
    assert {(row["perplexity"], row["seed"]) for row in rows} == {("5.0", "0")}


def test_an_untrained_network_says_so(run_figures, tmp_path):
    argv = ["feature-maps", "deit_tiny_patch16_224", *SMALL, "--output", tmp_path / "f.png", "--dpi", 60]
    assert run_figures(*argv).status == 0
    assert np.load(tmp_path / "f.npz")["models"].tolist() == ["deit_tiny_patch16_224, untrained weights"]
    first = (tmp_path / "f.npz").read_bytes()
    assert run_figures(*argv).status == 0 and np.load(tmp_path / "f.npz")["model0_block12_maps"].any()
    assert (tmp_path / "f.npz").read_bytes() == first  # the seed holds for untrained weights too


def test_a_damaged_image_of_a_labelled_set_is_an_error(run_figures, digits_run, make_folder, tmp_path):
    damaged = make_folder() / "val" / "bee" / "2.png"
    argv = ["tsne-classes", digits_run, "--data-dir", tmp_path / "data", "--output", tmp_path / "t.png", "--dpi", 60]
    assert run_figures(*argv).status == 0
    rows = read_rows(tmp_path / "t.csv")
    assert len(rows) == 12 and float(rows[0]["perplexity"]) == pytest.approx(11 / 3)
    damaged.write_bytes(b"no image")
    out = run_figures(*argv)
    assert out.status == 1 and f"{damaged}: not a readable image" in out.error and "repair or remove" in out.error


READ = {  # command line -> which of its files must stay as it is
    "confusion {data}/cm.csv --output {data}/cm.png": "cm.csv",
    "curves {data}/run/summary.csv --output {data}/run/summary.svg": "run/summary.csv",
    "curves {data}/run --output {data}/run/summary.png": "run/summary.csv",
    "accuracy-cost {data}/ours.csv --no-published --costs gmacs --output {data}/ours.png": "ours.csv",
    "accuracy-cost {data}/ours.csv --no-published --costs gmacs --output {data}/link.png": "ours.csv",
    "word-maps tnt_ti --image {data}/photos/a.png --output {data}/photos/a.png": "photos/a.png",
    "tsne-classes {digits} --data-dir {data}/set --output {data}/set/val/ant/0.png": "set/val/ant/0.png",
}


@pytest.mark.parametrize("command", READ)
def test_what_is_read_stays(run_figures, digits_run, make_folder, tmp_path, command):
    make_folder("set")
    for folder in ("run", "photos"):
        (tmp_path / folder).mkdir()
    (tmp_path / "cm.csv").write_text(CONFUSION)
    (tmp_path / "run" / "summary.csv").write_text("epoch,eval_top1\n0,10\n1,20\n")
    (tmp_path / "ours.csv").write_text("model,top1,gmacs,source\nmine,80.0,5.0,here\n")
    (tmp_path / "link.csv").symlink_to("ours.csv")
    Image.new("RGB", (40, 50), "red").save(tmp_path / "photos" / "a.png")
    kept = tmp_path / READ[command]
    before, files = kept.read_bytes(), sorted(tmp_path.rglob("*"))
    argv = shlex.split(command.format(data=tmp_path, digits=digits_run))
    errors = [run_figures(*argv).err for _ in range(2)]
    assert errors[0] == errors[1] and errors[0].count("error: ") == 1
    assert "would overwrite" in errors[0] or "lies in the dataset that is read" in errors[0]
    assert kept.read_bytes() == before and sorted(tmp_path.rglob("*")) == files
    argv[argv.index("--output") + 1] = str(tmp_path / "new" / "figure.png")
    for _ in range(2):
        assert run_figures(*argv, "--dpi", 40).status == 0
    assert kept.read_bytes() == before and list((tmp_path / "new").glob("figure*.png"))


def test_the_published_rows_stay(run_figures, tmp_path, monkeypatch):
    published = Path(shutil.copy(REPO / "tnt_timm" / "costs" / "published.csv", tmp_path))
    monkeypatch.setattr("tnt_timm.figures.accuracy_cost.PUBLISHED", (published,))
    before = published.read_bytes()
    out = run_figures("accuracy-cost", "--output", published.with_suffix(".png"))
    assert out.status == 2 and "would overwrite" in out.err
    assert published.read_bytes() == before and not published.with_suffix(".png").exists()


def test_few_points_have_a_perplexity_that_they_allow(run_figures, digits_run, tmp_path):
    argv = ["tsne-maps", digits_run, "resnet18", "--img-size", "64", "--output", tmp_path / "t.svg"]
    assert run_figures(*argv).status == 0
    used = {row["model"]: float(row["perplexity"]) for row in read_rows(tmp_path / "t.csv")}
    assert used == {"run (tnt_ti)": pytest.approx(23 / 3), "resnet18, untrained weights": 30}


def test_help_lists_the_figures(run_figures):
    out = run_figures("--help").out
    assert all(name in out for name in FIGURES)


@pytest.mark.parametrize(
    "argv, status, error",
    [
        (["curve"], 2, "curve: no such figure; perhaps you meant curves"),
        (["curves", "--output", "{data}/f.png"], 2, "the following arguments are required: RUN"),
        (["curves", "{run}"], 2, "output: missing; add --output"),
        (["curves", "{run}", "--output", "{data}/f.pdf"], 2, "f.pdf: expected a name that ends with .png or .svg"),
        (["curves", "{data}", "--output", "{data}/f.png"], 1, "summary.csv: not a readable table"),
        (["confusion", "{data}/no.csv", "--output", "{data}/f.png"], 1, "no.csv: not a readable table"),
        (["confusion", "a.csv", "b.csv", "--output", "{data}/f.png"], 2, "'b.csv': unexpected argument"),
        (["positions", "tnt_z", "--output", "{data}/f.png"], 2, "tnt_z: no such file, folder or model"),
        (["positions", "{data}", "--output", "{data}/f.png"], 1, "neither a run folder"),
        (["positions", "{run}", "--pretrained", "--output", "{data}/f.png"], 2, "has weights of its own"),
        (["positions", "resnet18", "--output", "{data}/f.png"], 1, "resnet18: has no learned positions"),
        (["word-maps", "{run}", "--image", "chin", "--output", "{data}/f.png"], 2, "chin: no such file; give a file"),
        (["word-maps", "deit_tiny_patch16_224", "--output", "{data}/f.png"], 1, "has no words; pass a TNT"),
        (["word-maps", "{run}", "--blocks", "3", "--output", "{data}/f.png"], 2, "blocks: 3: {run} has blocks 1 to 2"),
        (["attention", "{run}", "--word", "0", "0", "--output", "{data}/f.png"], 2, "no effect with --kind class"),
        (["attention", "{run}", "--kind", "wrod", "--output", "{data}/f.png"], 2, "kind: 'wrod'"),
        (["attention", "{run}", "--img-size", "33", "--output", "{data}/f.png"], 1, "(33, 33) is not a multiple"),
        (["tsne-classes", "tnt_ti", "--output", "{data}/f.png"], 1, "data_dir: no dataset given"),
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


DOCS = (REPO / "docs" / "figures.md").read_text().replace("\\\n", " ")
SAMPLES = {argv[argv.index("--output") + 1]: argv for argv in map(
    shlex.split, re.findall(r"^python scripts/figures.py (.*)$", DOCS, re.MULTILINE))}  # fmt: skip


def test_every_sample_in_the_docs_is_there_and_has_a_command():
    shown = {f"docs/{path}" for path in re.findall(r"!\[.*?\]\((.*?)\)", DOCS)}
    assert shown == set(SAMPLES) and all((REPO / path).is_file() for path in shown)
    assert {name for name, *_ in SAMPLES.values()} == set(FIGURES)


# Those that need no run, that take seconds, and that do not amplify rounding as t-SNE does.
@pytest.mark.parametrize("name", ["accuracy-cost", "confusion", "growth"])
def test_a_sample_in_the_docs_is_what_its_command_draws(run_figures, tmp_path, monkeypatch, name):
    redrawn = {f"{name}{ending}" for ending in (".png", FIGURES[name][1])}
    shutil.copytree(REPO / "docs" / "figures", tmp_path / "docs" / "figures", ignore=lambda *_: redrawn)
    shutil.copytree(REPO / "benchmarks", tmp_path / "benchmarks")
    monkeypatch.chdir(tmp_path)
    sample = Path(f"docs/figures/{name}.png")
    assert run_figures(*SAMPLES[str(sample)]).status == 0
    suffix = FIGURES[name][1]
    ours, theirs = (folder / sample.with_suffix(suffix) for folder in (tmp_path, REPO))
    with Image.open(sample) as new, Image.open(REPO / sample) as old:
        assert new.size == old.size
    if suffix == ".npz":
        ours, theirs = np.load(ours), np.load(theirs)
        assert ours.files == theirs.files
        for key in ours.files:
            assert np.allclose(ours[key], theirs[key], rtol=1e-2, atol=1e-2 * np.ptp(theirs[key])), key
    else:
        rows, expected = read_rows(ours), read_rows(theirs)
        assert len(rows) == len(expected) > 1
        for row, other in zip(rows, expected):
            assert row.keys() == other.keys()
            for cell, its in zip(row.values(), other.values()):
                assert cell == its or float(cell) == pytest.approx(float(its), rel=1e-3)
