"""Distillation, on real runs: the loss by the formula, a teacher that stays what it is, runs that continue."""

import csv
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from timm.task import LogitDistillationTask, TokenDistillationTask

from tnt_timm.checkpoints import file_format
from tnt_timm.data.datasets import open_dataset
from tnt_timm.data.transforms import training_transform

DEIT = ["--model", "deit_tiny_distilled_patch16_224", "--img-size", "32"]
DEIT += ["--model-kwargs", "depth=1", "embed_dim=24", "num_heads=3"]
DISTILLED_TNT = ["--model", "tnt_ti_distilled", "--img-size", "32", "--model-kwargs", "depth=1", "embed_dim=24"]
DISTILLED_TNT += ["inner_dim=6", "num_heads_inner=2", "num_heads_outer=3"]
SHORT = ["--epochs", "1", "--warmup-epochs", "0", "--cooldown-epochs", "0", "--workers", "0", "-b", "8", "--lr", "1e-3"]
# One update of plain gradient descent on all 24 images as they are
ONE_UPDATE = ["--no-aug", "--smoothing", "0", "--opt", "momentum", "--momentum", "0", "--weight-decay", "0"]
ONE_UPDATE += ["--sched", "constant", "--epochs", "1", "--warmup-epochs", "0", "--cooldown-epochs", "0"]
ONE_UPDATE += ["--workers", "0", "-b", "24", "--lr", "0.1", "--seed", "3"]
RICH = ["--mixup", "0.8", "--cutmix", "1.0", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.25", "--aug-repeats", "3"]
RICH += ["--drop-path", "0.2", "--drop", "0.1", "--model-ema", "--model-ema-decay", "0.9", "--model-ema-warmup"]
RICH += ["-b", "4", "--lr", "1e-3", "--warmup-epochs", "1", "--cooldown-epochs", "0", "--workers", "0"]
TOKEN = ["--kd-distill-type", "token"]
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # of the teachers; TNT's is 0.5 throughout


@pytest.fixture
def make_teacher(tmp_path):
    """Saves a small network as a timm folder; returns it and the name that train.py takes."""

    def make(num_classes: int = 3, model: str = "test_resnet", **kwargs):
        torch.manual_seed(11)
        network = timm.create_model(model, num_classes=num_classes, **kwargs).eval()
        network.get_classifier().weight.data.mul_(100)  # a teacher with opinions
        network.pretrained_cfg.update(IMAGENET)
        folder = tmp_path / f"{model}_{num_classes}"
        save_for_hf(network, folder)
        return network, f"local-dir:{folder}"

    return make


@pytest.fixture
def train(run_train, make_folder, tmp_path):
    data = make_folder()

    def train(*argv, name="run", status=0):
        out = run_train(data, "--output", tmp_path / "out", "--experiment", name, *argv)
        assert out.status == status, out.err
        return out, tmp_path / "out" / name

    return train


@pytest.fixture
def steps(monkeypatch):
    """What each call of a distillation task was given and gave, and the tasks themselves."""
    seen = []
    for task in (LogitDistillationTask, TokenDistillationTask):
        real = task.forward

        def forward(self, images, targets, real=real):
            result = real(self, images, targets)
            seen.append((self, images, targets, result))
            return result

        monkeypatch.setattr(task, "forward", forward)
    return seen


def last(folder: Path) -> dict:
    return file_format.read(folder / file_format.LAST)


def train_loss(folder: Path) -> float:
    return float(next(csv.DictReader((folder / "summary.csv").open()))["train_loss"])


def matched(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Hinton's distillation loss: T^2 times the mean divergence of the student's probabilities from the teacher's."""
    p = (teacher / temperature).softmax(dim=1)
    return temperature**2 * (p * (p.log() - (student / temperature).softmax(dim=1).log())).sum(dim=1).mean()


def all_images(folder: Path):
    """The 24 training images as grey values (24, 3, 32, 32), and their targets."""
    images = open_dataset("", last(folder)["config"]["data_dir"], "train", True)
    transform = training_transform((3, 32, 32), (0.5,) * 3, (0.5,) * 3, no_aug=True)
    pairs = [images.load(i) for i in range(24)]
    return torch.stack([transform(image) for image, _ in pairs]).double(), torch.tensor([t for _, t in pairs])


def normalised(pixels: torch.Tensor, mean, std) -> torch.Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (mean, std))
    return ((pixels / 255 - mean) / std).float()


def assert_is_the_update(folder: Path, loss_of) -> None:
    """The run's one update is lr times the gradient of `loss_of(model in training, images, targets, grey values)`."""
    state = last(folder)
    assert state["progress"]["updates"] == 1
    torch.manual_seed(3)
    model = timm.create_model(state["arch"], **state["model_kwargs"]).train()
    pixels, targets = all_images(folder)
    images = normalised(pixels, state["preprocessing"]["mean"], state["preprocessing"]["std"])
    loss = loss_of(model, images, targets, pixels)
    loss.backward()
    assert train_loss(folder) == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(
            state["state_dict"][name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "weights, task, distill",
    [
        ([], 1.0, 1.0),
        (["--task-loss-weight", "0.3"], 0.3, 0.7),
        (["--distill-loss-weight", "0.2"], 1.0, 0.2),
        (["--distill-loss-weight", "2", "--task-loss-weight", "0"], 0.0, 2.0),
    ],
    ids=["default", "task", "distill", "both"],
)
def test_logit_distillation_is_its_formula(train, tiny, make_teacher, weights, task, distill):
    """The teacher sees the images by its own normalisation, which is not TNT's."""
    teacher, name = make_teacher()
    out, folder = train(*tiny, *ONE_UPDATE, "--kd-model-name", name, "--kd-temperature", "2", *weights)
    assert last(folder)["preprocessing"]["mean"] == (0.5, 0.5, 0.5)
    assert f"loss = {task:g} x task + {distill:g} x distillation" in out.out

    def loss(model, images, targets, pixels):
        logits = model(images)
        told = teacher(normalised(pixels, **IMAGENET)).detach()
        return task * F.cross_entropy(logits, targets) + distill * matched(logits, told, 2.0)

    assert_is_the_update(folder, loss)


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("student", [DEIT, DISTILLED_TNT], ids=["deit", "tnt"])
def test_token_distillation_is_its_formula(train, make_teacher, student, kind):
    """The first head learns from the labels, the second from the teacher."""
    teacher, name = make_teacher()
    how = [*TOKEN, "--kd-token-distill-type", kind, "--task-loss-weight", "0.25"]
    _, folder = train(*student, *ONE_UPDATE, "--kd-model-name", name, *how)

    def loss(model, images, targets, pixels):
        model.set_distilled_training(True)
        logits, logits_dist = model(images)
        told = teacher(normalised(pixels, **IMAGENET)).detach()
        distill = matched(logits_dist, told, 4.0) if kind == "soft" else F.cross_entropy(logits_dist, told.argmax(1))
        return 0.25 * F.cross_entropy(logits, targets) + 0.75 * distill

    assert_is_the_update(folder, loss)


@pytest.mark.parametrize("student", [DEIT, DISTILLED_TNT], ids=["deit", "tnt"])
def test_a_distilled_model_without_a_teacher_learns_by_the_mean_of_its_heads(train, student):
    _, folder = train(*student, *ONE_UPDATE)
    assert_is_the_update(folder, lambda model, images, targets, pixels: F.cross_entropy(model(images), targets))


def test_the_normalisation_is_the_runs_not_the_models(train, tiny, make_teacher, steps):
    """With mean and std given, the teacher still sees what it would see without."""
    _, name = make_teacher()
    for run, argv in (("a", []), ("b", ["--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6"])):
        train(*tiny, *ONE_UPDATE, "--kd-model-name", name, *argv, name=run)
    (one, images, _, _), (two, other_images, _, _) = steps
    assert not torch.allclose(images, other_images)
    torch.testing.assert_close(one.teacher.normalize_input(images), two.teacher.normalize_input(other_images))


@pytest.mark.parametrize("amp", [[], ["--amp", "--amp-dtype", "bfloat16"]], ids=["fp32", "bf16"])
def test_mixed_targets_and_mixed_precision(train, make_teacher, steps, amp):
    """Soft targets go to the task loss; networks may compute in bfloat16, no loss does."""
    _, name = make_teacher()
    train(*DEIT, *RICH, "--epochs", "1", "--warmup-epochs", "0", "--kd-model-name", name, *amp)
    assert len(steps) == 6
    for task, images, targets, result in steps:
        logits = result["output"]
        assert targets.shape == (4, 3) and logits.dtype == result["loss"].dtype == torch.float32
        if amp:
            assert torch.equal(logits, logits.bfloat16().float())
        with torch.no_grad():
            told = task.teacher(task.teacher.normalize_input(images))
        expected = -(targets * logits.log_softmax(1)).sum(1).mean() + matched(logits, told, 4.0)
        torch.testing.assert_close(result["loss"], expected, rtol=1e-5, atol=1e-6)


def test_a_student_comes_to_agree_with_its_teacher(train, make_teacher):
    """Taught by the teacher alone, whatever the labels say."""
    alone = ["--task-loss-weight", "0", "--distill-loss-weight", "1", "--kd-temperature", "1", "--no-aug"]
    args = [*DISTILLED_TNT, *SHORT, "--epochs", "15", "--lr", "1e-2", *TOKEN, *alone]
    _, folder = train(*args, "--kd-model-name", make_teacher()[1])
    losses = [float(row["train_loss"]) for row in csv.DictReader((folder / "summary.csv").open())]
    assert losses[-1] < losses[0] / 4, losses


def test_the_teacher_stays_what_it_is(train, tiny, make_teacher, steps):
    """Batch norm, gradients and weight decay leave it alone, and nothing of it is saved."""
    teacher, name = make_teacher()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    out, folder = train(*tiny, *RICH, "--epochs", "2", "--kd-model-name", name, "--grad-accum-steps", "2")
    parameters = sum(parameter.numel() for parameter in teacher.parameters())
    assert f"teacher    {name}, {parameters:,} parameters; logit distillation at temperature 4, loss = 1 x" in out.out
    task = steps[-1][0]
    assert task.training and not any(module.training for module in task.teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in task.teacher.parameters())
    after = task.teacher.model.module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    state = last(folder)
    student = timm.create_model(state["arch"], **state["model_kwargs"]).state_dict().keys()
    assert state["state_dict"].keys() == state["state_dict_ema"].keys() == student
    assert len(state["optimizer"]["state"]) == len(student)


@pytest.mark.parametrize("how", [[], TOKEN], ids=["logit", "token"])
def test_an_interrupted_distilled_run_ends_like_an_uninterrupted_one(
    train, run_validate, make_teacher, monkeypatch, how
):
    from tnt_timm.training.trainer import Trainer

    args = [*DISTILLED_TNT, *RICH, "--epochs", "3", "--kd-model-name", make_teacher()[1], *how]
    _, straight = train(*args, name="straight")
    real = Trainer.train_step

    def interrupted(self, *rest):
        if self.progress.updates == 8:
            raise KeyboardInterrupt
        return real(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        train(*args, name="broken", status=130)
    out, broken = train(*args, name="broken")
    assert "1 of 3 epochs are done" in out.out
    one, two = last(straight), last(broken)
    for key in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(one[key][name], two[key][name]) for name in one[key]), key
    assert one["progress"] == two["progress"]
    assert (straight / "summary.csv").read_text() == (broken / "summary.csv").read_text()
    best = file_format.read(broken / "model_best.pth.tar")["metrics"]
    assert f"top-1 {best['top1']:.3f}  top-5 {best['top5']:.3f}  loss {best['loss']:.6f}" in run_validate(broken).out


def test_the_teachers_settings_may_change_when_a_run_goes_on(train, make_teacher):
    name = make_teacher()[1]
    train(*DEIT, *SHORT, "--kd-model-name", name, *TOKEN)
    out, _ = train(*DEIT, *SHORT, "--epochs", "2", "--kd-model-name", name, *TOKEN, "--kd-temperature", "1")
    assert "setting changed: kd_temperature: 4.0 -> 1.0" in out.out
    out, _ = train(*DEIT, *SHORT, "--epochs", "3")
    assert f"setting changed: kd_model_name: '{name}' -> None" in out.out and "teacher  " not in out.out


def test_every_switch_of_the_loop_runs_with_a_teacher(train, run_validate, make_teacher):
    switches = ["--amp", "--amp-dtype", "bfloat16", "--clip-grad", "1", "--clip-mode", "agc", "--layer-decay", "0.8"]
    switches += ["--grad-checkpointing", "--torchcompile", "aot_eager", "--grad-accum-steps", "2"]
    args = [*DISTILLED_TNT, *RICH, "--epochs", "2", *TOKEN, "--kd-token-distill-type", "hard"]
    _, folder = train(*args, *switches, "--kd-model-name", make_teacher()[1])
    assert not [name for name in last(folder)["state_dict"] if "_orig_mod" in name or "module." in name]
    best = file_format.read(folder / "model_best.pth.tar")["metrics"]
    assert f"loss {best['loss']:.6f}" in run_validate(folder).out


def test_clip_mode_agc_leaves_both_heads_alone(train, monkeypatch):
    from tnt_timm.training import trainer as trainer_module

    clipped = []
    real = trainer_module.dispatch_clip_grad
    monkeypatch.setattr(
        trainer_module, "dispatch_clip_grad", lambda p, *rest: (clipped.append(len(p := list(p))), real(p, *rest))[1]
    )
    for mode in ("agc", "norm"):
        train(*DEIT, *ONE_UPDATE, "--clip-grad", "0.1", "--clip-mode", mode, name=mode)
    assert clipped[0] == clipped[1] - 4


class TestRefusals:
    """One line that names the setting, and nothing is created."""

    @pytest.fixture(autouse=True)
    def nothing_created(self, tmp_path):
        yield
        assert not (tmp_path / "out").exists()

    @pytest.fixture
    def refusal(self, train):
        return lambda *argv, status=1: train(*argv, *SHORT, status=status)[0].error

    def test_a_teacher_of_other_classes(self, refusal, tiny, make_teacher):
        said = refusal(*tiny, "--kd-model-name", make_teacher(num_classes=5)[1])
        assert "kd_model_name" in said and "5 classes and the data 3" in said

    def test_a_teacher_that_is_not_there(self, refusal, tiny, tmp_path, make_teacher):
        said = refusal(*tiny, "--kd-model-name", f"local-dir:{tmp_path / 'nowhere'}")
        assert f"kd_model_name: local-dir:{tmp_path / 'nowhere'}: " in said and "config.json" in said
        _, name = make_teacher()
        for weights in Path(name.removeprefix("local-dir:")).glob("*.*"):
            if weights.name != "config.json":
                weights.unlink()
        said = refusal(*tiny, "--kd-model-name", name)
        assert "no model.safetensors" in said and "config.json and weights" in said

    def test_a_folder_that_holds_something_else(self, refusal, tiny, tmp_path, make_teacher):
        _, name = make_teacher()
        config = Path(name.removeprefix("local-dir:")) / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "architecture": "test_vit"}))
        assert f"kd_model_name: {name}: " in refusal(*tiny, "--kd-model-name", name)
        config.write_text("[]")
        assert f"kd_model_name: {name}: " in refusal(*tiny, "--kd-model-name", name)

    def test_a_teacher_without_published_weights_or_without_a_network(self, refusal, tiny):
        assert "kd_model_name: tnt_ti: No pretrained weights" in refusal(*tiny, "--kd-model-name", "tnt_ti")
        said = refusal(*tiny, "--kd-model-name", "resnet10t")  # the tests are offline
        assert "kd_model_name: resnet10t: " in said and "local-dir:FOLDER" in said

    def test_a_name_that_is_no_model(self, refusal, tiny):
        said = refusal(*tiny, "--kd-model-name", "regnety_16O", status=2)
        assert "kd_model_name: 'regnety_16O': no such model" in said and "regnety_160" in said

    def test_a_teacher_for_images_of_another_size(self, refusal, tiny, make_teacher):
        small = dict(depth=1, embed_dim=24, num_heads=3, img_size=48)
        said = refusal(*tiny, "--kd-model-name", make_teacher(model="deit_tiny_patch16_224", **small)[1])
        assert "kd_model_name" in said and "32x32" in said and "48" in said and "--img-size" in said

    @pytest.mark.parametrize("model", ["tiny", "repvit_m1", "test_resnet"])
    def test_token_without_a_second_head(self, refusal, tiny, make_teacher, model):
        """repvit_m1 has the method, but is built without that head."""
        student = tiny if model == "tiny" else ["--model", model, "--img-size", "32"]
        off = ["--model-kwargs", "distillation=false"] if model == "repvit_m1" else []
        said = refusal(*student, *off, "--kd-model-name", make_teacher()[1], *TOKEN)
        assert "kd_distill_type: token" in said and "second head" in said and "logit" in said

    def test_feature_distillation(self, refusal, tiny):
        said = refusal(*tiny, "--kd-model-name", "resnet18", "--kd-distill-type", "feature", status=2)
        assert "kd_distill_type: 'feature': expected 'logit' or 'token'" in said

    def test_weights_that_make_no_sum(self, refusal, tiny):
        assert "distill_loss_weight" in refusal(*tiny, "--task-loss-weight", "1.5", status=2)
        assert "kd_temperature: 0" in refusal(*tiny, "--kd-temperature", "0", status=2)


def test_settings_of_a_teacher_that_is_not_there_are_named(train, tiny):
    out, _ = train(*tiny, *SHORT, "--kd-model-name", "", "--kd-temperature", "2", "--task-loss-weight", "0.5")
    for key in ("kd_temperature", "task_loss_weight"):
        assert f"notice: command line: {key} has no effect without a teacher" in out.out
    assert out.out.count("notice") == 2


def test_a_timm_recipe_with_a_teacher_is_read(tmp_path):
    from tnt_timm.settings import config

    (tmp_path / "args.yaml").write_text(
        "kd_model_name: regnety_160.deit_in1k\nkd_distill_type: token\nkd_token_distill_type: hard\nkd_loss_type: kl\n"
        "kd_temperature: 1.0\ntask_loss_weight: 0.5\ndistill_loss_weight: null\nkd_student_feature_dim: null\n"
    )
    settings, notices, _ = config.resolve(["--config", str(tmp_path / "args.yaml")])
    assert settings.distillation.kd_model_name == "regnety_160.deit_in1k"
    assert settings.distillation.kd_token_distill_type == "hard" and settings.distillation.task_loss_weight == 0.5
    assert [notice.split()[1] for notice in notices] == ["kd_student_feature_dim"]
