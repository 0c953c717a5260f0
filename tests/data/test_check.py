"""`tnt-check` on real files: what it finds, what it leaves alone, and how it ends."""

import fcntl
import json
import multiprocessing
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tnt_timm.commands.check import main
from tnt_timm.data.check import reading
from tnt_timm.data.check.images import inspect_image
from tnt_timm.data.datasets import open_dataset

COMMAND = [sys.executable, str(Path(__file__).parents[2] / "scripts" / "check.py")]


@pytest.fixture
def data(write_folders):
    """Three classes, six training and two validation photographs in each, nothing wrong with them."""
    return write_folders(train=dict(ant=6, bee=6, cat=6), val=dict(ant=2, bee=2, cat=2))


@pytest.fixture
def check(tmp_path, capfd):
    """check(folder, *arguments) -> status, report, stdout, stderr."""

    def run(*argv, workers=0):
        report = tmp_path / "report.json"
        status = main([*map(str, argv), "-j", str(workers), "--output", str(report)])
        out, err = capfd.readouterr()
        return status, json.loads(report.read_text()) if report.exists() else {}, out, err

    return run


def names(found):
    return [finding["place"].rpartition("/")[2] for finding in found["first"]]


def snapshot(root):
    """Everything about the files that a check could change."""
    return {
        path: (path.lstat().st_mtime_ns, path.lstat().st_ino, path.is_file() and path.read_bytes())
        for path in sorted(root.rglob("*"))
    }


def truncate(file):
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])


# ---- nothing wrong


@pytest.mark.parametrize("workers", [0, 2])
def test_good_data(data, check, workers):
    status, report, out, err = check(data, workers=workers)
    assert (status, err) == (0, "")
    assert out.endswith("no problem found\n") and "6 images in 3 classes (2 to 2 in each)" in out
    assert report["finished"] and report["problems"] == report["warnings"] == {}
    assert report["classes"] == ["ant", "bee", "cat"]
    train = report["splits"]["train"]
    assert train["folder"] == str(data / "train")
    assert (train["images"], train["checked"], train["classes"]) == (18, 18, dict(ant=6, bee=6, cat=6))
    assert (train["formats"], train["modes"], train["edges"]) == ({"JPEG": 18}, {"RGB": 18}, [32, 48])
    assert train["bytes"] == sum(file.stat().st_size for file in (data / "train").rglob("*.jpg"))
    assert report["splits"]["validation"]["images"] == 6


def test_other_names_of_splits_and_classes_in_the_order_of_the_targets(write_folders, check):
    data = write_folders(training={"c10": 1, "c9": 1, "Ant": 1}, test={"c10": 2, "c9": 1, "Ant": 1})
    status, report, *_ = check(data, "--val-split", "test")
    assert (status, report["splits"]["test"]["images"], report["splits"]["train"]["images"]) == (0, 4, 3)
    assert report["classes"] == ["Ant", "c9", "c10"] == open_dataset("", str(data), "train", True).classes


# ---- damaged files


@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_cannot_be_read(data, check, workers):
    ant = data / "train" / "ant"
    truncate(ant / "0.jpg")
    (ant / "1.jpg").write_bytes(b"")
    (ant / "2.jpg").write_text("<!DOCTYPE html><title>404</title>")
    (ant / "3.jpg").unlink()
    (ant / "3.jpg").symlink_to(data / "nowhere.jpg")
    before = snapshot(data)
    status, report, out, err = check(data, workers=workers)
    assert status == 1 and err == f"error: {data}: unreadable images: 4\n"
    assert names(report["problems"]["unreadable"]) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    truncated, *details = (finding["detail"] for finding in report["problems"]["unreadable"]["first"])
    assert "truncated" in truncated.lower()
    text = "not an image that can be read: it begins with b'<!DOCTYPE html><'"
    assert details == ["an empty file", text, "No such file or directory"]
    assert f"{ant / '1.jpg'}: an empty file" in out
    assert report["splits"]["train"]["checked"] == 18 and report["splits"]["train"]["formats"] == {"JPEG": 14}
    assert report["warnings"] == {}
    assert snapshot(data) == before


def test_training_and_check_reject_the_same_images(data, check):
    ant, whole = data / "train" / "ant", (data / "train" / "ant" / "0.jpg").read_bytes()
    random = np.random.default_rng(0)
    for i in range(60):
        broken = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            broken[place] = random.integers(256)
        (ant / f"broken{i}.jpg").write_bytes(broken)
    images = open_dataset("", str(data), "train", True)
    refused = set()
    for i in range(len(images)):
        try:
            images.load(i)
        except Exception:
            refused.add(images.name(i))
    _, report, *_ = check(data)
    assert {f["place"] for f in report["problems"]["unreadable"]["first"]} == refused
    assert 0 < len(refused) < 60


