"""validate_all.py writes the numbers of validate.py with timm's columns; ImageNet's other test sets in their own folders."""

import csv
import functools
import itertools
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from timm.data import ImageNetInfo, RealLabelsImagenet
from timm.models import register_model
from torch import nn

from tnt_timm.checkpoints import file_format
from tnt_timm.data import imagenet_sets
from tnt_timm.evaluation import validation

SHORT = "-b 6 --epochs 1 --lr 1e-3 --warmup-epochs 0 --cooldown-epochs 0 --workers 0".split()
HEADER = "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation"
SYNSETS = ImageNetInfo().label_names()


class Reader(nn.Module):
    """Read the class from an image's colour. The classes in `decoys` are always more probable."""

    num_classes = 1000

    pretrained_cfg = dict(input_size=(3, 8, 8), crop_pct=1.0, interpolation="nearest", mean=(0.0,) * 3, std=(1.0,) * 3)

    def __init__(self, decoys=()):
        super().__init__()
        self.decoys = list(decoys)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        red, green, _ = (images[:, :, 4, 4] * 255 / 8).round().long().unbind(1)
        logits = nn.functional.one_hot(red * 32 + green, 1000).float()
        logits[:, self.decoys] = 2.0
        return logits * self.weight


@register_model
def imagenet_reader(pretrained=False, **kwargs):
    return Reader()


@register_model
def imagenet_decoyed(pretrained=False, **kwargs):
    outside = set(range(1000)) - set(indices("a")) - set(indices("r"))
    return Reader(sorted(outside)[:9])


@register_model
def imagenet_broken(pretrained=False, **kwargs):
    raise RuntimeError("its weights cannot be\nfetched")


def indices(letter):
    return imagenet_sets.class_indices(f"imagenet-{letter}")


@pytest.fixture
def on_test_set(run_validate):
    """Run validate.py on one of ImageNet's other test sets."""

    def run(test_set, root, *more, model="imagenet_reader"):
        return run_validate(root, "--model", model, "--test-set", f"imagenet-{test_set}", "--workers", "0", *more)

    return run


@pytest.fixture
def run(run_script):
    return functools.partial(run_script, "validate_all")


def read(file):
    assert file.read_text().splitlines()[0] == HEADER
    return {row["model"]: row for row in csv.DictReader(file.open())}


# ------------------------------------------------------------------------------------------------- ImageNet's other test sets


def test_the_folders_of_v2_are_numbers(on_test_set, write_imagenet_v2, fill, tmp_path):
    root = write_imagenet_v2(tmp_path)
    fill(root, [(".ipynb_checkpoints", 3), ("__MACOSX/7", 7)])
    (root / "7/._0.jpeg").write_bytes(b"no image")
    (root / "7/up").symlink_to("..")
    out = on_test_set("v2", root)
    assert out.status == 0, out.err
    assert "top-1 100.000" in out.out and "(1000 images, each counted once)" in out.out


@pytest.mark.parametrize("letter", ["a", "r"])
def test_only_the_logits_of_200_classes_count(on_test_set, fill, tmp_path, letter):
    columns = indices(letter)
    root = fill(tmp_path / f"imagenet-{letter}", [(SYNSETS[index], index) for index in columns], "0.jpg")
    (root / "README.txt").write_text("part of the archive")
    for model in ("imagenet_reader", "imagenet_decoyed"):  # for which nine classes outside the set are more probable
        out = on_test_set(letter, root, model=model)
        assert out.status == 0, out.err
        assert "top-1 100.000" in out.out and "(200 images, each counted once)" in out.out

    for index, other in itertools.pairwise(columns[:51]):  # show the image of a neighbour
        fill.colour(other).save(root / SYNSETS[index] / "0.jpg", format="png")
    assert "top-1 75.000" in on_test_set(letter, root, model="imagenet_decoyed").out


def pixels(index):
    red, green = index // 32 * 8 / 255, index % 32 * 8 / 255
    return torch.tensor([red, green, 0.0])[:, None, None].expand(3, 8, 8)


def test_real_labels(on_test_set, fill, tmp_path):
    labels = RealLabelsImagenet(range(50_000)).real_labels
    several = [name for name in labels if len(labels[name]) > 1][:6]
    none = [name for name in labels if not labels[name]][:3]
    shown = [labels[name][-1] for name in several[:4]]  # correct, though not the class of the folder
    shown += [next(c for c in range(1000) if c not in labels[name]) for name in several[4:]]
    folder = tmp_path / "val" / SYNSETS[500]
    folder.mkdir(parents=True)
    for name, index in zip([*several, *none], [*shown, 7, 7, 7]):
        fill.colour(index).save(folder / name, format="png")
    (folder / "._0.JPEG").write_bytes(b"no image")
    (folder / "up").symlink_to("..")
    out = on_test_set("real", tmp_path, "-b", "4", "--results-file", tmp_path / "results.json")
    assert out.status == 0, out.err
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["num_images"] == 6 and found["top1"] == pytest.approx(100 * 4 / 6, abs=1e-4)

    # timm's own evaluator of these labels, over all its images
    timms = RealLabelsImagenet(list(labels))
    timms.filenames = [*several, *none]
    timms.add_result(Reader()(torch.stack([pixels(index) for index in [*shown, 7, 7, 7]])))
    assert (found["top1"], found["top5"]) == pytest.approx((timms.get_accuracy(1), timms.get_accuracy(5)), abs=1e-4)

    out = on_test_set("real", tmp_path, "--per-class")
    assert out.status == 2 and "test_set: imagenet-real: " in out.error


