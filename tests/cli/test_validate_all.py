"""validate_all.py: the numbers of validate.py in timm's layout; ImageNet's other test sets, each in its own folders."""

import csv
import functools
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
from tnt_timm.commands.train import train
from tnt_timm.data import imagenet_sets
from tnt_timm.evaluation import validation

SHORT = "-b 6 --epochs 1 --lr 1e-3 --warmup-epochs 0 --cooldown-epochs 0 --workers 0".split()
HEADER = "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation"
SYNSETS = ImageNetInfo().label_names()


class Reader(nn.Module):
    """Knows the class from an image's colour; what `decoys` says is always more probable."""

    num_classes = 1000

    def __init__(self, decoys=()):
        super().__init__()
        self.decoys = list(decoys)
        self.weight = nn.Parameter(torch.ones(1))
        self.pretrained_cfg = dict(
            input_size=(3, 8, 8), crop_pct=1.0, interpolation="nearest", mean=(0.0,) * 3, std=(1.0,) * 3
        )

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
    opened = imagenet_sets._listed(f"imagenet_{letter}_indices.txt")
    return [int(index) for index in opened]


@pytest.fixture
def run(run_script):
    return functools.partial(run_script, "validate_all")


def read(file):
    assert file.read_text().splitlines()[0] == HEADER
    return {row["model"]: row for row in csv.DictReader(file.open())}


# ------------------------------------------------------------------------------------------------- ImageNet's other test sets


def test_v2s_folders_are_numbers(run_validate, write_imagenet_v2, tmp_path):
    out = run_validate(
        write_imagenet_v2(tmp_path), "--model", "imagenet_reader", "--test-set", "imagenet-v2", "--workers", "0"
    )
    assert out.status == 0, out.err
    assert "top-1 100.000" in out.out and "(1000 images, each counted once)" in out.out


@pytest.mark.parametrize("letter", ["a", "r"])
def test_only_the_logits_of_200_classes_count(run_validate, fill, tmp_path, letter):
    columns = indices(letter)
    root = fill(tmp_path / f"imagenet-{letter}", [(SYNSETS[index], index) for index in columns], "0.jpg")
    (root / "README.txt").write_text("as it comes")
    for model in ("imagenet_reader", "imagenet_decoyed"):  # to which nine classes outside the set are more probable
        out = run_validate(root, "--model", model, "--test-set", f"imagenet-{letter}", "--workers", "0")
        assert out.status == 0, out.err
        assert "top-1 100.000" in out.out and "(200 images, each counted once)" in out.out

    wrong = columns[:50]  # and 50 that are taken for their neighbour
    for index, other in zip(wrong, columns[1:]):
        fill.colour(other).save(root / SYNSETS[index] / "0.jpg", format="png")
    out = run_validate(root, "--model", "imagenet_decoyed", "--test-set", f"imagenet-{letter}", "--workers", "0")
    assert "top-1 75.000" in out.out


def test_real_labels(run_validate, fill, tmp_path):
    labels = RealLabelsImagenet(range(50_000)).real_labels
    several = [name for name in labels if len(labels[name]) > 1][:6]
    none = [name for name in labels if not labels[name]][:3]
    shown = [labels[name][-1] for name in several[:4]]  # right, though not what the folder says
    shown += [next(c for c in range(1000) if c not in labels[name]) for name in several[4:]]
    for name, index in [*zip(several, shown), *((name, 7) for name in none)]:
        (tmp_path / "val" / SYNSETS[500]).mkdir(parents=True, exist_ok=True)
        fill.colour(index).save(tmp_path / "val" / SYNSETS[500] / name, format="png")
    results = tmp_path / "results.json"
    arguments = ["--model", "imagenet_reader", "--test-set", "imagenet-real", "--workers", "0", "-b", "4"]
    out = run_validate(tmp_path, *arguments, "--results-file", results)
    assert out.status == 0, out.err
    found = json.loads(results.read_text())
    assert found["num_images"] == 6 and found["top1"] == pytest.approx(100 * 4 / 6, abs=1e-4)

    # as timm's own evaluator of these labels, over all its images, counts
    timms = RealLabelsImagenet(list(labels))
    timms.filenames = [*several, *none]
    timms.add_result(Reader()(torch.stack([pixels(index) for index in [*shown, 7, 7, 7]])))
    assert (found["top1"], found["top5"]) == pytest.approx((timms.get_accuracy(1), timms.get_accuracy(5)), abs=1e-4)


