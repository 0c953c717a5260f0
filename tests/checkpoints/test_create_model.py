"""Where training starts: published weights, a file taken as if it were published, a file that fits as it is."""

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

# Training that changes nothing: what is saved is what it started from.
STILL = ["--sched", "constant", "--lr", "1e-300", "--weight-decay", "0", "--opt", "momentum", "--momentum", "0"]
STILL += ["--epochs", "1", "--warmup-epochs", "0", "--cooldown-epochs", "0", "--workers", "0", "-b", "8", "--no-aug"]
DEIT = ["--model", "deit_tiny_patch16_224", "--model-kwargs", "depth=1", "embed_dim=24", "num_heads=3"]
DEIT_KWARGS = dict(depth=1, embed_dim=24, num_heads=3)
TNT_KWARGS = dict(depth=2, embed_dim=24, inner_dim=6, num_heads_inner=2, num_heads_outer=3)


@pytest.fixture
def train(run_train, make_folder, tmp_path):
    data = make_folder()

    def train(*argv, name="run", status=0):
        out = run_train(data, "--output", tmp_path / "out", "--experiment", name, *argv)
        assert out.status == status, out.err
        return out, tmp_path / "out" / name

    return train


@pytest.fixture
def save(tmp_path):
    """Weights that are unlike any fresh ones, in a file."""

    def save(model: str, name: str = "start.pth", without: str = "nothing", **kwargs) -> Path:
        torch.manual_seed(7)
        weights = timm.create_model(model, **kwargs).state_dict()
        weights = {key: torch.randn_like(value) / 10 for key, value in weights.items() if without not in key}
        torch.save({"state_dict": weights, "args": argparse.Namespace(lr=0.1)}, tmp_path / name)
        return tmp_path / name

    return save


def weights(path: Path) -> dict:
    return file_format.read(path)["state_dict"]


def started_from(folder: Path) -> dict:
    return weights(folder / file_format.LAST)


def same(a: dict, b: dict, but: tuple = ()) -> bool:
    names = [name for name in a if not name.startswith(but)]
    return len(names) > 10 and all(torch.equal(a[name], b[name]) for name in names)


# ------------------------------------------------------------- pretrained_path


def test_a_file_for_another_image_size_and_other_classes_is_adapted(train, save):
    path = save("deit_tiny_patch16_224", img_size=64, num_classes=5, **DEIT_KWARGS)
    out, folder = train(*DEIT, *STILL, "--img-size", "32", "--pretrained-path", path)
    assert out.out.count(f"{path}: adapted to deit_tiny_patch16_224 with a new head of 3 classes") == 1
    theirs, ours = weights(path), started_from(folder)
    assert same(theirs, ours, but=("head", "pos_embed"))
    torch.testing.assert_close(ours["pos_embed"], resample_abs_pos_embed(theirs["pos_embed"], (2, 2), (4, 4), 1))
    assert ours["head.weight"].shape == (3, 24)
    torch.manual_seed(42)  # the new head is the one that the run would have started with anyway
    fresh = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=3, **DEIT_KWARGS)
    assert torch.equal(fresh.head.weight, ours["head.weight"])


def test_a_head_of_the_right_size_is_kept(train, save):
    path = save("deit_tiny_patch16_224", img_size=64, num_classes=3, **DEIT_KWARGS)
    out, folder = train(*DEIT, *STILL, "--img-size", "32", "--pretrained-path", path)
    assert same(weights(path), started_from(folder), but=("pos_embed",)) and "with a new head" not in out.out


def test_a_file_without_a_head_and_one_with_two(train, save):
    path = save("deit_tiny_patch16_224", without="head", img_size=32, **DEIT_KWARGS)
    out, folder = train(*DEIT, *STILL, "--img-size", "32", "--pretrained-path", path)
    assert same(weights(path), started_from(folder)) and "with a new head of 3 classes" in out.out
    model = "deit_tiny_distilled_patch16_224"
    path = save(model, "two.pth", img_size=32, num_classes=5, **DEIT_KWARGS)
    _, folder = train("--model", model, *DEIT[2:], *STILL, "--img-size", "32", "--pretrained-path", path, name="two")
    assert same(weights(path), started_from(folder), but=("head",))
    assert started_from(folder)["head_dist.weight"].shape == (3, 24)


@pytest.mark.parametrize("classes", [3, 5], ids=["head fits", "new head"])
def test_original_names_are_timms_business(train, tmp_path, classes):
    """ConvNeXt's first release calls the head by another name than timm: it is kept where it fits, and new where not."""
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
    out, folder = train(*argv, *STILL, "--img-size", "32", "--pretrained-path", tmp_path / "original.pth")
    assert same(network.state_dict(), started_from(folder), but=("head.fc",) if classes == 5 else ())
    assert ("with a new head" in out.out) == (classes == 5)