@pytest.mark.parametrize(
    "test_set, folders, line",
    [
        ("v2", ["0", "1", "10"], "imagenet-v2: holds no images of 100, 101, 102 and 994 more"),
        ("a", [*(SYNSETS[i] for i in indices("a")), "n00000001"], "none of its classes: n00000001"),
        ("r", ["cat"], "imagenet-r: holds no images of"),
        ("real", ["n01440764"], "0.jpeg: imagenet-real knows only ILSVRC2012_val_00000001.JPEG"),
    ],
    ids=["v2", "a", "r", "real"],
)
def test_other_layouts_are_refused(on_test_set, fill, tmp_path, test_set, folders, line):
    out = on_test_set(test_set, fill(tmp_path, [(folder, 0) for folder in folders]))
    assert out.status == 1 and line in out.error


def test_a_model_of_other_classes_is_refused(on_test_set, run_validate, fill, tmp_path):
    root = fill(tmp_path, [(SYNSETS[index], index) for index in indices("a")])
    out = on_test_set("a", root, "--num-classes", "200", model="resnet18")
    assert out.status == 1 and "has 200 classes and the data 1000" in out.error

    state = dict(arch="resnet18", model_kwargs={}, state_dict=timm.create_model("resnet18").state_dict())
    state |= dict(num_classes=1000, config=dict(model="resnet18", img_size=32), classes=SYNSETS[1:] + SYNSETS[:1])
    file_format.write(tmp_path / "other.pth.tar", state)
    arguments = ["--data-dir", root, "--test-set", "imagenet-a", "--workers", "0"]
    out = run_validate(tmp_path / "other.pth.tar", *arguments)
    assert out.status == 1 and "do not have the same classes" in out.error


# ---------------------------------------------------------------------------------------------------------------- many models


@pytest.fixture
def runs(train):
    """The data, and two run folders."""
    one, two = (train(*SHORT, "--seed", seed, name=name)[1] for name, seed in (("one", "1"), ("two", "2")))
    return file_format.read(one / "last.pth.tar")["config"]["data_dir"], one, two


@pytest.fixture
def file(tmp_path):
    return tmp_path / "results.csv"


def test_the_numbers_of_validate_with_timms_columns(run, runs, file, run_validate, tmp_path):
    data, one, two = runs
    status, out, err = run(one, two, "--data-dir", data, "--results-file", file)
    assert (status, err) == (0, "")
    rows = read(file)
    assert set(rows) == {str(one), str(two)}
    for folder in (one, two):
        run_validate(folder, "--results-file", tmp_path / "one.json")
        exact, row = json.loads((tmp_path / "one.json").read_text()), rows[str(folder)]
        assert row["top1"] == f"{exact['top1']:.3f}" and row["top5_err"] == "0.000"
        assert float(row["top1"]) + float(row["top1_err"]) == pytest.approx(100, abs=2e-3)
        assert [row[key] for key in HEADER.split(",")[5:]] == [f"{exact['param_count']:.2f}", "32", "0.900", "bicubic"]
    accuracies = [float(row["top1"]) for row in rows.values()]
    assert accuracies == sorted(accuracies, reverse=True)


def test_it_resumes_after_an_interruption(run, runs, file, monkeypatch):
    data, one, two = runs
    places, real = [], validation.validate_model

    def validate_model(source, *rest):
        places.append(source.place)
        if len(places) == 2:
            raise KeyboardInterrupt
        return real(source, *rest)

    monkeypatch.setattr(validation, "validate_model", validate_model)
    command = [one, two, "--data-dir", data, "--results-file", file]
    assert run(*command)[0] == 130
    before = read(file)
    assert set(before) == {str(one)} and len(places) == 2
    status, out, _ = run(*command)
    assert status == 0 and f"{one}: is in {file} already" in out
    assert len(places) == 3 and str(two) in places[2]
    assert set(read(file)) == {str(one), str(two)} and read(file)[str(one)] == before[str(one)]


