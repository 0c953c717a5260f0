"""Where training starts: published weights, a file that is adapted like them, or a file that fits as it is."""

import argparse
import logging
import pathlib
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf

from tnt_timm.checkpoints import file_format

# Training that changes nothing: the saved weights are those that it started from.
STILL = """--sched constant --lr 1e-300 --weight-decay 0 --opt momentum --momentum 0 --epochs 1 --warmup-epochs 0
    --cooldown-epochs 0 --workers 0 -b 8 --no-aug""".split()
DEIT_KWARGS = dict(depth=1, embed_dim=24, num_heads=3)
DEIT = ["--model", "deit_tiny_patch16_224", "--model-kwargs", *(f"{key}={value}" for key, value in DEIT_KWARGS.items())]
TNT_KWARGS = dict(depth=2, embed_dim=24, inner_dim=6, num_heads_inner=2, num_heads_outer=3)
NEW_HEAD = "with a new head of 3 classes"


@pytest.fixture
def start(train):
    """Start from a file without changing it; return the outcome and the weights, if it succeeds."""

    def start(*argv, **options):
        out, folder = train(*STILL, *argv, **options)
        return out, weights(folder / file_format.LAST) if out.status == 0 else None

    return start


@pytest.fixture
def save(tmp_path):
    """Save weights that differ from any fresh ones."""

    def save(model: str, name: str = "start.pth", without: str = "nothing", **kwargs) -> Path:
        torch.manual_seed(7)
        weights = timm.create_model(model, **{"img_size": 32, "num_classes": 3, **kwargs}).state_dict()
        weights = {key: torch.randn_like(value) / 10 for key, value in weights.items() if without not in key}
        torch.save({"state_dict": weights, "args": argparse.Namespace(lr=0.1)}, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def save_deit(save):
    return lambda **kwargs: save("deit_tiny_patch16_224", **{**DEIT_KWARGS, **kwargs})


@pytest.fixture
def save_tnt(save):
    return lambda **kwargs: save("tnt_ti", **{**TNT_KWARGS, **kwargs})


def weights(path: Path) -> dict:
    return file_format.read(path)["state_dict"]


def same(a: dict, b: dict, but: tuple = ()) -> bool:
    names = [name for name in a if not name.startswith(but)]
    return len(names) > 10 and all(torch.equal(a[name], b[name]) for name in names)


# ------------------------------------------------------------- pretrained_path


def test_a_file_for_another_image_size_and_other_classes_is_adapted(start, save_deit):
    path = save_deit(img_size=64, num_classes=5)
    out, ours = start(*DEIT, "--pretrained-path", path)
    assert out.out.count(f"{path}: adapted to deit_tiny_patch16_224 {NEW_HEAD}") == 1
    theirs = weights(path)
    assert same(theirs, ours, but=("head", "pos_embed"))
    torch.testing.assert_close(ours["pos_embed"], resample_abs_pos_embed(theirs["pos_embed"], (2, 2), (4, 4), 1))
    assert ours["head.weight"].shape == (3, 24)
    torch.manual_seed(42)  # the new head is the one that the run would have started with anyway
    fresh = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=3, **DEIT_KWARGS)
    assert torch.equal(fresh.head.weight, ours["head.weight"])


def test_a_head_of_the_right_size_is_kept(start, save_deit):
    path = save_deit(img_size=64)
    out, ours = start(*DEIT, "--pretrained-path", path)
    assert same(weights(path), ours, but=("pos_embed",)) and "new head" not in out.out


def test_a_file_without_a_head_and_one_with_two(start, save, save_deit):
    path = save_deit(without="head")
    out, ours = start(*DEIT, "--pretrained-path", path)
    assert same(weights(path), ours) and NEW_HEAD in out.out
    model = "deit_tiny_distilled_patch16_224"
    path = save(model, "two.pth", num_classes=5, **DEIT_KWARGS)
    _, ours = start(*DEIT, "--model", model, "--pretrained-path", path, name="two")
    assert same(weights(path), ours, but=("head",)) and ours["head_dist.weight"].shape == (3, 24)


