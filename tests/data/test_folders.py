import os
import unicodedata
from pathlib import Path

import pytest
from timm.data.readers.reader_image_folder import find_images_and_targets

from tnt_timm.data import folders
from tnt_timm.data.folders import Survey, class_name, class_order
from tnt_timm.errors import UserError


@pytest.fixture
def fill(tmp_path):
    """fill("train/cat/0.jpg", ...) -> the split's folder, with empty files."""

    def write(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path / "train"

    return write


def below(folder, items):
    return [os.path.relpath(path, folder) for path in items.first]


def test_survey(fill):
    folder = fill(
        *("train/c10/0.jpg", "train/c9/0.JPEG", "train/c9/1.png", "train/c9/deeper/2.jpg", "train/stray.jpg"),
        *("train/c9/notes.txt", "train/c9/3.webp", "train/c9/4.WEBP", "train/c10/5.tiff", "train/c9/.jpg"),
        "train/empty/notes.txt",
    )
    survey = Survey(folder)
    assert list(survey.counts.items()) == [("", 1), ("c9", 2), ("c10", 1), ("deeper", 1)]
    assert survey.empty == ["empty"]
    assert (survey.stray.first, survey.deep.first) == ([f"{folder}/stray.jpg"], [f"{folder}/c9/deeper/2.jpg"])
    assert survey.skipped == {".webp": 2, ".tiff": 1}


def test_images_classes_and_their_order_are_those_of_timm(fill):
    names = ["c1/a.jpg", "c1/b.tar.jpg", "c1/jpg", "c2/x.Jpeg", "c10/9.png", "c10/10.png", "c10/a9b1.png", "c10/a9.png"]
    names += ["c1 b/0.jpg", "c1-b/0.jpg", "C3/0.jpg", "2/7a.png", "2/07b.png", "2/b7.png", "é/0.jpg", "c2/y/z.png"]
    folder = fill(*(f"train/{name}" for name in names))
    theirs, targets = find_images_and_targets(str(folder))
    survey = Survey(folder)
    assert survey.samples(targets) == theirs
    assert list(survey.counts) == sorted(targets, key=targets.get)
    del targets["c2"]
    assert survey.samples(targets) == find_images_and_targets(str(folder), class_to_idx=targets)[0]


def test_the_order_of_images_that_timm_cannot_order_is_that_of_their_names(fill):
    folder = fill("train/c/1.jpg", "train/c/01.jpg", "train/c/A.jpg", "train/c/a.jpg", "train/c/²1.jpg")
    assert [os.path.basename(path) for path, _ in Survey(folder).samples({"c": 0})] == [
        *("01.jpg", "1.jpg", "A.jpg", "a.jpg", "²1.jpg")
    ]


@pytest.mark.parametrize(
    ("names", "hidden", "skipped"),
    [
        (
            [".ipynb_checkpoints/0.png", "a/.ipynb_checkpoints/0.png"],
            [".ipynb_checkpoints", "a/.ipynb_checkpoints"],
            {},
        ),
        (["a/._0.png", "a/.DS_Store", "a/.0.webp", "a/..jpg"], ["a/._0.png"], {}),
        (["__MACOSX/a/._0.png", "@eaDir/0.png/0.jpg"], ["@eaDir", "__MACOSX"], {}),
        (["lost+found/x", "$RECYCLE.BIN/0.png", "System Volume Information/x"], 3, {}),
        (["a/Thumbs.db", "a/desktop.ini", "a/Icon\r", "labels.csv", "README.md"], [], {}),
        (["a/0.webp", "a/1.tga", "a/2.jpg_large", "a/3", "4.tar"], [], [".jpg_large", ".tar", ".tga", ".webp", "no"]),
    ],
)
def test_what_is_left_out(names, hidden, skipped, fill, caplog):
    folder = fill("train/a/0.png", "train/b/0.png", *(f"train/{name}" for name in names))
    survey = Survey(folder)
    survey.check_class_folders()
    survey.check_depth()
    assert survey.counts == dict(a=1, b=1)
    assert survey.hidden.count == hidden or sorted(below(folder, survey.hidden)) == hidden
    assert sorted(suffix.split(" ")[0] for suffix in survey.skipped) == sorted(
        "without" if suffix == "no" else suffix for suffix in skipped
    )
    with caplog.at_level("INFO", "tnt_timm"):
        survey.warn_of_left_out()
    assert len(caplog.messages) == bool(hidden or skipped)
    assert all(message.startswith(f"warning: {folder}: left out: ") for message in caplog.messages)


def test_a_pipe_is_no_image(fill):
    folder = fill("train/a/0.png")
    os.mkfifo(folder / "a/1.png")
    (folder / "a/broken.png").symlink_to("nowhere")
    survey = Survey(folder)
    assert survey.folders[-1].images == ["0.png", "broken.png"] and survey.skipped == {"pipe or device": 1}


@pytest.mark.parametrize(
    ("links", "counts", "loops"),
    [
        ({"a/up": ".."}, {}, ["a/up"]),
        ({"a/up": "../..", "b/root": "/", "a/self": "."}, {}, ["a/self", "a/up", "b/root"]),
        ({"up": "."}, {}, ["up"]),
        ({"a/x": "../b", "b/y": "../a"}, dict(x=1, y=1), ["a/x/y", "b/y/x"]),
        ({"c": "../elsewhere", "d": "../elsewhere"}, dict(c=2, d=2), []),  # one folder linked twice
        ({"c": "a"}, dict(c=1), []),
        ({"a/1.png": "../b/0.png"}, dict(a=2), []),
        ({"a/1.png": "2.png", "a/2.png": "1.png"}, dict(a=3), []),  # unreadable, which loading reports
    ],
)
def test_links(links, counts, loops, fill):
    folder = fill("train/a/0.png", "train/b/0.png", "elsewhere/0.png", "elsewhere/1.png")
    for link, target in links.items():
        (folder / link).symlink_to(target)
    survey = Survey(folder)
    assert survey.counts == dict(a=1, b=1) | counts
    assert below(folder, survey.loops) == loops


def test_the_folder_of_the_split_may_be_a_link_itself(fill, tmp_path):
    fill("real/a/0.png")
    (tmp_path / "real/a/up").symlink_to("..")
    (tmp_path / "train").symlink_to("real")
    survey = Survey(tmp_path / "train")
    assert survey.counts == dict(a=1) and survey.folders[1].path == f"{tmp_path}/train/a"


def test_class_names_are_the_same_text_everywhere(fill):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    folder = fill(f"train/{apart}/0.png", "train/b/0.png")
    assert list(Survey(folder).counts) == ["b", composed] == ["b", class_name(composed)]
    (folder / apart).rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9"))
    name = list(Survey(folder).counts)[1]
    assert name.encode() == b"caf\\udce9"  # can be written and printed
    assert len(Survey(folder).samples({name: 0})) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/train/a/0.png", "train/train/b/0.png"], "train/train: a folder too many above the class folders"),
        (["train/a/x/0.png", "train/b/0.png"], r"a/x/0\.png: deeper than a class folder"),
    ],
)
def test_depth(names, message, fill):
    with pytest.raises(UserError, match=message):
        Survey(fill(*names)).check_depth()