def test_a_row_holds_for_the_same_settings_and_weights_only(run, runs, file, monkeypatch):
    data, folder, two = runs
    one, parent = Path("one"), folder.parent
    monkeypatch.chdir(parent)

    def given(source=one, *more):
        status, out, err = run(source, "--data-dir", data, "--results-file", file, *more)
        assert (status, err, list(read(file))) == (0, "", [str(one)]), err
        return [line.removeprefix(f"{one}: ") for line in out.splitlines() if line.startswith(f"{one}: ")]

    up_to_date = [f"is in {file} already"]
    assert [line[:5] for line in given()] == ["top-1"]
    for other_way in ("one/", "./two/../one", folder, f"../{parent.name}/one/."):
        assert given(other_way, "-b", "3", "--data-dir", f"{data}/") == up_to_date
    for more, why in (
        (["--crop-pct", "0.5"], "crop_pct was None and is 0.5"),
        (["--img-size", "32", "--no-use-ema"], "use_ema was None and is False"),
    ):
        lines = given(one, *more)
        assert "measured again: " in lines[0] and why in lines[0] and lines[1][:5] == "top-1"
        assert given(one, *more) == up_to_date
    assert "crop_pct" not in given()[0]

    shutil.copy(two / "model_best.pth.tar", one / "model_best.pth.tar")  # as if trained again
    assert given()[0] == "measured again: the weights have changed"
    file.write_text(file.read_text().replace(",32,", ",33,"))
    assert given()[0] == f"measured again: {file}.json has no record of this row"
    assert given() == up_to_date


def test_rows_of_other_data_are_not_mixed(run, runs, file, make_folder):
    data, one, _ = runs
    records = file.with_name("results.csv.json")
    command = [one, "--data-dir", data, "--results-file", file]
    assert run(*command)[0] == 0
    other = make_folder("other")

    def refused(*more):
        before = file.read_text(), records.read_text()
        status, out, err = run(*command, *more)
        assert (status, out, err.count("\n")) == (1, "", 1) and f"results_file: {file}: " in err
        assert (file.read_text(), records.read_text()) == before
        return err

    assert f"data_dir was {data!r} and is {str(other)!r}; choose another file" in refused("--data-dir", other)
    assert "val_split was 'validation' and is 'train'" in refused("--val-split", "train")
    added = Path(data) / "val" / "ant" / "one_more.png"
    shutil.copy(added.with_name("0.png"), added)
    assert "images was 12 and is 13" in refused()
    added.unlink()
    records.write_text("{}")
    assert "results.csv.json, which records the dataset of its rows, is missing or damaged" in refused()
    file.unlink()  # without rows, a new file is started
    assert run(*command)[0] == 0


def test_failing_models_are_named_and_skipped(run, file, write_imagenet_v2, tmp_path):
    root, bad = write_imagenet_v2(tmp_path), tmp_path / "bad.pth.tar"
    bad.write_bytes(b"nothing")
    (tmp_path / "list.txt").write_text(f"# these\nimagenet_broken\n\n{bad}\nimagenet_reader\n")
    arguments = ["--data-dir", root, "--test-set", "imagenet-v2", "--results-file", file, "--workers", "0"]
    status, out, err = run(tmp_path / "list.txt", "imagenet_reader", *arguments)
    assert status == 1 and "Traceback" not in err
    assert "failed: imagenet_broken: model: imagenet_broken: its weights cannot be fetched" in out
    assert f"failed: {bad}" in out
    assert err.startswith("error: 2 of 3 models failed: imagenet_broken, ") and err.count("\n") == 1
    assert {name: row["top1"] for name, row in read(file).items()} == {"imagenet_reader": "100.000"}


@pytest.mark.parametrize(
    "argv, status, line",
    [
        ("", 2, "MODEL"),
        ("tnt_s", 2, "results_file: missing"),
        ("tnt_s --results-file /no/such/folder/r.csv", 2, "/no/such/folder/r.csv: no such folder"),
        ("tnt_s --results-file FILE", 2, "data_dir: missing"),
        ("tnt_q --results-file FILE --data-dir .", 2, "'tnt_q': no such model; perhaps you meant tnt_"),
        ("nix* --results-file FILE --data-dir .", 2, "nix*: no model with published weights"),
        ("tnt_s --results-file FILE --data-dir /no/data", 1, "/no/data: no such folder"),
        ("tnt_s --results-file OTHER --data-dir .", 1, "not a results file"),
        ("tnt_s --results-file FILE --data-dir . --test-set imagenet-z", 2, "test_set: 'imagenet-z'"),
    ],
)
def test_mistakes_are_one_line(run, file, tmp_path, argv, status, line):
    other = tmp_path / "other.csv"
    other.write_text("name,value\na,1\n")
    found, _, err = run(*({"FILE": file, "OTHER": other}.get(arg, arg) for arg in argv.split()))
    assert found == status and line in err and err.count("\n") == 1
    assert other.read_text() == "name,value\na,1\n" and not file.exists()
