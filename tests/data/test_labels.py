import numpy as np
import pytest
import torch

from tnt_timm.data.labels import Labels, labels_of_column
from tnt_timm.errors import UserError

ZOO = dict(cat=1, dog=0)


def index(labels, label):
    return labels.index(label, lambda: "sample 7")


@pytest.mark.parametrize(
    ("labels", "label", "expected"),
    [
        (Labels("set"), 5, 5),
        (Labels("set", ["a", "b"]), 1, 1),
        (Labels("set", ["a", "b"]), np.uint8(1), 1),
        (Labels("set", ["a", "b"]), np.array(1), 1),
        (Labels("set", ["a", "b"]), torch.tensor(1), 1),
        (Labels("set", ["a", "b"]), b"1\n", 1),
        (Labels("set", ["a", "b"]), " 1 ", 1),
        (Labels("set", ["a", "b"]), 1.0, 1),
        (Labels("set", ["a", "b"]), np.bool_(True), 1),
        (Labels("set", None, {"A": 0, "9": 1}), 1, 1),  # not all names of the map are numbers
        (Labels("set", None, ZOO), "cat", 1),
        (Labels("set", None, ZOO), b"cat\n", 1),
        (Labels("set", None, ZOO), 0, 0),  # an index of the map
        (Labels("set", ["dog", "cat"], dict(cat=0, dog=1)), 0, 1),  # an index of the dataset
        (Labels("set", ["dog", "cat"], dict(cat=0, dog=1)), np.int64(1), 0),
        (Labels("set", None, {"2": 0, "1": 1}), 2, 0),  # a name of the map
        (Labels("set", None, {"2": 0, "1": 1}), b"1", 1),
        (Labels("set", None, {"caf\u00e9": 0}), "cafe\u0301", 0),
    ],
)
def test_labels(labels, label, expected):
    found = index(labels, label)
    assert (found, type(found)) == (expected, int)


@pytest.mark.parametrize(
    ("labels", "label", "message"),
    [
        (Labels("set"), -1, "label -1: expected 0 or more; remove samples without a label"),
        (Labels("set"), b"-1", "label '-1': expected a class; remove samples without a label"),
        (Labels("set"), b"", "label '': expected a class"),
        (Labels("set"), None, "label None: expected the index of one class"),
        (Labels("set"), 1.5, r"label 1\.5: float, expected the index of one class"),
        (Labels("set"), float("nan"), "label nan: float"),
        (Labels("set"), np.zeros((2, 2)), r"label array\(\[\[0., 0.\], \[0., 0.\]\]\): ndarray"),
        (Labels("set"), torch.tensor(0.5), r"label 0\.5: float"),
        (Labels("set"), [0, 1], r"label \[0, 1\]: list"),
        (Labels("set"), np.array([0, 1]), r"label array\(\[0, 1\]\): ndarray"),
        (Labels("set"), "cat", "label 'cat': a text, expected a class index; pass --class-map"),
        (Labels("set"), b"\xff", r"label '\\\\xff': a text"),
        (
            Labels("set", ["a", "b"]),
            2,
            r"label 2: expected 0 to 1 \(2 classes\); if the labels count from 1, subtract 1",
        ),
        (Labels("set", ["a", "b"]), 9, r"label 9: expected 0 to 1 \(2 classes\)$"),
        (Labels("set", None, ZOO), "cta", "label 'cta': not in the class map; the nearest class is cat"),
        (Labels("set", None, ZOO), 2, r"label 2: expected 0 to 1 \(2 classes\); if the labels count from 1"),
        (Labels("set", None, ZOO), -1, "label -1: expected 0 or more"),
        (Labels("set", None, {"2": 0, "1": 1}), 0, "label 0: not in the class map"),
        (Labels("set", ["cat", "bee"], ZOO), 1, r"label 1 \(bee\): not in the class map; the nearest class is"),
        (Labels("set", ["cat", "bee"], ZOO), -1, "label -1: not in the class map"),
    ],
)
def test_labels_that_are_no_class(labels, label, message):
    with pytest.raises(UserError, match=f"^sample 7: {message}"):
        index(labels, label)


@pytest.mark.parametrize("texts", [["dog", "cat", "cat"], ["cat", "dog", "cat"]])
def test_text_labels_are_classes_in_the_order_of_class_folders(texts):
    pa = pytest.importorskip("pyarrow")
    labels = labels_of_column(pa.chunked_array([texts, ["c10", "c9"]]), "set", None, None, True)
    assert labels.classes == ["c9", "c10", "cat", "dog"]
    assert index(labels, "cat") == 2


@pytest.mark.parametrize(
    ("column", "classes", "class_map", "message"),
    [
        ([0, 1, -1], ["cat", "dog"], None, "row 2 of set: label -1: expected 0 or more"),
        ([0, None], ["cat", "dog"], None, "row 1 of set: label None: expected"),
        ([0, 2, 1], ["cat", "dog"], None, r"row 1 of set: label 2: expected 0 to 1 \(2 classes\); if"),
        ([2, 1], ["cat", "dog"], None, "set: labels count from 1 to 2; subtract 1 from each"),
        (["a", None], None, None, "row 1 of set: label None: expected"),
        (["a", ""], None, None, "row 1 of set: label '': expected a class"),
        (["1", "0", "-1"], None, None, "row 2 of set: label '-1': expected a class"),
        ([0.0, 0.5], ["cat", "dog"], None, r"row 1 of set: label 0\.5: float"),
        ([float("nan"), 1.0], None, None, r"row 0 of set: label nan: float"),
        (
            [0, 1],
            ["cat", "dog"],
            dict(Dog=0, Cat=1),
            r"row 0 of set: label 0 \(cat\): not in the class map; the nearest",
        ),
        ([[0], [0, 1]], None, None, r"row 0 of set: label \[0\]: list"),
        (["cat", "dog", "cta"], None, ZOO, "row 2 of set: label 'cta': not in the class map; the nearest class is cat"),
        ([0, 1], ["dog", "cta"], ZOO, r"row 1 of set: label 1 \(cta\): not in the class map; the nearest class is cat"),
        (["cat"], None, ZOO, "class_map: set: no samples of dog; correct the name"),
    ],
)
def test_columns(column, classes, class_map, message):
    pa = pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=f"^{message}"):
        labels_of_column(pa.chunked_array([column]), "set", classes, class_map, True)


@pytest.mark.parametrize(
    ("column", "num_classes", "message"),
    [
        ([0, 1, 2], 3, None),
        ([1, 2, 3], 4, None),  # a class without samples
        ([1, 2, 3], 3, "set: labels count from 1 to 3"),
        ([0, 1, 2], 2, r"set: label 2: expected 0 to 1 \(2 classes\)"),
    ],
)
def test_the_number_of_classes_may_come_later(column, num_classes, message):
    pa = pytest.importorskip("pyarrow")
    labels = labels_of_column(pa.chunked_array([column]), "set", None, None, True)
    if message is None:
        labels.expect(num_classes)
        with pytest.raises(UserError, match="sample 7: label"):
            index(labels, num_classes)
        return
    with pytest.raises(UserError, match=f"^{message}"):
        labels.expect(num_classes)
