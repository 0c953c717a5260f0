"""scripts/predict.py names what validate.py would see of an image, and skips images that cannot be read."""

import csv
import functools
import http.server
import json
import math
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tnt_timm.commands.train import main as train
from tnt_timm.commands.validate import main as validate
from tnt_timm.errors import UserError
from tnt_timm.evaluation import downloads, image_files
from tnt_timm.evaluation.prediction import class_names

SHORT = "-b 6 --epochs 1 --lr 1e-3 --warmup-epochs 0 --cooldown-epochs 0 --workers 0 --crop-pct 0.8".split()
CLASSES = ["ant", "bee", "cat"]


@pytest.fixture
def run_predict(run_script):
    return functools.partial(run_script, "predict")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders of random images of many sizes."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for label in CLASSES:
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (*rng.integers(20, 70, 2), 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(folder, tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    assert train([str(folder), *tiny, *SHORT, "--output", str(output), "--experiment", "run"]) == 0
    return output / "run"


def test_probabilities_are_what_validation_sees(run_predict, trained, folder, tmp_path, capfd):
    status, out, err = run_predict(trained, folder / "val", "--top-k", "3", "--format", "json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert [Path(entry["image"]).parent.name for entry in found] == sorted(3 * CLASSES)
    losses, hits = [], 0
    for entry in found:
        probabilities = {p["class"]: p["probability"] for p in entry["predictions"]}
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        assert sum(probabilities.values()) == pytest.approx(1) and set(probabilities) == set(CLASSES)
        label = Path(entry["image"]).parent.name
        losses.append(-math.log(probabilities[label]))
        hits += entry["predictions"][0]["class"] == label
    assert validate([str(trained), "--results-file", str(tmp_path / "results.json")]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["loss"] == pytest.approx(sum(losses) / 9, abs=1e-6)
    assert results["top1"] == pytest.approx(100 * hits / 9, abs=1e-4)


@pytest.mark.parametrize("files", [["model_best.pth.tar"], ["config.json", "model.safetensors"]])
def test_sources_and_formats_agree(run_predict, trained, folder, tmp_path, files):
    """A run folder, a checkpoint and a folder of timm's; another batch size and other workers change nothing."""
    _, expected, _ = run_predict(trained, folder / "val", "--format", "csv", "-k", "1")
    for name in files:
        shutil.copy(trained / name, tmp_path)
    source, output = tmp_path / files[0] if len(files) == 1 else tmp_path, tmp_path / "output"
    more = ["-b", "2", "-j", "2", "--output", output]
    status, out, _ = run_predict(source, folder / "val", "--format", "csv", "-k", "1", *more)
    assert (status, out) == (0, "")
    one, two = (list(csv.DictReader(text.splitlines())) for text in (expected, output.read_text()))
    probabilities = [[float(row.pop("probability")) for row in rows] for rows in (one, two)]
    assert one == two and len(one) == 9 and probabilities[0] == pytest.approx(probabilities[1], abs=2e-6)

    status, out, err = run_predict(trained, folder / "val" / "ant" / "0.png", "--top-k", "9")
    image, rank, name, *_ = out.splitlines()[1].split()
    assert (image.endswith("0.png"), rank, name) == (True, "1", one[0]["class"])
    assert status == 0 and len(out.splitlines()) == 4
    assert err == "notice: top_k: 9: the model has 3 classes; all are shown\n"


# ----------------------------------------------------------------------------------------------------- images of all kinds


def one(out):
    (entry,) = json.loads(out)
    return {p["class"]: p["probability"] for p in entry["predictions"]}


@pytest.fixture
def pixels():
    return np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture
def ask(run_predict, trained, tmp_path):
    """Save an image and return its probabilities by class, and stderr."""

    def ask(image, name="image.png", *more, **options):
        image.save(tmp_path / name, **options)
        status, out, err = run_predict(trained, tmp_path / name, "--format", "json", *more)
        assert status == 0, err
        return one(out), err

    return ask


@pytest.mark.parametrize("mode, name", [("CMYK", "i.tiff"), ("P", "i.png"), ("RGBA", "i.webp"), ("LA", "i.png")])
def test_colour_modes_become_rgb(ask, pixels, mode, name):
    image = Image.fromarray(pixels).convert(mode)
    options = dict(lossless=True, exact=True) if name.endswith("webp") else {}
    found, _ = ask(image, name, **options)
    assert found == pytest.approx(ask(image.convert("RGB"))[0], abs=1e-6)


def test_16_bits_are_scaled_to_8(ask, pixels):
    eight = pixels[:, :, 0]
    deep = Image.fromarray(eight.astype(np.uint16) * 256 + 77)
    assert ask(deep)[0] == pytest.approx(ask(Image.fromarray(eight))[0], abs=1e-6)


def test_the_exif_rotation_is_applied_on_request(ask, pixels):
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    as_stored, err = ask(image, "photo.png", exif=exif)
    assert err == "notice: images rotated by their EXIF data: 1; pass --upright to apply the rotation\n"
    assert as_stored == pytest.approx(ask(image)[0], abs=1e-6)
    upright, err = ask(image, "photo.png", "--upright", exif=exif)
    turned = ask(image.transpose(Image.Transpose.ROTATE_270))[0]
    assert upright == pytest.approx(turned, abs=1e-6) and err == ""
    assert max(abs(upright[name] - as_stored[name]) for name in CLASSES) > 1e-4


def test_damaged_exif_data(run_predict, trained, pixels, tmp_path, monkeypatch):
    """It is no damage for training and validation, so neither here, unless the rotation counts."""
    Image.fromarray(pixels).save(tmp_path / "photo.png")

    def getexif(image):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", getexif)
    assert run_predict(trained, tmp_path / "photo.png")[::2] == (0, "")
    status, _, err = run_predict(trained, tmp_path / "photo.png", "--upright")
    assert status == 1 and "photo.png: its EXIF data is damaged, so its rotation is unknown (not a TIFF file)" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model-kwargs", "img_size=64"], ""),
        (["--model-kwargs", "in_chans=1"], "in_chans: tnt_ti takes images of 1 channels, but images are read as RGB"),
    ],
)
def test_arguments_of_the_model_are_fitted_or_refused(run_predict, trained, folder, arguments, expected):
    status, _, err = run_predict(trained, folder / "val" / "ant" / "0.png", *arguments)
    assert status == bool(expected) and expected in err and "Traceback" not in err


def test_unreadable_images_are_named_and_skipped(run_predict, trained, folder, tmp_path):
    photos = tmp_path / "photos"
    (photos / "deep" / "er").mkdir(parents=True)
    good = (folder / "val" / "ant" / "0.png").read_bytes()
    (photos / "deep" / "er" / "good, 1.png").write_bytes(good)
    (photos / "cut.png").write_bytes(good[: len(good) // 2])
    (photos / "empty.jpg").touch()
    (photos / "text.jpeg").write_text("no image")
    (photos / "notes.txt").write_text("not meant as one")
    (photos / "photo.xyz").write_bytes(good)
    (photos / "._cut.png").write_text("of an operating system")
    (photos / "deep" / "back").symlink_to(photos)  # a loop
    status, out, err = run_predict(trained, photos, tmp_path / "gone.png", "--format", "csv", "-k", "1", "-b", "2")
    assert status == 1 and "Traceback" not in err
    assert [row["image"] for row in csv.DictReader(out.splitlines())] == [str(photos / "deep" / "er" / "good, 1.png")]
    *lines, last = err.splitlines()
    assert lines[0] == "notice: files left out: 1 .xyz, 1 hidden"
    for line, name in zip(lines[1:], ["cut.png", "empty.jpg", "text.jpeg", "gone.png"]):
        assert line.startswith("skipped: ") and f"{name}: " in line
    assert last == "error: 4 of 5 images could not be read; they are listed above" and len(lines) == 5


def test_file_names_of_any_bytes(run_predict, trained, folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in (b"caf\xe9.png", b"a\nb.png", b"c\x1b[31md.png"):
        shutil.copy(folder / "val" / "ant" / "0.png", os.fsencode(photos) + b"/" + name)
    (photos / "e\x1b[0m.png").write_text("no image")
    status, out, err = run_predict(trained, photos, "-k", "1")
    assert status == 1 and "\x1b" not in out + err and "skipped: " in err
    lines = out.splitlines()
    assert [line.split()[0].rpartition("/")[2] for line in lines[1:]] == [
        "a\\nb.png",
        "c\\x1b[31md.png",
        "caf\\xe9.png",
    ]
    for format in ("csv", "json", "table"):
        status, out, err = run_predict(
            trained, photos, "-k", "1", "--format", format, "--output", tmp_path / f"found.{format}"
        )
        assert status == 1 and out == ""
    assert b"caf\xe9.png,1," in (tmp_path / "found.csv").read_bytes()
    names = [os.fsencode(Path(entry["image"]).name) for entry in json.loads((tmp_path / "found.json").read_text())]
    assert names == [b"a\nb.png", b"c\x1b[31md.png", b"caf\xe9.png"]


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404 if self.path == "/gone.png" else 200)
        self.send_header("Content-Length", str(len(self.image)))
        self.end_headers()
        if self.path == "/slow.png":
            time.sleep(5)
        self.wfile.write(self.image[:50] if self.path == "/cut.png" else self.image)

    def log_message(self, *args):
        pass


def test_urls(run_predict, trained, folder, monkeypatch):
    monkeypatch.setattr(image_files, "download", functools.partial(downloads.download, total_s=1))
    image = folder / "val" / "bee" / "0.png"
    Server.image = image.read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        urls = [f"{base}/{name}.png" for name in ("good", "gone", "cut", "slow")]
        urls[0] = urls[0].replace("http", "HTTP")
        status, out, err = run_predict(trained, *urls, "--format", "json")
        server.shutdown()
    assert status == 1 and one(out) == pytest.approx(one(run_predict(trained, image, "--format", "json")[1]))
    assert f"skipped: {urls[1]}: HTTP Error 404" in err and f"skipped: {urls[2]}: download incomplete" in err
    assert f"skipped: {urls[3]}: the download was not complete after 1 s" in err
    assert "error: 3 of 4 images could not be read" in err

    status, out, err = run_predict(trained, urls[0])  # nobody listens any more
    assert (status, out) == (1, "") and f"skipped: {urls[0]}: " in err and "1 of 1 images" in err


@pytest.mark.parametrize(
    "argv, status, line",
    [
        ("RUN", 2, "IMAGE"),
        ("RUN IMAGE --top-k 0", 2, "top_k"),
        ("RUN IMAGE --format xml", 2, "expected 'table', 'json' or 'csv'"),
        ("RUN IMAGE --output /no/such/place", 2, "/no/such/place: no such folder"),
        ("RUN /no/such/image.png", 1, "/no/such/image.png: no such file or folder"),
        ("RUN ftp://host/image.png", 1, "of URLs only http:// and https:// are read, not ftp:; download it first"),
        ("RUN EMPTY", 1, "no images found"),
        ("tnt_q IMAGE", 2, "tnt_q: no such file, folder or model; perhaps you meant tnt_"),
        ("resnet18 IMAGE", 1, "resnet18: has no weights; pass --pretrained"),
        ("IMAGE IMAGE", 1, "not a readable checkpoint"),
    ],
)
def test_mistakes_are_one_line(run_predict, trained, folder, tmp_path, argv, status, line):
    places = {"RUN": trained, "IMAGE": folder / "val" / "ant" / "0.png", "EMPTY": tmp_path}
    found, out, err = run_predict(*(places.get(arg, arg) for arg in argv.split()))
    assert (found, out) == (status, "") and line in err and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------- names of classes


@pytest.fixture
def names_of_resnet(run_predict, folder, tmp_path):
    """Return the class names that predict.py shows for an untrained ResNet-18 by index, and stderr."""

    def names(num_classes):
        torch.save(timm.create_model("resnet18", num_classes=num_classes).state_dict(), tmp_path / "weights.pth")
        arguments = [tmp_path / "weights.pth", folder / "val" / "ant" / "0.png", "--model", "resnet18"]
        status, out, err = run_predict(*arguments, "-k", num_classes, "--format", "json")
        assert status == 0
        return {p["index"]: p["class"] for p in json.loads(out)[0]["predictions"]}, err

    return names


def test_imagenets_classes_are_named_by_words(names_of_resnet):
    names, _ = names_of_resnet(1000)
    assert names[0] == "n01440764 tench, Tinca tinca" and names[999].startswith("n15075141 toilet tissue")


def test_classes_without_names_are_numbered(names_of_resnet):
    names, err = names_of_resnet(7)
    assert set(names.values()) == set("0123456")
    assert "notice: the model has no class names; classes are numbered from 0" in err


def test_a_checkpoints_own_classes_keep_their_order():
    model = timm.create_model("resnet18", num_classes=2, device="meta")
    assert class_names(model, ["n02123045", "mine"]) == ["n02123045 tabby, tabby cat", "mine"]
    with pytest.raises(UserError, match="names 3 classes but its model has 2"):
        class_names(model, CLASSES)