def test_an_empty_class_folder_names_the_files_in_it(fill):
    with pytest.raises(
        UserError, match=r"class folder a holds no images \(left out because of their suffix: 1 .webp\)"
    ):
        Survey(fill("train/a/0.webp", "train/b/0.png")).check_class_folders()


def test_images_come_folder_by_folder_in_a_fixed_order(fill):
    folder = fill("train/b/2.jpg", "train/b/10.jpg", "train/a/1.jpg", "train/a/0/3.jpg", "train/4.jpg")
    expected = [f"{folder}/{name}" for name in ("4.jpg", "a/1.jpg", "a/0/3.jpg", "b/10.jpg", "b/2.jpg")]
    assert [path for path, _ in Survey(folder).images()] == expected


def test_only_the_first_names_are_kept(fill, monkeypatch):
    monkeypatch.setattr(folders, "KEPT", 2)
    survey = Survey(fill(*(f"train/{i}.jpg" for i in range(5))))
    assert (survey.stray.count, len(survey.stray.first)) == (5, 2)


def test_classes_that_timm_cannot_order():
    """timm's key is the same for both, so their order is that of a set of names."""
    assert sorted(["cat", "Cat", "c1", "c01", "c10", "c9"], key=class_order) == ["c01", "c1", "c9", "c10", "Cat", "cat"]
    assert sorted(["1²", "²", "12"], key=class_order) == ["1²", "12", "²"]  # digits that int() refuses