def pixels(index):
    red, green = index // 32 * 8 / 255, index % 32 * 8 / 255
    return torch.tensor([red, green, 0.0])[:, None, None].expand(3, 8, 8)


@pytest.mark.parametrize(
    "test_set, folders, line",
    [
        ("imagenet-v2", ["0", "1", "10"], "imagenet-v2: holds no images of 100, 101, 102 and 994 more"),
        ("imagenet-a", [*(SYNSETS[i] for i in indices("a")), "n00000001"], "what is no class of it: n00000001"),
        ("imagenet-r", ["cat"], "imagenet-r: holds no images of"),
        ("imagenet-real", ["n01440764"], "0.jpeg: imagenet-real knows only ILSVRC2012_val_00000001.JPEG"),
    ],
    ids=["v2", "a", "r", "real"],
)
def test_other_layouts_are_refused(run_validate, fill, tmp_path, test_set, folders, line):
    fill(tmp_path, [(folder, 0) for folder in folders])
    out = run_validate(tmp_path, "--model", "imagenet_reader", "--test-set", test_set, "--workers", "0")
    assert out.status == 1 and line in out.error


def test_a_model_of_other_classes_is_refused(run_validate, fill, tmp_path):
    root = fill(tmp_path, [(SYNSETS[index], index) for index in indices("a")])
    arguments = ["--test-set", "imagenet-a", "--workers", "0"]
    out = run_validate(root, "--model", "resnet18", "--num-classes", "200", *arguments)
    assert out.status == 1 and "has 200 classes and the data 1000" in out.error

    model = timm.create_model("resnet18")
    state = dict(arch="resnet18", model_kwargs={}, state_dict=model.state_dict(), num_classes=1000)
    state |= dict(config=dict(model="resnet18", img_size=32), classes=SYNSETS[1:] + SYNSETS[:1])
    file_format.write(tmp_path / "other.pth.tar", state)
    out = run_validate(tmp_path / "other.pth.tar", "--data-dir", root, *arguments)
    assert out.status == 1 and "do not have the same classes" in out.error


# ---------------------------------------------------------------------------------------------------------------- many models


@pytest.fixture
def runs(run_train, make_folder, tiny, tmp_path):
    data = make_folder()
    for name, seed in (("one", "1"), ("two", "2")):
        argv = [str(data), *tiny, *SHORT, "--seed", seed, "--output", str(tmp_path), "--experiment", name]
        assert train(argv) == 0
    return data, tmp_path / "one", tmp_path / "two"


def test_the_numbers_of_validate_in_timms_layout(run, runs, run_validate, tmp_path):
    data, one, two = runs
    file = tmp_path / "results.csv"
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


def test_it_goes_on_where_it_was_stopped(run, runs, tmp_path, monkeypatch):
    data, one, two = runs
    file, measured = tmp_path / "results.csv", []
    real = validation.measure

    def measure(subject, *rest):
        measured.append(subject.place)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(subject, *rest)

    monkeypatch.setattr(validation, "measure", measure)
    command = [one, two, "--data-dir", data, "--results-file", file]
    assert run(*command)[0] == 130
    assert set(read(file)) == {str(one)} and len(measured) == 2
    before = read(file)[str(one)]
    status, out, _ = run(*command)
    assert status == 0 and f"{one}: is in {file} already" in out
    assert len(measured) == 3 and str(two) in measured[2]
    assert set(read(file)) == {str(one), str(two)} and read(file)[str(one)] == before


def test_a_row_holds_for_the_same_settings_and_weights_only(run, runs, tmp_path, monkeypatch):
    (data, _, two), one = runs, Path("one")
    file = tmp_path / "results.csv"
    monkeypatch.chdir(tmp_path)

    def given(subject=one, *more):
        status, out, err = run(subject, "--data-dir", data, "--results-file", file, *more)
        assert (status, err, list(read(file))) == (0, "", [str(one)]), err
        return [line.removeprefix(f"{one}: ") for line in out.splitlines() if line.startswith(f"{one}: ")]

    assert [line[:5] for line in given()] == ["top-1"]
    first = read(file)
    for other_way in ("one/", "./two/../one", tmp_path / "one", f"../{tmp_path.name}/one/."):
        assert given(other_way, "-b", "3", "--data-dir", f"{data}/") == [f"is in {file} already"]
    for more, why in (
        (["--crop-pct", "0.5"], "crop_pct was None and is 0.5"),
        (["--img-size", "32", "--no-use-ema"], "crop_pct was 0.5 and is None, use_ema was None and is False"),
    ):
        lines = given(one, *more)
        assert "measured again: " in lines[0] and why.split(", ")[-1] in lines[0] and lines[1][:5] == "top-1"
        assert given(one, *more) == [f"is in {file} already"]
    assert "crop_pct" not in given()[0]

    shutil.copy(two / "model_best.pth.tar", one / "model_best.pth.tar")  # as if trained again
    assert given()[0] == "measured again: the weights are others"
    file.write_text(file.read_text().replace(",32,", ",33,"))
    assert "measured again: what it was measured with is not in" in given()[0]
    assert given() == [f"is in {file} already"] and first.keys() == read(file).keys()


