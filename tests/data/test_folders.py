from pathlib import Path

import pytest
from timm.data.readers.reader_image_folder import find_images_and_targets

from tnt_timm.data import folders
from tnt_timm.data.folders import Survey, class_order, images_of, read_class_map
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


def test_survey(fill):
    folder = fill(
        *("train/c10/0.jpg", "train/c9/0.JPEG", "train/c9/1.png", "train/c9/deeper/2.jpg", "train/stray.jpg"),
        *("train/c9/notes.txt", "train/c9/3.webp", "train/c9/4.WEBP", "train/c10/5.tiff", "train/c9/.jpg"),
        *("train/empty/notes.txt", "train/.hidden/notes.txt"),
    )
    survey = Survey(folder)
    assert list(survey.counts.items()) == [("", 1), ("c9", 2), ("c10", 1), ("deeper", 1)]
    assert survey.empty == ["empty"]
    assert (survey.stray.first, survey.deep.first) == ([f"{folder}/stray.jpg"], [f"{folder}/c9/deeper/2.jpg"])
    assert survey.skipped == {".webp": 2, ".tiff": 1}


def test_it_counts_what_timm_reads(fill):
    names = ["c1/a.jpg", "c1/.hidden.png", "c1/.jpg", "c1/..jpg", "c1/b.tar.jpg", "c1/jpg", "c2/x.Jpeg", "c2/.d/y.png"]
    folder = fill(*(f"train/{name}" for name in names))
    theirs, targets = find_images_and_targets(str(folder))
    assert sorted(path for path, _ in images_of(folder)) == sorted(path for path, _ in theirs)
    assert list(Survey(folder).counts) == sorted(targets, key=targets.get)
    assert all(targets[label] == dict(theirs)[path] for path, label in images_of(folder))


def test_images_come_folder_by_folder_in_a_fixed_order(fill):
    folder = fill("train/b/2.jpg", "train/b/10.jpg", "train/a/1.jpg")
    expected = [f"{folder}/{name}" for name in ("a/1.jpg", "b/10.jpg", "b/2.jpg")]
    assert [path for path, _ in images_of(folder)] == expected


def test_only_the_first_names_are_kept(fill, monkeypatch):
    monkeypatch.setattr(folders, "KEPT", 2)
    survey = Survey(fill(*(f"train/{i}.jpg" for i in range(5))))
    assert (survey.stray.count, len(survey.stray.first)) == (5, 2)


def test_classes_that_timm_cannot_order():
    """timm's key is the same for both, so their order is that of a set of names."""
    assert sorted(["cat", "Cat", "c1", "c01", "c10", "c9"], key=class_order) == ["c01", "c1", "c9", "c10", "Cat", "cat"]
    assert sorted(["1²", "²", "12"], key=class_order) == ["1²", "12", "²"]  # digits that int() refuses


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "dog\ncat\n", ""),
        ("c.txt", "dog\n\ncat\n", "line 2: empty; expected a new class on each line"),
        ("c.txt", "dog\ncat\ndog\n", "line 1: dog comes again"),
        ("c.pkl", "no pickle", "c.pkl: "),
        ("c.json", "{}", "Unsupported class map file extension"),
        ("", "", "no such file"),
    ],
)
def test_class_map(tmp_path, name, text, message):
    if name:
        (tmp_path / name).write_text(text)
    if not message:
        assert read_class_map(str(tmp_path / name)) == dict(dog=0, cat=1)
        return
    with pytest.raises(UserError, match=message):
        read_class_map(str(tmp_path / name))
