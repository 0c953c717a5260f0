"""One epoch from each kind of data set, through the command line, and the same number from validate.py."""

import csv
import io
import json
import os
import signal
import tarfile

import numpy as np
import pytest
from torchvision.datasets import FashionMNIST

from tnt_timm.training.trainer import Trainer

SHORT = ["-b", "4", "--epochs", "1", "--warmup-epochs", "0", "--cooldown-epochs", "0", "--workers", "1"]


@pytest.fixture
def folder(make_folder):
    return [make_folder()]


@pytest.fixture
def wds(make_folder, tmp_path):
    """Two shards per split, with timm's _info.json."""
    data, root, info = make_folder(), tmp_path / "shards", {"splits": {}}
    root.mkdir()
    for split, source in (("train", "train"), ("validation", "val")):
        images = sorted((data / source).rglob("*.png"))
        names, lengths = [], []
        for shard in range(2):
            part = images[shard::2]
            names.append(f"{split}-{shard:04}.tar")
            lengths.append(len(part))
            with tarfile.open(root / names[-1], "w") as tar:
                for i, image in enumerate(part):
                    label = str(["ant", "bee", "cat"].index(image.parent.name)).encode()
                    for suffix, content in (("png", image.read_bytes()), ("cls", label)):
                        entry = tarfile.TarInfo(f"{shard}{i:04}.{suffix}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
        info["splits"][split] = dict(name=split, num_samples=len(images), filenames=names, shard_lengths=lengths)
    (root / "_info.json").write_text(json.dumps(info))
    return [root, "--dataset", "wds/shards", "--num-classes", "3"]


@pytest.fixture
def hfds(make_folder, tmp_path, monkeypatch):
    """A local folder of parquet files, as a hub data set has them."""
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = make_folder()
    for split, source in (("train", "train"), ("validation", "val")):
        images = sorted((data / source).rglob("*.png"))
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["ant", "bee", "cat"]))
        rows = dict(image=[str(i) for i in images], label=[i.parent.name for i in images])
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    return ["--dataset", f"hfds/{tmp_path / 'hub'}", "--data-dir", tmp_path / "cache"]


@pytest.fixture
def torch_raw(tmp_path):
    """torchvision's own files of FashionMNIST, 24 and 12 images."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 24), ("t10k", 12)):
        images = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8)
        header = (0x0803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in images.shape)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (0x0801).to_bytes(4, "big") + count.to_bytes(4, "big") + bytes(i % 10 for i in range(count))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    assert len(FashionMNIST(str(tmp_path))) == 24
    return [tmp_path, "--dataset", "torch/fashion_mnist"]


@pytest.mark.parametrize("kind", ["folder", "wds", "hfds", "torch_raw"])
def test_trains_and_validates(kind, request, run_train, run_validate, tiny, tmp_path):
    data = request.getfixturevalue(kind)
    out = run_train(*data, *tiny, *SHORT, "--output", tmp_path / "out", "--experiment", kind)
    assert out.status == 0, out.err
    assert "24 training and 12 validation images" in out.out
    (row,) = csv.DictReader((tmp_path / "out" / kind / "summary.csv").open())
    found = run_validate(tmp_path / "out" / kind)
    loss = f"loss {float(row['eval_loss']):.6f}"
    assert f"top-1 {float(row['eval_top1']):.3f}" in found.out and loss in found.out
    assert "(12 images, each counted once)" in found.out


def damage(shard, victim):
    with tarfile.open(shard) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]
    with tarfile.open(shard, "w") as tar:
        for name, content in members:
            content = b"damaged" if name == victim else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_a_damaged_image_in_a_stream_stops_validation(wds, run_train, tiny, tmp_path):
    shard = tmp_path / "shards" / "validation-0000.tar"
    damage(shard, "00000.png")
    out = run_train(*wds, *tiny, *SHORT, "--output", tmp_path / "out")
    assert out.status == 1 and f"{shard}: 00000: damaged validation image" in out.error
    assert "the other 11 of 12 images" in out.error


def test_a_damaged_training_image_in_a_stream_is_named_counted_and_replaced(wds, run_train, tiny, tmp_path):
    damage(tmp_path / "shards" / "train-0001.tar", "10000.png")
    out = run_train(*wds, *tiny, *SHORT, "--epochs", "2", "--output", tmp_path / "out")
    assert out.status == 0, out.err
    assert out.out.count(f"warning: {tmp_path}/shards/train-0001.tar: 10000: damaged training image") == 1
    assert "1 damaged training images were replaced" in out.out


def test_a_stream_goes_on_inside_an_epoch_and_says_when_it_is_dealt_otherwise(
    wds, run_train, tiny, tmp_path, monkeypatch, assert_same_bits
):
    """With as many readers, which none and one loader process both are, the same bits; with two, a notice."""

    def train(name, workers, status=0):
        argv = [*wds, *tiny, "-b", 2, "--epochs", 2, "--warmup-epochs", 0, "--cooldown-epochs", 0, "--mixup", 0.8]
        out = run_train(*argv, "--workers", workers, "--output", tmp_path / "out", "--experiment", name)
        assert out.status == status, out.err
        return out.out

    def stopping(self, *args):
        if self.progress.updates == 14:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, *args)

    train_step = Trainer.train_step
    train("straight", 1)
    for name in ("same", "other"):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", stopping)
            train(name, 1, status=75)
    assert "readers" not in train("same", 0)
    assert_same_bits(tmp_path / "out" / "straight", tmp_path / "out" / "same")
    assert (
        "notice: the stream is split over 1 x 2 readers in batches of 2 instead of 1 x 1 in batches of 2: "
        "some images of epoch 2 are repeated and others left out, and the order of images changes"
    ) in train("other", 2)