def test_a_tnt_of_another_size_is_adapted_and_the_log_says_how_once(train, save, tiny):
    path = save("tnt_ti", img_size=64, num_classes=5, **TNT_KWARGS)
    out, folder = train(*tiny, *STILL, "--pretrained-path", path)
    assert out.out.count(f"{path}: ") == 1 and out.out.count("patch_pos (1, 17, 24) -> (1, 5, 24)") == 1
    assert out.out.index("patch_pos") < out.out.index("model  ")
    assert same(weights(path), started_from(folder), but=("head", "patch_pos"))
    assert logging.getLogger("tnt_timm").handlers == [] and logging.getLogger("tnt_timm").level == logging.NOTSET


def test_averaged_weights_are_preferred(train, save, tmp_path):
    path = save("deit_tiny_patch16_224", img_size=32, num_classes=3, **DEIT_KWARGS)
    raw = weights(path)
    ema = {f"module.{name}": value + 1 for name, value in raw.items()}
    torch.save({"state_dict": raw, "state_dict_ema": ema}, tmp_path / "both.pth")
    _, folder = train(*DEIT, *STILL, "--img-size", "32", "--pretrained-path", tmp_path / "both.pth")
    assert same({name: value + 1 for name, value in raw.items()}, started_from(folder))


def test_a_model_from_a_folder_takes_the_file_instead_of_the_folders_weights(train, save, tmp_path):
    save_for_hf(timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=4, **DEIT_KWARGS), tmp_path / "hub")
    path = save("deit_tiny_patch16_224", img_size=32, num_classes=3, **DEIT_KWARGS)
    _, folder = train("--model", f"local-dir:{tmp_path / 'hub'}", *STILL, "--pretrained-path", path)
    assert same(weights(path), started_from(folder))


@pytest.mark.parametrize("classes", [3, 5], ids=["head fits", "new head"])
@pytest.mark.parametrize("other", [dict(depth=2), dict(embed_dim=48)], ids=["deeper", "wider"])
def test_a_file_of_another_architecture_is_refused(train, save, tmp_path, classes, other):
    """Also where the head is new, and timm by itself would load what fits and leave the rest as it is."""
    path = save("deit_tiny_patch16_224", img_size=32, num_classes=classes, **{**DEIT_KWARGS, **other})
    out, _ = train(*DEIT, *STILL, "--img-size", "32", "--pretrained-path", path, status=1)
    assert f"pretrained_path: {path}: weights of another architecture" in out.error
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_tnt(train, save, tiny, tmp_path):
    path = save("deit_tiny_patch16_224", img_size=32, num_classes=3, **DEIT_KWARGS)
    out, _ = train(*tiny, *STILL, "--pretrained-path", path, status=1)
    assert f"error: pretrained_path: {path}: not a TNT" in out.error and out.error.count(str(path)) == 1
    path = save("tnt_ti", img_size=32, **{**TNT_KWARGS, "depth": 1})
    assert "another TNT" in train(*tiny, *STILL, "--pretrained-path", path, status=1)[0].error
    torch.save({"epoch": 3}, path)
    for model in (tiny, [*DEIT, "--img-size", "32"]):
        assert f"pretrained_path: {path}" in train(*model, *STILL, "--pretrained-path", path, status=1)[0].error
    path.write_text("hello")
    assert f"{path}: not a readable" in train(*tiny, *STILL, "--pretrained-path", path, status=1)[0].error
    path.unlink()
    assert f"{path}: no such checkpoint" in train(*tiny, *STILL, "--pretrained-path", path, status=1)[0].error


def test_two_places_to_start_from(train, save, tiny):
    path = save("tnt_ti", img_size=32, num_classes=3, **TNT_KWARGS)
    out, _ = train(*tiny, *STILL, "--pretrained-path", path, "--initial-checkpoint", path, status=2)
    assert "pretrained_path" in out.error and "initial_checkpoint" in out.error
    _, folder = train(
        *tiny, *STILL, "--pretrained", "--initial-checkpoint", path
    )  # nothing is fetched: tests are offline
    assert same(weights(path), started_from(folder))
    train(*tiny, *STILL, "--pretrained", "--pretrained-path", path, name="both")


# ---------------------------------------------------------- initial_checkpoint


def test_an_initial_checkpoint_that_could_be_adapted_points_to_pretrained_path(train, save, tiny):
    deit = [*DEIT, "--img-size", "32"]
    for model, argv, kwargs in (("tnt_ti", tiny, TNT_KWARGS), ("deit_tiny_patch16_224", deit, DEIT_KWARGS)):
        for other in (dict(img_size=64, num_classes=3), dict(img_size=32, num_classes=5)):
            path = save(model, **other, **kwargs)
            out, _ = train(*argv, *STILL, "--initial-checkpoint", path, status=1)
            assert "initial_checkpoint: " in out.error and "pass it as --pretrained-path" in out.error
            train(*argv, *STILL, "--pretrained-path", path, name=f"{model} {other}")
        path = save(model, img_size=32, num_classes=3, **{**kwargs, "depth": 3})
        assert "--pretrained-path" not in train(*argv, *STILL, "--initial-checkpoint", path, status=1)[0].error


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("setting", ["--pretrained-path", "--initial-checkpoint"])
def test_a_run_goes_on_without_the_file_that_it_started_from(train, save, tiny, setting):
    path = save("tnt_ti", img_size=32, num_classes=3, **TNT_KWARGS)
    more = [*STILL, "--lr", "1e-2", setting, path]
    _, straight = train(*tiny, *more, "--epochs", "2", name="straight")
    train(*tiny, *more, name="stopped")
    path.unlink()
    out, stopped = train(*tiny, *more, "--epochs", "2", name="stopped")
    assert "1 of 2 epochs are done" in out.out
    assert same(started_from(straight), started_from(stopped))
    train(*tiny, *more, name="afresh", status=1)  # there it is missing


