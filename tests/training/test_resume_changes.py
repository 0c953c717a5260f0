"""A run that goes on, with the same settings or others: what is said of it, and what comes of it."""

import csv
import os
import re
import signal
from pathlib import Path

import pytest

from tnt_timm.checkpoints import file_format
from tnt_timm.data.loader import TrainingSamples
from tnt_timm.runtime import provenance
from tnt_timm.training.trainer import Trainer

PLAIN = """--no-aug --smoothing 0 --opt momentum --momentum 0 --weight-decay 0 --workers 0
    -b 8 --sched constant --warmup-epochs 0 --lr 0.1 --cooldown-epochs 0""".split()


def last(folder: Path) -> dict:
    return file_format.read(folder / file_format.LAST)


def rows(folder: Path) -> list:
    return list(csv.DictReader((folder / "summary.csv").open()))


def test_more_epochs_continue_and_say_so(train):
    train("--epochs", "1", *PLAIN)
    out, folder = train("--epochs", "2", *PLAIN)
    assert "setting changed: epochs: 1 -> 2" in out.out
    assert [row["epoch"] for row in rows(folder)] == ["0", "1"]


def test_another_model_does_not_continue_the_run(train):
    _, folder = train("--epochs", "1", *PLAIN)
    before = (folder / "last.pth.tar").read_bytes()
    other = ["--model-kwargs", "depth=1", "embed_dim=24", "inner_dim=6"]
    for epochs in ("1", "2"):  # finished, and not
        out, _ = train("--epochs", epochs, *PLAIN, *other, status=2)
        assert "model_kwargs" in out.error and "--experiment" in out.error
    assert (folder / "last.pth.tar").read_bytes() == before


def test_start_weights_may_lie_elsewhere_until_the_run_is_finished(train, tmp_path):
    """As where each job copies them to a folder of its own. A finished run is no result of other weights of that name."""
    _, source = train("--epochs", "1", *PLAIN, name="source")
    paths = [tmp_path / job / "model_best.pth.tar" for job in ("job 1", "job 2")]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes((source / path.name).read_bytes())
    train("--epochs", "1", *PLAIN, "--initial-checkpoint", paths[0])
    paths[0].unlink()
    out, _ = train("--epochs", "1", *PLAIN, "--initial-checkpoint", paths[1], status=2)
    assert "the run is finished, but it had other settings (initial_checkpoint" in out.error
    out, _ = train("--epochs", "2", *PLAIN, "--initial-checkpoint", paths[1])
    assert "setting changed: initial_checkpoint: " in out.out


OTHER_RUNS = {
    "--seed 7": "seed: 42 -> 7",
    "--lr 0.5": "lr: 0.1 -> 0.5",
    "--smoothing 0.1": "smoothing: 0.0 -> 0.1",
    "-b 4": "batch_size: 8 -> 4",
    "--amp": "amp: False -> True",
    "--initial-checkpoint {folder}/model_best.pth.tar": "initial_checkpoint: '' -> ",
    "--pretrained-path {folder}": "pretrained_path: None -> ",
    "--data-dir {folds}": "train: 24 -> 15 images; validation: 12 -> 6 images",
}


def test_a_finished_run_is_no_result_of_other_settings(train, make_folder):
    _, folder = train("--epochs", "1", *PLAIN)
    folds = make_folder("fold 2", train=5, val=2)
    for flags, text in OTHER_RUNS.items():
        argv = [part.format(folder=folder, folds=folds) for part in flags.split()]
        out, _ = train("--epochs", "1", *PLAIN, *argv, status=2)
        assert "last.pth.tar: the run is finished, but it had other settings (" in out.error and text in out.error
        assert "choose another --experiment" in out.error
        assert ("more --epochs" in out.error) == (
            not set(flags.split()) & {"--seed", "--initial-checkpoint", "--pretrained-path"}
        )
    same = [
        "--threads",
        "1",
        "--workers",
        "1",
        "--log-interval",
        "3",
        "--validation-batch-size",
        "6",
        "--device",
        "cpu",
    ]
    out, _ = train("--epochs", "1", *PLAIN, *same)
    assert "already finished: 1 epochs" in out.out


@pytest.mark.parametrize("flags", ["--seed 7", "--initial-checkpoint {other}", "--pretrained-path {other}"])
def test_an_unfinished_run_with_another_start_is_another_run(train, flags):
    _, other = train("--epochs", "1", *PLAIN, name="other")
    _, folder = train("--epochs", "1", *PLAIN)
    argv = flags.format(other=other).split()
    out, _ = train("--epochs", "2", *PLAIN, *argv, status=2)
    assert f"{folder}/last.pth.tar: holds a run with other settings ({argv[0][2:].replace('-', '_')}: " in out.error
    assert "choose another --experiment" in out.error