@pytest.mark.parametrize("classes", [3, 5], ids=["head fits", "new head"])
def test_original_names_are_timms_business(start, tmp_path, classes):
    """ConvNeXt's first release calls the head by another name than timm. It is kept if it fits."""
    sizes = dict(depths=[1, 1, 1, 1], dims=[8, 8, 8, 8])
    network = timm.create_model("convnext_tiny", num_classes=classes, **sizes)
    words = {"stem": "downsample_layers.0", r"stages\.(\d)\.downsample": r"downsample_layers.\1", r"\.blocks": ""}
    words |= {"conv_dw": "dwconv", r"mlp\.fc": "pwconv", r"head\.norm": "norm", r"head\.fc": "head"}
    original = network.state_dict()
    for ours, theirs in words.items():
        original = {re.sub(ours, theirs, key): value for key, value in original.items()}
    assert "head.weight" in original and "downsample_layers.3.1.weight" in original
    torch.save({"model": original}, tmp_path / "original.pth")
    argv = ["--model", "convnext_tiny", "--model-kwargs", *(f"{key}={value}" for key, value in sizes.items())]
    out, ours = start(*argv, "--pretrained-path", tmp_path / "original.pth")
    assert same(network.state_dict(), ours, but=("head.fc",) if classes == 5 else ())
    assert (NEW_HEAD in out.out) == (classes == 5)


def test_a_tnt_of_another_size_is_adapted_and_the_log_says_how_once(start, save_tnt):
    path = save_tnt(img_size=64, num_classes=5)
    out, ours = start("--pretrained-path", path)
    assert out.out.count(f"{path}: ") == 1 and out.out.count("patch_pos (1, 17, 24) -> (1, 5, 24)") == 1
    assert out.out.index("patch_pos") < out.out.index("model  ")
    assert same(weights(path), ours, but=("head", "patch_pos"))
    assert logging.getLogger("tnt_timm").handlers == [] and logging.getLogger("tnt_timm").level == logging.NOTSET


def test_averaged_weights_are_preferred(start, save_deit, tmp_path):
    raw = weights(save_deit())
    ema = {f"module.{name}": value + 1 for name, value in raw.items()}
    torch.save({"state_dict": raw, "state_dict_ema": ema}, tmp_path / "both.pth")
    _, ours = start(*DEIT, "--pretrained-path", tmp_path / "both.pth")
    assert same({name: value + 1 for name, value in raw.items()}, ours)


def test_a_model_from_a_folder_takes_the_file_instead_of_the_folders_weights(
    run_train, make_folder, save_deit, tmp_path
):
    save_for_hf(timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=4, **DEIT_KWARGS), tmp_path / "hub")
    path = save_deit()
    argv = ["--model", f"local-dir:{tmp_path / 'hub'}", *STILL, "--output", tmp_path, "--experiment", "run"]
    assert run_train(make_folder(), *argv, "--pretrained-path", path).status == 0
    assert same(weights(path), weights(tmp_path / "run" / file_format.LAST))


@pytest.mark.parametrize("classes", [3, 5], ids=["head fits", "new head"])
@pytest.mark.parametrize("other", [dict(depth=2), dict(embed_dim=48)], ids=["deeper", "wider"])
def test_a_file_of_another_architecture_is_refused(start, save_deit, tmp_path, classes, other):
    """Also if the head is new: then timm alone would load what fits and leave the rest random."""
    path = save_deit(num_classes=classes, **other)
    out, _ = start(*DEIT, "--pretrained-path", path, status=1)
    assert f"pretrained_path: {path}: weights of another architecture" in out.error
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_tnt(start, save_deit, save_tnt):
    def error(*model: object) -> str:
        return start(*model, "--pretrained-path", path, status=1)[0].error

    path = save_deit()
    assert f"error: pretrained_path: {path}: not a TNT" in error() and error().count(str(path)) == 1
    save_tnt(depth=1)
    assert "another TNT" in error()
    torch.save({"epoch": 3}, path)
    assert f"pretrained_path: {path}" in error() and f"pretrained_path: {path}" in error(*DEIT)
    path.write_text("hello")
    assert f"{path}: not a readable" in error()
    path.unlink()
    assert f"{path}: no such checkpoint" in error()


def test_two_places_to_start_from(start, save_tnt):
    path = save_tnt()
    out, _ = start("--pretrained-path", path, "--initial-checkpoint", path, status=2)
    assert "pretrained_path" in out.error and "initial_checkpoint" in out.error
    _, ours = start("--pretrained", "--initial-checkpoint", path)  # nothing is downloaded: tests are offline
    assert same(weights(path), ours)
    start("--pretrained", "--pretrained-path", path, name="both")


# ---------------------------------------------------------- initial_checkpoint