def test_published_weights_are_not_fetched_again_when_a_run_goes_on(train, tmp_path):
    network = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=3, **DEIT_KWARGS)
    save_for_hf(network, tmp_path / "hub")
    hub = ["--model", f"local-dir:{tmp_path / 'hub'}", "--pretrained"]
    _, folder = train(*hub, *STILL)
    assert same(network.state_dict(), started_from(folder))
    for file in (tmp_path / "hub").iterdir():
        if file.name != "config.json":
            file.unlink()
    assert "1 of 2 epochs" in train(*hub, *STILL, "--epochs", "2")[0].out
    train(*hub, *STILL, name="afresh", status=1)


def test_a_new_start_for_a_run_that_has_started_is_said_to_be_without_effect(train, save, tiny):
    train(*tiny, *STILL)
    path = save("tnt_ti", img_size=32, num_classes=3, **TNT_KWARGS)
    out, _ = train(*tiny, *STILL, "--epochs", "2", "--pretrained-path", path)
    assert f"pretrained_path: None -> '{path}' (without effect: the run has started)" in out.out


# -------------------------------------------------------------------- validate


def numbers(text: str) -> str:
    return next(line for line in text.splitlines() if "top-1" in line)


def test_validate_takes_the_file_too(run_validate, save, make_folder):
    path = save("deit_tiny_patch16_224", img_size=64, num_classes=3, **DEIT_KWARGS)
    argv = [make_folder(), *DEIT, "--workers", "0"]
    as_it_is = run_validate(*argv, "--img-size", "64", "--num-classes", "3", "--checkpoint", path)
    adapted = run_validate(*argv, "--img-size", "64", "--pretrained-path", path)  # three classes, as in the file
    assert as_it_is.status == adapted.status == 0 and numbers(as_it_is.out) == numbers(adapted.out)
    other = run_validate(*argv, "--img-size", "32", "--pretrained-path", path)
    assert other.status == 0 and numbers(other.out) != numbers(adapted.out)


def test_validate_shows_what_became_of_the_weights_of_a_tnt(run_validate, save, tiny, make_folder):
    path = save("tnt_ti", img_size=64, num_classes=3, **TNT_KWARGS)
    out = run_validate(make_folder(), *tiny, "--workers", "0", "--pretrained-path", path)
    assert out.status == 0 and out.out.count("patch_pos (1, 17, 24) -> (1, 5, 24)") == 1


def test_validate_refuses_a_head_that_was_never_trained(run_validate, save, tiny, make_folder, tmp_path):
    data = make_folder()
    path = save("deit_tiny_patch16_224", img_size=32, num_classes=5, **DEIT_KWARGS)
    argv = [data, *DEIT, "--img-size", "32", "--workers", "0", "--pretrained-path", path]
    assert "5 classes and the data 3" in run_validate(*argv).error
    assert "no head for 3 classes" in run_validate(*argv, "--num-classes", "3").error
    path = save("tnt_ti", without="head", img_size=32, **TNT_KWARGS)
    argv = [data, *tiny, "--workers", "0", "--num-classes", "3", "--pretrained-path", path]
    assert "no head for 3 classes" in run_validate(*argv).error
    shutil.copy(path, tmp_path / "run.pth")
    for wrong in ([tmp_path / "run.pth"], [data, *tiny, "--checkpoint", path]):
        out = run_validate(*wrong, "--pretrained-path", path)
        assert out.status == 2 and "--pretrained-path" in out.error


# ------------------------------------------------- files as others write them


def test_files_that_keep_their_command_line_are_read(run_validate, save, make_folder):
    """timm, DeiT and the official release save an argparse.Namespace beside the weights."""
    path = save("deit_tiny_patch16_224", img_size=32, num_classes=3, **DEIT_KWARGS)
    assert file_format.read(path)["args"] == argparse.Namespace(lr=0.1)
    argv = [make_folder(), *DEIT, "--img-size", "32", "--num-classes", "3", "--workers", "0", "--checkpoint", path]
    assert run_validate(*argv).status == 0
    torch.save({"state_dict": {}, "args": argparse.Namespace(output=pathlib.PurePosixPath("/x"))}, path)
    out = run_validate(*argv)
    assert out.status == 1 and "refused" in out.error