def test_where_a_run_started_may_be_left_out_once_it_has(train):
    _, other = train("--epochs", "1", *PLAIN, name="other")
    start = ["--initial-checkpoint", other / "model_best.pth.tar"]
    train("--epochs", "1", *PLAIN, *start)
    elsewhere = other / ".." / "other" / "model_best.pth.tar"
    assert "already finished" in train("--epochs", "1", *PLAIN, "--initial-checkpoint", elsewhere)[0].out
    train("--epochs", "1", *PLAIN, status=2)
    out, _ = train("--epochs", "2", *PLAIN)
    assert "-> '' (no effect: the run has started)" in out.out


def test_resume_from_elsewhere_starts_there_and_then_continues_its_own(train):
    _, first = train("--epochs", "1", *PLAIN, name="first")
    out, second = train("--epochs", "2", *PLAIN, "--resume", first / "last.pth.tar", name="second")
    assert f"resuming from {first}" in out.out and len(rows(second)) == 2
    out, _ = train("--epochs", "2", *PLAIN, "--resume", first / "last.pth.tar", name="second")
    assert f"resuming from {second}" in out.out


def test_resume_from_elsewhere_is_the_same_when_it_is_killed_before_its_first_save(
    train, monkeypatch, assert_same_bits
):
    """The best weights are those of the other run, as long as no epoch is better."""

    def crash(self, *args):
        raise ZeroDivisionError

    _, first = train("--epochs", "1", *PLAIN, name="first")
    settings = ["--epochs", "2", *PLAIN, "--lr", "30", "--resume", first / "last.pth.tar"]
    _, straight = train(*settings, name="straight")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Trainer, "train_step", crash)
        train(*settings, name="killed")
    _, killed = train(*settings, name="killed")
    assert_same_bits(straight, killed)
    assert last(killed)["progress"]["best"] == last(first)["progress"]["best"]


def test_other_versions_are_said(train, monkeypatch):
    _, folder = train("--epochs", "1", *PLAIN)
    monkeypatch.setattr(provenance, "versions", lambda: {**last(folder)["versions"], "torch": "99.0"})
    out, _ = train("--epochs", "2", *PLAIN)
    (line,) = [line for line in out.out.splitlines() if "version changed" in line]
    assert line.startswith("notice: version changed: torch ") and line.endswith(" -> 99.0")


def test_changed_settings_take_effect_when_a_run_goes_on(train):
    """Weight decay, betas and lr of the optimizer are the new ones; its moments are the old ones."""
    adam = [
        "-b",
        "8",
        "--min-lr",
        "0",
        "--epochs",
        "1",
        "--cooldown-epochs",
        "0",
        "--warmup-epochs",
        "0",
        "--workers",
        "0",
    ]
    _, folder = train(*adam)
    changed = ["--epochs", "2", "--weight-decay", "0.3", "--opt-betas", "0.5", "0.6", "--lr", "1e-4"]
    out, _ = train(*adam, *changed)
    for line in ("weight_decay: 0.05 -> 0.3", "opt_betas: None -> [0.5, 0.6]", "lr: None -> 0.0001"):
        assert f"setting changed: {line}" in out.out
    groups = last(folder)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert {tuple(group["betas"]) for group in groups} == {(0.5, 0.6)} and groups[0]["initial_lr"] == 1e-4
    assert {int(state["step"]) for state in last(folder)["optimizer"]["state"].values()} == {6}
    out, _ = train(*adam, "--layer-decay", "0.7", status=2)
    assert "layer_decay: None -> 0.7" in out.error


@pytest.fixture
def stopped(train, monkeypatch):
    """A run that was asked to stop after some updates."""

    def stopped(updates, *argv):
        def train_step(self, *args):
            if self.progress.updates == updates - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, *args)

        real = Trainer.train_step
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", train_step)
            return train(*argv, "--recovery-minutes", "0", status=75)

    return stopped


@pytest.fixture
def loaded(monkeypatch):
    """The numbers of the training images that were loaded, in order."""

    def load(self, key):
        indices.append(key.index)
        return real(self, key)

    indices, real = [], TrainingSamples.__getitem__
    monkeypatch.setattr(TrainingSamples, "__getitem__", load)
    return indices


def test_a_run_goes_on_with_the_next_image_and_loads_none_of_those_before(train, stopped, loaded):
    _, folder = stopped(8, "--epochs", "2", *PLAIN, "-b", "4")
    assert last(folder)["progress"]["epoch"] == 1 and last(folder)["progress"]["update"] == 2
    first, seen = loaded[:24], loaded[24:]
    loaded.clear()
    out, _ = train("--epochs", "2", *PLAIN, "-b", "4")
    assert "1 of 2 epochs are done, and 2 updates of the next one" in out.out
    assert len(loaded) == 16 and sorted(seen + loaded) == sorted(first) == list(range(24))


