import pickle
from pathlib import Path

import pytest

from tnt_timm.data.class_maps import compare_with_folders, nearest, read_class_map
from tnt_timm.errors import UserError


@pytest.mark.parametrize(
    "content",
    [b"dog\ncat\n", b"dog\r\ncat", b"\xef\xbb\xbfdog\ncat\n", dict(cat=1, dog=0)],
    ids=["txt", "dos", "bom", "pkl"],
)
def test_class_maps(content, tmp_path):
    path = tmp_path / ("c.txt" if isinstance(content, bytes) else "C.PKL")
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    assert read_class_map(str(path)) == dict(dog=0, cat=1)


def test_names_are_those_of_class_folders(tmp_path):
    (tmp_path / "c.txt").write_bytes("cafe\u0301\n".encode() + b"caf\xe9\n")
    assert read_class_map(str(tmp_path / "c.txt")) == {"café": 0, "caf\\udce9": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", b"dog\n\ncat\n", "line 2: empty; expected a new class on each line"),
        ("c.txt", b"dog\ncat\ndog\n", "line 1: dog comes again"),
        ("c.txt", "café\ncafe\u0301".encode(), "two names differ only in"),
        ("c.txt", b"", "no class in it"),
        ("c.pkl", b"no pickle", "c.pkl: "),
        ("c.pkl", {}, "no class in it"),
        ("c.pkl", ["cat"], "expected a dict"),
        (
            "c.pkl",
            dict(cat=0, tiger=0, dog=1),
            "cat and tiger both have index 0; to merge classes, put their images in one",
        ),
        ("c.pkl", dict(cat=1, dog=2), "its 2 indices are from 1 to 2; expected 0 to 1"),
        ("c.pkl", dict(cat=0, dog=2), "expected 0 to 1"),
        ("c.pkl", {0: 0, 1: 1}, "0: 0: expected the name of a class and its index"),
        ("c.pkl", dict(cat="0"), "'cat': '0': expected"),
        ("c.pkl", dict(cat=False, dog=True), "'cat': False: expected"),
        ("c.pkl", dict(cat=0.0), "'cat': 0.0: expected"),
        ("c.json", b"{}", "Unsupported class map file extension"),
        ("", b"", "no such file"),
    ],
)
def test_files_that_are_no_class_map(name, content, message, tmp_path):
    if name:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        read_class_map(str(tmp_path / name))
    assert str(error.value).startswith(f"class_map: {tmp_path}")


def test_no_code_of_a_pickle_is_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "flag",)

    (tmp_path / "c.pkl").write_bytes(pickle.dumps({"cat": Malicious()}))
    with pytest.raises(UserError, match="not permitted"):
        read_class_map(str(tmp_path / "c.pkl"))
    assert not (tmp_path / "flag").exists()


@pytest.mark.parametrize(
    ("names", "counts", "is_training", "error", "warnings"),
    [
        ("cat dog", dict(cat=2, dog=1), True, None, []),
        ("cat dgo", dict(cat=2, dog=1), True, "no images of dgo; the nearest .* is dog; correct the name", []),
        ("Cat dog", dict(cat=2, dog=1), False, "no images of Cat; .* is cat", []),
        ("cat dgo", dict(cat=2, dog=1), False, "no images of dgo; .* is dog", []),
        ("cat dog elk yak", dict(cat=2, dog=1), True, r"no images of elk \(and 1 more\); no folder is left over", []),
        ("cat dog elk", dict(cat=2, dog=1), False, None, ["no images of 1 (elk)"]),
        (
            "dog",
            dict(dog=1, cat=2, bee=3),
            True,
            None,
            ["left out: 5 images of folders that it does not name: 2 (cat, bee)"],
        ),
        (
            "cat",
            {"cat": 1, "": 3},
            True,
            None,
            ["left out: 3 images of folders that it does not name: 1 (the folder itself)"],
        ),
        ("cat dog", dict(cat=0, dog=1), True, "no images of cat", []),
    ],
)
def test_map_and_folders(names, counts, is_training, error, warnings, caplog):
    targets = {name: index for index, name in enumerate(names.split())}
    with caplog.at_level("INFO", "tnt_timm"):
        if error is None:
            compare_with_folders(targets, counts, Path("data/train"), is_training)
        else:
            with pytest.raises(UserError, match=f"^class_map: data/train: {error}"):
                compare_with_folders(targets, counts, Path("data/train"), is_training)
    assert caplog.messages == [f"warning: class_map: data/train: {text}" for text in warnings]


def test_nearest():
    assert nearest("CAT", ["cot", "Cat"]) == "Cat"
    assert nearest("cta", ["dog", "cat"]) == "cat"
    assert nearest("xyz", ["dog", "cat"], 0.6) == nearest("xyz", []) == ""