def test_a_file_that_crashes_its_decoder_is_named(data, check, monkeypatch):
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("the stand-in for a crashing decoder is inherited by fork only")
    victims = {str(data / "train" / "bee" / "4.jpg"), str(data / "val" / "ant" / "0.jpg")}
    monkeypatch.setattr(reading, "inspect_image", lambda path: os._exit(1) if path in victims else inspect_image(path))
    status, report, *_ = check(data, workers=2)
    found = report["problems"]["unreadable"]
    assert status == 1 and {f["place"] for f in found["first"]} == victims
    assert {f["detail"] for f in found["first"]} == {"its decoder crashes"}
    assert sum(split["checked"] for split in report["splits"].values()) == 24


# ---- warnings


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_unusual_images(data, check, photograph):
    bee, small = data / "train" / "bee", photograph.resize((64, 48))
    small.convert("CMYK").save(bee / "cmyk.jpg")
    small.save(bee / "really_a_png.JPEG", "PNG")
    small.convert("L").save(bee / "grey.jpg")
    Image.fromarray(np.full((40, 40), 30_000, np.uint16)).save(bee / "deep.png")
    small.convert("RGBA").quantize(16).save(bee / "palette.png")
    glass = small.convert("RGBA")
    glass.putalpha(128)
    glass.save(bee / "glass.png")
    small.convert("RGBA").save(bee / "opaque.png")
    glass.quantize(16).save(bee / "glass_palette.png")
    small.resize((31, 200)).save(bee / "tiny.jpg")
    for name, orientation in (("turned", 6), ("upright", 1), ("unset", 0)):
        exif = Image.Exif()
        exif[0x112] = orientation
        small.rotate(orientation).save(bee / f"{name}.jpg", exif=exif)
    (bee / "other.webp").write_bytes(b"not read")
    (bee / "notes.txt").write_text("not read either")
    status, report, out, err = check(data)
    assert (status, err, report["problems"]) == (0, "", {})
    found = {kind: names(of_kind) for kind, of_kind in report["warnings"].items()}
    assert found == {
        "cmyk": ["cmyk.jpg"],
        "suffix": ["really_a_png.JPEG"],
        "greyscale": ["deep.png", "grey.jpg"],
        "sixteen_bit": ["deep.png"],
        "palette": ["glass_palette.png", "palette.png"],
        "transparency": ["glass.png", "glass_palette.png"],
        "rotated": ["turned.jpg"],
        "tiny": ["tiny.jpg"],
        "not_read": ["train"],
    }
    assert report["splits"]["train"]["not_read"] == {".webp": 1}
    assert "CMYK images: 1 (converted to RGB)" in out and "cmyk.jpg" in out
    assert report["splits"]["train"]["modes"]["CMYK"] == 1
    images = open_dataset("", str(data), "train", True)
    assert {images.load(i)[0].mode for i in range(len(images))} == {"RGB"}