def test_another_batch_size_inside_an_epoch_goes_on_with_the_next_image(train, stopped, loaded, monkeypatch):
    """9 of 18 updates are half of the run, whether an update is 4 images or 2: the schedule goes on there as well."""
    settings = ["--epochs", "3", *PLAIN, "--sched", "poly", "--decay-rate", "1", "--sched-on-updates"]
    _, folder = stopped(9, *settings, "-b", "4")
    seen, loaded[:] = loaded[24:], []
    out, _ = train(*settings, "-b", "2", "--log-interval", "1")
    assert "setting changed: batch_size: 4 -> 2" in out.out
    assert len(seen) == 12 and sorted(seen + loaded[:12]) == list(range(24)) and len(loaded) == 36
    first = re.findall(r"^epoch (\d)/3  update (\d+)/12 .* lr (\S+)$", out.out, re.M)[0]
    assert first[:2] == ("2", "7") and float(first[2]) == pytest.approx(0.05, rel=0.1)


def test_mixed_precision_can_be_switched_on_when_a_run_goes_on(train):
    train("--epochs", "1", *PLAIN)
    out, folder = train("--epochs", "2", *PLAIN, "--amp", "--lr", "1e-3")
    assert "amp: False -> True" in out.out and last(folder)["amp_scaler"]["scale"] > 0


def notices(out) -> list:
    """What a run that goes on says of it, but for the settings."""
    said = re.findall(r"^notice: (.*)$", out.out, re.M)
    return [line for line in said if "setting changed" not in line]


COSINE = ["--sched", "cosine", "--lr", "0.1", "--min-lr", "0"]  # lr of epoch n of N is 0.05 (1 + cos(pi (n - 1) / N))


def test_another_number_of_epochs_says_what_becomes_of_the_learning_rate(train):
    """Longer while it trains, longer after its end, shorter, and shorter than what is done."""
    train("--epochs", "2", *PLAIN, *COSINE)
    out, _ = train("--epochs", "4", *PLAIN, *COSINE)
    assert notices(out) == ["epoch 3 is new: its lr is 0.05, after 0.05 in epoch 2"]
    assert [float(row["lr"]) for row in rows(_)] == pytest.approx([0.1, 0.05, 0.05, 0.0146447], rel=1e-4)
    out, _ = train("--epochs", "3", *PLAIN, *COSINE, status=2)
    assert "the run is finished, but it had other settings (epochs: 4 -> 3)" in out.error


def test_the_learning_rate_is_said_as_it_is_then_used(train, stopped):
    _, folder = stopped(5, "--epochs", "3", *PLAIN, *COSINE)
    out, _ = train("--epochs", "6", *PLAIN, *COSINE)
    assert notices(out) == ["lr of epoch 2 is 0.0933 instead of 0.075"]
    assert float(rows(folder)[1]["lr"]) == pytest.approx(0.0933, abs=5e-5)


def test_a_learning_rate_that_follows_the_batch_is_said_to_change_with_it(train, stopped):
    """Of 0.1 for 8 images: three times the images, three times the lr."""
    free = ["--epochs", "2", *PLAIN, "--lr-base", "0.1", "--lr-base-size", "8"]
    del free[free.index("--lr") : free.index("--lr") + 2]
    stopped(4, *free)
    out, folder = train(*free, "--grad-accum-steps", "3")
    assert notices(out)[:2] == [
        "lr of epoch 2 is 0.3 instead of 0.1",
        "an update has 24 images instead of 8, an epoch 1 updates instead of 3",
    ]
    assert [float(row["lr"]) for row in rows(folder)] == pytest.approx([0.1, 0.3])


@pytest.mark.parametrize("updates, again", [(9, 4), (10, 0)])
def test_images_that_come_twice_are_said(train, stopped, loaded, updates, again):
    """Six updates of 4 an epoch; from amid the second epoch on they are of 8."""
    _, folder = stopped(updates, "--epochs", "2", *PLAIN, "-b", "4")
    seen, loaded[:] = loaded[24:], []
    out, _ = train("--epochs", "2", *PLAIN, "-b", "8")
    told = [line for line in notices(out) if "are repeated" in line]
    expected = "4 images of epoch 2 are repeated: the 12 that it has seen are not a multiple of 8"
    assert told == [expected] * bool(again)
    assert len(seen) + len(loaded) == 24 + again and set(seen) & set(loaded) == set(seen[len(seen) - again :])


def test_the_same_images_in_other_pieces(train):
    train("--epochs", "1", *PLAIN, "-b", "8")
    out, _ = train("--epochs", "2", *PLAIN, "-b", "4", "--grad-accum-steps", "2")
    assert notices(out)[1:] == [
        "each update has the same images as before; mixup, erasing and dropout, which are drawn per process and batch, "
        "come out differently"
    ]


def test_a_run_that_goes_on_as_it_was_has_nothing_to_say(train, stopped):
    stopped(4, "--epochs", "2", *PLAIN, *COSINE)
    out, _ = train("--epochs", "2", *PLAIN, *COSINE, "--workers", "1", "--log-interval", "7")
    assert "notice" not in out.out
