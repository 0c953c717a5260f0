"""validate.py reports exactly the numbers that training reported."""

import csv
import json
import logging.handlers
import re
import shutil

import pytest
import timm
import torch
from timm.data import create_dataset, create_transform, resolve_data_config

from tnt_timm.checkpoints import file_format

SHORT = ["-b", "5", "--epochs", "2", "--lr", "1e-3", "--warmup-epochs", "0", "--cooldown-epochs", "0", "--workers", "0"]


@pytest.fixture
def run(train):
    _, folder = train(*SHORT, "--model-ema", "--model-ema-decay", "0.8")
    return folder


def reported(run, weights="ema_"):
    rows = list(csv.DictReader((run / "summary.csv").open()))
    best = max(rows, key=lambda row: float(row["eval_ema_top1"]))
    return {key: float(best[f"eval_{weights}{key}"]) for key in ("top1", "top5", "loss")}


def line(found):
    return f"top-1 {found['top1']:.3f}  top-5 {found['top5']:.3f}  loss {found['loss']:.6f}  (12 images, each counted once)"


def test_a_run_folder_or_a_checkpoint_needs_no_flag(run, run_validate, tmp_path):
    out = run_validate(run, "--results-file", tmp_path / "results.json")
    assert out.status == 0 and line(reported(run)) in out.out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["loss"] == reported(run)["loss"]  # every digit
    keys = "model top1 top1_err top5 top5_err loss param_count img_size crop_pct interpolation num_images"
    assert list(results) == keys.split()
    assert results["model"] == "tnt_ti" and results["img_size"] == 32 and results["crop_pct"] == 0.9
    assert results["num_images"] == 12 and results["top1"] == round(reported(run)["top1"], 4)

    elsewhere = shutil.move(run / "model_best.pth.tar", tmp_path / "elsewhere.pth.tar")
    assert line(reported(run)) in run_validate(elsewhere).out


def test_weights_workers_and_batch_size(run, run_validate):
    assert line(reported(run, "")) in run_validate(run, "--no-use-ema").out
    for workers in (0, 2):
        assert line(reported(run)) in run_validate(run, "--workers", workers).out
    out = run_validate(run, "-b", "7").out
    assert "(12 images, each counted once)" in out and f"top-1 {reported(run)['top1']:.3f}" in out


def test_a_run_at_another_image_size_and_as_a_folder_of_timm(run, run_validate, tmp_path):
    out = run_validate(run, "--img-size", "64")
    assert out.status == 0 and "patch_pos (1, 5, 24) -> (1, 17, 24)" in out.out
    data = file_format.read(run / "model_best.pth.tar")["config"]["data_dir"]
    (tmp_path / "folder").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / name, tmp_path / "folder")
    assert line(reported(run)) in run_validate(tmp_path / "folder", "--data-dir", data).out


def test_any_timm_model_on_any_data(run_validate, make_folder, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "resnet.pth")
    data = make_folder()
    args = ["--model", "resnet18", "--num-classes", "3", "--img-size", "64", "--checkpoint", tmp_path / "resnet.pth"]
    out = run_validate("--data-dir", data, *args, "-b", "5", "--workers", "0")
    assert out.status == 0, out.err
    assert run_validate(data, *args, "-b", "5", "--workers", "0").out == out.out

    transform = create_transform(**resolve_data_config({"img_size": 64}, model=model), is_training=False)
    dataset = create_dataset("", str(data), "validation", transform=transform)
    images, targets = zip(*dataset)
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(model(torch.stack(images)), torch.tensor(targets))
    assert float(re.search(r"loss (\S+)", out.out)[1]) == pytest.approx(loss.item(), abs=1e-4)


def read_matrix(path):
    head, *lines = csv.reader(path.open())
    assert head[0] == "" and [name for name, *_ in lines] == head[1:]
    return head[1:], [[int(count) for count in counts] for _, *counts in lines]


def test_confusion_matrix_and_accuracy_by_class(run, run_validate, tmp_path):
    """Against timm's model of the run's folder, image by image."""
    out = run_validate(run, "--per-class", "--confusion-matrix", tmp_path / "confusion.csv")
    assert out.status == 0 and line(reported(run)) in out.out
    names, matrix = read_matrix(tmp_path / "confusion.csv")
    assert names == ["ant", "bee", "cat"]

    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    config = file_format.read(run / "model_best.pth.tar")["config"]
    images = create_dataset("", config["data_dir"], "validation", is_training=False)
    images.transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    expected = [[0] * 3 for _ in range(3)]
    for image, target in images:
        expected[target][model(image[None]).argmax().item()] += 1
    assert matrix == expected and sum(map(sum, matrix)) == 12
    for number, name in enumerate(names):
        right = matrix[number][number]
        assert f"{name}  top-1 {100 * right / 4:7.3f}  ({right} of 4 images)" in out.out


@pytest.mark.parametrize("part, names, count", [("", "0123456789", 360), ("/3-5", "345", 110)])
def test_confusion_of_digits_by_a_model_without_weights(run_validate, tmp_path, part, names, count):
    model = ["--model", "tnt_ti", "--model-kwargs", "depth=1", "--img-size", "32", "--num-classes", len(names)]
    matrix = ["--confusion-matrix", tmp_path / "m.csv"]
    out = run_validate(*model, "--dataset", f"digits{part}", "--workers", "0", *matrix)
    assert out.status == 0 and f"({count} images, each counted once)" in out.out
    assert read_matrix(tmp_path / "m.csv")[0] == list(names)


def test_a_file_that_cannot_be_written(run_validate, tmp_path):
    out = run_validate(tmp_path, "--confusion-matrix", tmp_path / "nowhere" / "m.csv")
    assert out.status == 2 and "confusion_matrix: " in out.error and "no such folder" in out.error


def test_an_unreachable_hub_is_one_line(run_validate, make_folder, monkeypatch, tmp_path):
    """The hub's client retries, and logs each time."""
    waits, lines = [], logging.handlers.BufferingHandler(1000)
    hub = "huggingface_hub.constants"
    monkeypatch.setattr(f"{hub}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{hub}.HF_HUB_CACHE", str(tmp_path / "cache"))
    nobody = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"  # no one listens at the port
    monkeypatch.setattr(f"{hub}.HUGGINGFACE_CO_URL_TEMPLATE", nobody)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    logging.getLogger("huggingface_hub").addHandler(lines)
    out = run_validate(make_folder(), "--model", "tnt_s", "--pretrained", "--num-classes", "3", "--workers", "0")
    logging.getLogger("huggingface_hub").removeHandler(lines)
    assert out.status == 1 and "the published weights could not be fetched" in out.error
    assert len(waits) >= 5 and not lines.buffer and out.err.count("\n") == 1 and out.out == ""