@pytest.mark.parametrize("argv, model", [([], "save_tnt"), (DEIT, "save_deit")], ids=["tnt", "deit"])
def test_an_initial_checkpoint_that_could_be_adapted_points_to_pretrained_path(start, request, argv, model):
    save = request.getfixturevalue(model)
    for number, other in enumerate((dict(img_size=64), dict(num_classes=5))):
        path = save(**other)
        out, _ = start(*argv, "--initial-checkpoint", path, status=1)
        assert "initial_checkpoint: " in out.error and "pass it as --pretrained-path" in out.error
        start(*argv, "--pretrained-path", path, name=str(number))
    out, _ = start(*argv, "--initial-checkpoint", save(depth=3), status=1)
    assert "--pretrained-path" not in out.error and "new head" not in out.out


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("setting", ["--pretrained-path", "--initial-checkpoint"])
def test_a_run_resumes_without_the_file_that_it_started_from(start, save_tnt, setting):
    path = save_tnt()
    more = ["--lr", "1e-2", setting, path]
    _, straight = start(*more, "--epochs", "2", name="straight")
    start(*more, name="stopped")
    path.unlink()
    out, stopped = start(*more, "--epochs", "2", name="stopped")
    assert "1 of 2 epochs are done" in out.out and same(straight, stopped)
    start(*more, name="afresh", status=1)  # there it is missing


def test_published_weights_are_not_downloaded_again_when_a_run_resumes(run_train, make_folder, tmp_path):
    network = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=3, **DEIT_KWARGS)
    save_for_hf(network, tmp_path / "hub")
    argv = [make_folder(), "--model", f"local-dir:{tmp_path / 'hub'}", "--pretrained", *STILL, "--output", tmp_path]
    assert run_train(*argv, "--experiment", "run").status == 0
    assert same(network.state_dict(), weights(tmp_path / "run" / file_format.LAST))
    for file in (tmp_path / "hub").iterdir():
        if file.name != "config.json":
            file.unlink()
    assert "1 of 2 epochs" in run_train(*argv, "--experiment", "run", "--epochs", "2").out
    assert run_train(*argv, "--experiment", "afresh").status == 1


# -------------------------------------------------------------------- validate


def numbers(out) -> str:
    assert out.status == 0, out.err
    return next(line for line in out.out.splitlines() if "top-1" in line)


def test_validate_takes_the_file_too(run_validate, save_deit, make_folder):
    path = save_deit(img_size=64)
    argv = [make_folder(), *DEIT, "--workers", "0"]
    as_it_is = run_validate(*argv, "--img-size", "64", "--num-classes", "3", "--checkpoint", path)
    adapted = run_validate(*argv, "--img-size", "64", "--pretrained-path", path)  # three classes, as in the file
    other = run_validate(*argv, "--img-size", "32", "--pretrained-path", path)
    assert numbers(as_it_is) == numbers(adapted) != numbers(other)


def test_validate_shows_how_the_weights_of_a_tnt_were_adapted(run_validate, save_tnt, tiny, make_folder):
    out = run_validate(make_folder(), *tiny, "--workers", "0", "--pretrained-path", save_tnt(img_size=64))
    assert out.status == 0 and out.out.count("patch_pos (1, 17, 24) -> (1, 5, 24)") == 1


def test_validate_refuses_a_head_that_was_never_trained(run_validate, save_deit, save_tnt, tiny, make_folder, tmp_path):
    data = make_folder()
    path = save_deit(num_classes=5)
    argv = [data, *DEIT, "--img-size", "32", "--workers", "0", "--pretrained-path", path]
    assert "5 classes and the data 3" in run_validate(*argv).error
    assert "no head for 3 classes" in run_validate(*argv, "--num-classes", "3").error
    path = save_tnt(without="head", num_classes=1000)
    argv = [data, *tiny, "--workers", "0", "--num-classes", "3", "--pretrained-path", path]
    assert "no head for 3 classes" in run_validate(*argv).error
    shutil.copy(path, tmp_path / "run.pth")
    for wrong in ([tmp_path / "run.pth"], [data, *tiny, "--checkpoint", path]):
        out = run_validate(*wrong, "--pretrained-path", path)
        assert out.status == 2 and "--pretrained-path" in out.error


# ------------------------------------------------- files as others write them


def test_files_that_contain_their_command_line_are_read(run_validate, save_deit, make_folder):
    """timm, DeiT and the official release save an argparse.Namespace with the weights."""
    path = save_deit()
    assert file_format.read(path)["args"] == argparse.Namespace(lr=0.1)
    argv = [make_folder(), *DEIT, "--img-size", "32", "--num-classes", "3", "--workers", "0", "--checkpoint", path]
    assert run_validate(*argv).status == 0
    torch.save({"state_dict": {}, "args": argparse.Namespace(output=pathlib.PurePosixPath("/x"))}, path)
    out = run_validate(*argv)
    assert out.status == 1 and "refused" in out.error
