"""Train one epoch on each kind of dataset through the command line, and get the same number from validate.py."""

import csv
import io
import json
import os
import shutil
import signal
import tarfile

import pytest

from tnt_timm.training.trainer import Trainer

SHORT = ["-b", "4", "--lr", "1e-3", "--epochs", "1", "--warmup-epochs", "0", "--cooldown-epochs", "0", "--workers", "1"]


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


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
            members = []
            for i, image in enumerate(part):
                label = str(["ant", "bee", "cat"].index(image.parent.name)).encode()
                members += [(f"{shard}{i:04}.png", image.read_bytes()), (f"{shard}{i:04}.cls", label)]
            write_tar(root / names[-1], members)
        info["splits"][split] = dict(name=split, num_samples=len(images), filenames=names, shard_lengths=lengths)
    (root / "_info.json").write_text(json.dumps(info))
    return [root, "--dataset", "wds/shards", "--num-classes", "3"]


@pytest.fixture
def hfds(make_folder, tmp_path, monkeypatch):
    """A local folder of parquet files, as in a hub dataset."""
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
def torch_raw(tmp_path, write_fashion):
    return [write_fashion(tmp_path, 24, 12), "--dataset", "torch/fashion_mnist"]


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


def test_folders_with_what_does_not_belong_there(make_folder, run_train, run_validate, run_script, tiny, tmp_path):
    """Hidden and system folders, loops of links, class names in other Unicode forms, and names that are not UTF-8."""
    data = make_folder(classes=["caf\u00e9", "bee", os.fsdecode(b"\xff")])
    (data / "val/caf\u00e9").rename(data / "val/cafe\u0301")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        shutil.copytree(data / "train/bee", data / "train" / name)
        shutil.copytree(data / "train/bee", data / "val" / name)
    for folder in ("train/bee", "val/bee"):
        (data / folder / "._0.png").write_bytes(b"no image")
        (data / folder / "up").symlink_to("..")
    out = run_train(data, *tiny, *SHORT, "--output", tmp_path / "out", "--experiment", "run")
    assert out.status == 0, out.err
    assert "24 training and 12 validation images, 3 classes" in out.out
    expected = (
        f"warning: {data}/train: left out: hidden or system files and folders: 3, such as .ipynb_checkpoints; links"
    )
    assert out.out.count(expected) == 1
    assert "(12 images, each counted once)" in run_validate(tmp_path / "out/run", "--per-class").out
    results = tmp_path / "results.csv"
    assert run_script("validate_all", tmp_path / "out/run", "--data-dir", data, "--results-file", results).status == 0
    assert run_script("check", data, "-j", "0").status == 0


def test_labels_that_are_no_class_arrive_as_one_line_from_a_worker(wds, run_train, tiny, tmp_path):
    out = run_train(*wds[:-1], "2", *tiny, *SHORT, "--output", tmp_path / "out")
    assert out.status == 1 and "label '2': expected 0 to 1 (2 classes); if the labels count from 1" in out.error


def damage(shard, victim):
    with tarfile.open(shard) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]
    write_tar(shard, [(name, b"damaged" if name == victim else content) for name, content in members])


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


def test_a_stream_resumes_inside_an_epoch_and_a_change_of_readers_is_a_notice(
    wds, run_train, tiny, tmp_path, monkeypatch, assert_same_bits
):
    """With as many readers (0 and 1 worker are both one reader) the bits are the same. With two there is a notice."""

    def train(name, workers, status=0):
        argv = [
            *wds,
            *tiny,
            "-b",
            2,
            "--lr",
            "1e-3",
            "--epochs",
            2,
            "--warmup-epochs",
            0,
            "--cooldown-epochs",
            0,
            "--mixup",
            0.8,
        ]
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