def test_rows_of_other_data_are_not_mixed(run, runs, make_folder, tmp_path):
    data, one, _ = runs
    file = tmp_path / "results.csv"
    assert run(one, "--data-dir", data, "--results-file", file)[0] == 0
    before = file.read_text(), (tmp_path / "results.csv.json").read_text()
    other = make_folder("other")

    def refused(*argv):
        status, out, err = run(one, "--results-file", file, *argv)
        assert (status, out, err.count("\n")) == (1, "", 1) and f"results_file: {file}: " in err
        assert (file.read_text(), (tmp_path / "results.csv.json").read_text()) == before
        return err

    assert f"data_dir was {str(data)!r} and is {str(other)!r}; name another file" in refused("--data-dir", other)
    assert "val_split was 'validation' and is 'train'" in refused("--data-dir", data, "--val-split", "train")
    added = data / "val" / "ant" / "one_more.png"
    shutil.copy(data / "val" / "ant" / "0.png", added)
    assert "images was 12 and is 13" in refused("--data-dir", data)
    added.unlink()
    (tmp_path / "results.csv.json").write_text("{}")
    before = before[0], "{}"
    assert "results.csv.json, which says what its rows were measured on, is missing or damaged" in refused(
        "--data-dir", data
    )
    file.unlink()  # then there is nothing to go on with
    assert run(one, "--data-dir", data, "--results-file", file)[0] == 0


def test_failing_models_are_named_and_left_out(run, write_imagenet_v2, tmp_path):
    root = write_imagenet_v2(tmp_path)
    (tmp_path / "bad.pth.tar").write_bytes(b"nothing")
    (tmp_path / "list.txt").write_text(f"# these\nimagenet_broken\n\n{tmp_path / 'bad.pth.tar'}\nimagenet_reader\n")
    file = tmp_path / "results.csv"
    arguments = ["--data-dir", root, "--test-set", "imagenet-v2", "--results-file", file, "--workers", "0"]
    status, out, err = run(tmp_path / "list.txt", "imagenet_reader", *arguments)
    assert status == 1 and "Traceback" not in err
    assert "failed: imagenet_broken: model: imagenet_broken: its weights cannot be fetched" in out
    assert "failed: " + str(tmp_path / "bad.pth.tar") in out
    assert err.startswith("error: 2 of 3 models failed: imagenet_broken, ") and err.count("\n") == 1
    assert {name: row["top1"] for name, row in read(file).items()} == {"imagenet_reader": "100.000"}


@pytest.mark.parametrize(
    "argv, status, line",
    [
        ([], 2, "MODEL"),
        (["tnt_s"], 2, "results_file: missing"),
        (["tnt_s", "--results-file", "/no/such/folder/r.csv"], 2, "/no/such/folder/r.csv: no such folder"),
        (["tnt_s", "--results-file", "FILE"], 2, "data_dir: missing"),
        (["tnt_q", "--results-file", "FILE", "--data-dir", "."], 2, "'tnt_q': no such model; perhaps you meant tnt_"),
        (["nix*", "--results-file", "FILE", "--data-dir", "."], 2, "nix*: no model with published weights"),
        (["tnt_s", "--results-file", "FILE", "--data-dir", "/no/data"], 1, "/no/data: no such folder"),
        (["tnt_s", "--results-file", "OTHER", "--data-dir", "."], 1, "is no file of results"),
        (
            ["tnt_s", "--results-file", "FILE", "--data-dir", ".", "--test-set", "imagenet-z"],
            2,
            "test_set: 'imagenet-z'",
        ),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, argv, status, line):
    (tmp_path / "other.csv").write_text("name,value\na,1\n")
    places = {"FILE": tmp_path / "results.csv", "OTHER": tmp_path / "other.csv"}
    found, _, err = run(*(places.get(arg, arg) for arg in argv))
    assert found == status and line in err and err.count("\n") == 1
    assert (tmp_path / "other.csv").read_text() == "name,value\na,1\n" and not (tmp_path / "results.csv").exists()