def test_warnings_of_pillow_are_findings_and_not_on_the_screen(data, check, photograph, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    photograph.resize((64, 48)).save(data / "train" / "cat" / "large.jpg")
    status, report, _, err = check(data)
    assert (status, err) == (0, "")
    (finding,) = report["warnings"]["pillow_warns"]["first"]
    assert finding["place"].endswith("large.jpg") and "decompression bomb" in finding["detail"]


def test_damaged_exif_is_no_damage(data, check, photograph):
    photograph.resize((64, 48)).save(
        data / "train" / "cat" / "exif.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 9
    )
    status, report, _, err = check(data)
    assert (status, err) == (0, "") and report["splits"]["train"]["formats"] == {"JPEG": 19}


@pytest.mark.parametrize("smaller", ["train", "val"])
def test_validation_images_that_are_also_training_images(write_folders, check, smaller):
    data = write_folders(**{split: dict(ant=2 if split == smaller else 5, bee=2) for split in ("train", "val")})
    shutil.copy(data / "train" / "ant" / "1.jpg", data / "val" / "bee" / "learned.jpg")
    shutil.copy(data / "train" / "ant" / "1.jpg", data / "train" / "bee" / "once more.jpg")
    status, report, *_ = check(data)
    (finding,) = report["warnings"]["duplicate"]["first"]
    assert status == 0 and report["warnings"]["duplicate"]["count"] == 1
    assert finding["place"] == str(data / "val" / "bee" / "learned.jpg")
    assert finding["detail"].startswith(f"the same file as {data / 'train'}")
    shutil.copy(data / "train" / "ant" / "1.jpg", data / "val" / "ant" / "learned too.jpg")
    assert check(data)[1]["warnings"]["duplicate"]["count"] == 2


# ---- folders


def test_classes_in_one_split_only(data, check, photograph):
    for split, label in (("train", "dog"), ("val", "eel")):
        (data / split / label).mkdir()
        photograph.save(data / split / label / "0.jpg", comment=label)
    status, report, out, err = check(data)
    assert status == 1 and "classes in one split only: 2" in err
    assert report["problems"]["one_split_only"]["first"] == [
        {"place": "dog", "detail": "1 images in train"},
        {"place": "eel", "detail": "1 images in validation"},
    ]


def test_layout(data, check):
    for name in ("fox", ".hidden", "ant/inner"):
        (data / "train" / name).mkdir()
    for old, new in (("ant/0.jpg", "0.jpg"), ("ant/1.jpg", "ant/inner/1.jpg")):
        (data / "train" / old).rename(data / "train" / new)
    status, report, *_ = check(data)
    found = {kind: names(report["problems"][kind]) for kind in ("empty_class", "stray", "deep")}
    assert status == 1 and found == {"empty_class": ["fox"], "stray": ["0.jpg"], "deep": ["1.jpg"]}


def test_folders_that_cannot_be_listed(data, check, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("train/ant"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the tests may run as root, whom no permission stops
    status, report, *_ = check(data)
    (finding,) = report["problems"]["unlisted"]["first"]
    assert status == 1 and finding == {"place": str(data / "train/ant"), "detail": "Permission denied"}


def test_without_one_split_the_other_is_read(data, check):
    shutil.rmtree(data / "val")
    truncate(data / "train" / "ant" / "0.jpg")
    status, report, _, err = check(data)
    assert status == 1 and "missing splits: 1" in err and "unreadable images: 1" in err
    assert "no validation folder" in report["problems"]["missing_split"]["first"][0]["detail"]
    (data / "val").mkdir()
    status, report, *_ = check(data)
    assert status == 1 and report["problems"]["missing_split"]["first"][0]["place"] == str(data / "val")


def test_class_map(data, tmp_path, check):
    """With a map, class folders may be anywhere, and others are not read."""
    (tmp_path / "classes.txt").write_text("cat\nant\n")
    (data / "train" / "animals").mkdir()
    (data / "train" / "cat").rename(data / "train" / "animals" / "cat")
    truncate(data / "train" / "bee" / "0.jpg")
    status, report, _, err = check(data, "--class-map", tmp_path / "classes.txt")
    assert (status, report["classes"]) == (0, ["cat", "ant"]), err
    assert report["splits"]["train"]["classes"] == dict(cat=6, ant=6)
    assert report["splits"]["train"]["checked"] == 12
    assert report["warnings"]["not_in_class_map"]["count"] == 8
    shutil.rmtree(data / "val" / "cat")  # a class without validation images
    assert check(data, "--class-map", tmp_path / "classes.txt")[0] == 0
    shutil.rmtree(data / "train" / "ant")  # a class without training images
    status, report, *_ = check(data, "--class-map", tmp_path / "classes.txt")
    assert status == 1 and names(report["problems"]["one_split_only"]) == ["ant"]


def test_a_mistyped_name_in_a_class_map(data, tmp_path, check):
    (tmp_path / "classes.txt").write_text("ant\nbee\ncta\n")
    status, report, _, err = check(data, "--class-map", tmp_path / "classes.txt")
    assert status == 1 and "class maps with a class that has no images: 2" in err
    places = report["problems"]["mistyped"]["first"]
    assert [place["place"] for place in places] == [str(data / "train"), str(data / "val")]
    assert places[0]["detail"].startswith("no images of cta; the nearest folder that the map does not name is cat")


def test_what_does_not_belong_to_a_dataset(data, check):
    (data / "train/.ipynb_checkpoints").mkdir()
    shutil.copy(data / "train/ant/0.jpg", data / "train/.ipynb_checkpoints")
    (data / "train/ant/._0.jpg").write_bytes(b"no image")
    (data / "train/ant/up").symlink_to("..")
    (data / "val/ant/0.unknown").touch()
    os.mkfifo(data / "val/ant/1.jpg.part")
    status, report, _, err = check(data)
    assert (status, err) == (0, "") and report["splits"]["train"]["images"] == 18
    assert {kind: found["count"] for kind, found in report["warnings"].items()} == dict(hidden=2, loop=1, not_read=2)


def test_a_single_class(write_folders, check):
    status, report, _, err = check(write_folders(train=dict(images=2), val=dict(images=1)))
    assert status == 1 and "splits of a single class: 2" in err
    assert report["problems"]["single_class"]["first"][0]["detail"] == "images"


def test_accents_that_are_stored_in_two_ways(write_folders, check):
    status, report, *_ = check(write_folders(train={"caf\u00e9": 2, "b": 1}, val={"cafe\u0301": 1, "b": 1}))
    assert status == 0 and report["splits"]["validation"]["classes"] == {"b": 1, "caf\u00e9": 1}


# ---- the report


def test_only_the_first_names_are_kept(data, check, monkeypatch):
    monkeypatch.setattr("tnt_timm.data.folders.KEPT", 5)
    for file in (data / "train").rglob("*.jpg"):
        file.write_bytes(b"")
    _, report, out, err = check(data)
    found = report["problems"]["unreadable"]
    assert (found["count"], len(found["first"])) == (18, 5) and "unreadable images: 18" in err
    assert out.count("an empty file") == 5


def test_names_that_no_terminal_can_show(data, check):
    os.rename(data / "train/ant/0.jpg", os.fsencode(data / "train/ant") + b"/\xff.jpg")
    truncate(Path(os.fsdecode(os.fsencode(data / "train/ant") + b"/\xff.jpg")))
    status, report, out, err = check(data)
    assert status == 1 and "ant/" in out
    (finding,) = report["problems"]["unreadable"]["first"]
    assert os.fsencode(finding["place"]).endswith(b"/\xff.jpg")


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ([], 2, "no dataset given"),
        (["nowhere"], 1, "data_dir: nowhere: no such folder"),
        (["DATA", "--ouput", "x.json"], 2, "--ouput: no such setting; perhaps you meant --output"),
        (["DATA", "-j", "-1"], 2, "workers: -1"),
        (["DATA", "-j", "many"], 2, "workers: 'many': expected a whole number"),
        (["DATA", "--output", "no/such/folder/r.json"], 2, "output: no/such/folder/r.json: no such folder"),
        (["DATA", "--class-map", "nowhere.txt"], 1, "class_map: nowhere.txt: no such file"),
        (["DATA", "--data-dir", "DATA"], 2, "give one of them"),
        (["DATA/train/ant"], 1, "no train folder"),
        (["DATA", "-j", "0", "--output", "/proc/report.json"], 1, "/proc/report.json: cannot be written"),
    ],
)
def test_bad_input_is_one_line(data, capfd, argv, status, message):
    assert main([arg.replace("DATA", str(data)) for arg in argv]) == status
    err = capfd.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


# ---- as a shell starts it


@pytest.fixture
def slow(data, photograph):
    """One class per split, with links to a photograph that takes long to decode: half a minute in all."""
    photograph.resize((4000, 3000)).save(data / "large.jpg")
    for split, count in (("train", 500), ("val", 100)):
        for label in ("bee", "cat"):
            shutil.rmtree(data / split / label)
        for i in range(count):
            os.link(data / "large.jpg", data / split / "ant" / f"link{i:03}.jpg")
    return data


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def heed_ctrl_c():
    """These tests may be a background job of a shell, which starts with SIGINT ignored, as do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def started(slow, tmp_path):
    """The command on a terminal after it has read some images, and what the terminal showed."""
    terminal, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [*COMMAND, str(slow), "-j", "2", "--output", str(tmp_path / "report.json")]
    options = dict(stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed_ctrl_c)
    process = subprocess.Popen(command, stdout=inner, **options)
    os.close(inner)
    shown = ""

    def more():
        nonlocal shown
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 4096).decode()
        return re.search(r"reading .*[1-9]\d*/\d+.* img/s", shown)

    wait_for(more, 120)
    yield process, lambda: shown
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    os.close(terminal)


def test_ctrl_c_reports_what_was_seen_and_leaves_no_process(started, tmp_path):
    process, shown = started
    readers = wait_for(lambda: children(process.pid))
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert process.stderr.read() == "interrupted\n"
    report = json.loads((tmp_path / "report.json").read_text())
    checked = sum(split["checked"] for split in report["splits"].values())
    assert not report["finished"] and 0 < checked < sum(split["images"] for split in report["splits"].values())
    assert not any(map(is_running, readers))
    assert "left" in shown() and "0 unreadable" in shown()


def test_a_killed_check_leaves_no_process(started):
    process, _ = started
    readers = wait_for(lambda: children(process.pid))
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(is_running, readers)), 20)


def test_without_a_terminal_there_are_plain_lines(data, check, monkeypatch):
    monkeypatch.setattr("tnt_timm.commands.check.LINE_EVERY_S", 0.0)
    _, _, out, _ = check(data)
    assert "\r" not in out and "\x1b" not in out
    assert re.search(r"reading    24 of 24 images  \d+ img/s  left 0:00  0 unreadable\n", out)
