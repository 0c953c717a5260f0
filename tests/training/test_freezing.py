"""A part of the network that stays as it is: bit by bit, out of the optimizer, without dropout, on any number of processes."""

import re
from pathlib import Path

import pytest
import timm
import torch

from tnt_timm.checkpoints import file_format
from tnt_timm.errors import UserError
from tnt_timm.training.freezing import freeze
from tnt_timm.training.trainer import Trainer

TNT_KWARGS = dict(img_size=32, depth=2, embed_dim=24, inner_dim=6, num_heads_inner=2, num_heads_outer=3)
FAST = ["--workers", "0", "--warmup-epochs", "0", "--cooldown-epochs", "0", "--lr", "1e-2", "--epochs", "1", "-b", "8"]
RICH = ["--drop-path", "0.3", "--drop", "0.2", "--model-ema", "--model-ema-window", "0.5", "--mixup", "0.8"]


@pytest.fixture
def start(tmp_path) -> Path:
    """Weights of five classes."""
    torch.manual_seed(3)
    torch.save(timm.create_model("tnt_ti", num_classes=5, **TNT_KWARGS).state_dict(), tmp_path / "start.pth")
    return tmp_path / "start.pth"


@pytest.fixture
def train(run_train, make_folder, tiny, tmp_path, start):
    data = make_folder()

    def train(*argv, name="run", status=0):
        argv = [*tiny, *FAST, "--pretrained-path", start, *argv]
        out = run_train(data, "--output", tmp_path / "out", "--experiment", name, *argv)
        assert out.status == status, out.err
        return out, tmp_path / "out" / name

    return train


def last(folder: Path) -> dict:
    return file_format.read(folder / file_format.LAST)


def test_a_linear_probe_trains_the_head_alone(train, start):
    out, folder = train("--freeze", "backbone", *RICH)
    before, state = file_format.read(start), last(folder)
    for key in ("state_dict", "state_dict_ema"):
        moved = {name for name, value in state[key].items() if not torch.equal(value, before.get(name))}
        assert moved == {"head.weight", "head.bias"}
    assert [tuple(moments["exp_avg"].shape) for moments in state["optimizer"]["state"].values()] in (
        [(3,), (3, 24)],
        [(3, 24), (3,)],
    )
    assert sum(len(group["params"]) for group in state["optimizer"]["param_groups"]) == 2
    count = sum(value.numel() for value in before.values()) - 2 * 25
    assert f"{count:,} parameters (75 trained, the others frozen)" in out.out


def test_the_first_blocks_stay_and_the_others_train(train, start):
    _, folder = train("--freeze", "1", "--weight-decay", "0.5")
    before, after = file_format.read(start), last(folder)["state_dict"]
    still = {name for name, value in after.items() if torch.equal(value, before.get(name, value + 1))}
    assert still == {name for name in after if not name.startswith(("blocks.1.", "norm.", "head."))}


def test_layer_decay_and_freezing_go_together(train, start):
    _, folder = train("--freeze", "1", "--layer-decay", "0.5")
    groups = last(folder)["optimizer"]["param_groups"]
    assert sorted({group["lr_scale"] for group in groups}) == [0.5, 1.0]  # the second block; norm and head


def modes(model, frozen):
    model.train()
    for module in frozen:
        module.training = False
    return {name for name, module in model.named_modules() if module.training}


def test_what_is_frozen_is_in_evaluation_mode_and_the_heads_dropout_is_not():
    model = timm.create_model("tnt_ti", num_classes=3, drop_path_rate=0.5, drop_rate=0.5, **TNT_KWARGS)
    assert modes(model, freeze(model, "backbone")) == {"", "head_drop", "head"}
    features = [model.train(False).forward_features(torch.ones(1, 3, 32, 32))]
    modes(model, freeze(model, "backbone"))
    features.append(model.forward_features(torch.ones(1, 3, 32, 32)))
    assert torch.equal(*features) and not features[1].requires_grad
    model = timm.create_model("tnt_ti", num_classes=3, **TNT_KWARGS)
    on = modes(model, freeze(model, "1"))
    assert {"", "blocks", "blocks.1", "blocks.1.drop_path", "norm", "head_drop", "head"} <= on
    assert not any(re.match(r"blocks\.0|pixel_embed|norm1_proj|pos_drop", name) for name in on)


@pytest.mark.parametrize("name", ["resnet18", "deit_tiny_distilled_patch16_224", "tnt_ti_distilled", "convnext_atto"])
def test_other_models(name):
    """Their batch statistics stay too, and of two heads both are trained."""
    model = timm.create_model(name, num_classes=3)
    frozen = freeze(model, "backbone")
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    names = model.pretrained_cfg["classifier"]
    names = (names,) if isinstance(names, str) else names
    assert trained == {f"{head}.{part}" for head in names for part in ("weight", "bias")}
    on = {name for name in modes(model, frozen) if not isinstance(model.get_submodule(name), torch.nn.Identity)}
    assert not any("norm" in name or "bn" in name for name in on)
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    model(torch.randn(2, 3, 224, 224))
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())


def test_more_blocks_than_there_are(train):
    assert "freeze: 3: the model has 2 blocks" in train("--freeze", "3", status=1)[0].error
    with pytest.raises(UserError, match="leaves nothing to train"):
        freeze(timm.create_model("tnt_ti", num_classes=0, **TNT_KWARGS), "backbone")


def test_a_probe_that_was_stopped_ends_with_the_same_bits(train, assert_same_bits, monkeypatch):
    settings = ["--freeze", "backbone", *RICH, "--epochs", "2", "--recovery-interval", "1"]
    _, straight = train(*settings, name="straight")
    real = Trainer.train_step

    def crashing(self, *args):
        if self.progress.updates == 4:
            raise ZeroDivisionError
        return real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Trainer, "train_step", crashing)
        train(*settings, name="stopped")
    out, stopped = train(*settings, name="stopped")
    assert "resuming from" in out.out
    assert_same_bits(straight, stopped)
    assert "freeze: 'backbone' -> ''" in train(*settings[2:], name="stopped", status=2)[0].error


def test_window_of_the_ema_is_said_and_kept(train):
    out, folder = train("--model-ema", "--model-ema-window", "2", "--model-ema-warmup")
    assert "EMA 0.83333333 after warm-up (a window of 2 epochs)" in out.out  # 3 updates an epoch
    assert last(folder)["config"]["model_ema_window"] == 2.0


def test_pretrained_weights_of_a_run_folder(train, start, tmp_path):
    _, folder = train("--freeze", "backbone")
    for setting in ("--pretrained-path", "--initial-checkpoint"):
        more = ["--pretrained-path", ""] if setting == "--initial-checkpoint" else []
        out, again = train(
            "--freeze", "backbone", "--lr", "1e-300", "--min-lr", "0", *more, setting, folder, name=setting[2:]
        )
        assert torch.equal(last(again)["state_dict"]["head.weight"], last(folder)["state_dict"]["head.weight"])
    (tmp_path / "empty").mkdir()
    out, _ = train("--pretrained-path", tmp_path / "empty", name="empty", status=1)
    assert "neither a run folder (no model_best.pth.tar)" in out.error
