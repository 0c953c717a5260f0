"""benchmarks/miniature: its plan, its processes (with programs that only claim to train), its statistics and its page."""

import csv
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import tnt_timm  # noqa: F401  (registers the models)
from tnt_timm.checkpoints.open_model import Opened
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.figures.network import Network
from tnt_timm.settings import config

ROOT = Path(__file__).parents[2]
STUDY = runpy.run_path(str(ROOT / "benchmarks" / "miniature" / "__main__.py"))

import claims  # noqa: E402  (in the folder of the study, which conftest.py adds to the path)
import features  # noqa: E402
import jobs  # noqa: E402
import page  # noqa: E402
import plan  # noqa: E402
import records  # noqa: E402
import results  # noqa: E402
import small_mnist  # noqa: E402

SIZE = plan.Size(images=128, held_out=64, epochs=6, seeds=2)

# Programs in place of train.py and validate.py. The accuracy is that of the learning rate, and grows with the seed. The loss is
# lowest at the rate FAKE_BEST.
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[1:], sys.argv[2:]))
folder = Path(flags["--output"], flags["--experiment"])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as file:
    file.write("start\\n")
if os.environ.get("FAKE_WAIT") == flags["--experiment"] and not (folder / "stopped").exists():
    def stop(*_):
        (folder / "stopped").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    (folder / "waits").touch()
    time.sleep(60)
if flags["--experiment"] == os.environ.get("FAKE_FAILURE"):
    sys.exit("error: no such luck")
lr = float(flags["--lr"])
accuracy = 60 + 10 * (lr == 0.001) + int(flags["--seed"])
loss = abs(lr - float(os.environ.get("FAKE_BEST", 0.001)))
print("epoch 1/2  update 5/10  loss 1.0")
rows = ["epoch,eval_loss,eval_top1", f"0,1.0,{accuracy - 5}", f"1,{loss},{accuracy}"]
(folder / "summary.csv").write_text("\\n".join(rows))
about = dict(device="cpu: fake", instruction_set="none", versions=dict(torch="9", timm="9"), commit="abc")
(folder / "run.json").write_text(json.dumps(about))
"""
VALIDATE = """
import json, sys
from pathlib import Path
flags = dict(zip(sys.argv[2:], sys.argv[3:]))
best = float(Path(sys.argv[1], "summary.csv").read_text().splitlines()[-1].split(",")[-1])
Path(flags["--results-file"]).write_text(json.dumps(dict(top1=best - 1, loss=1.0, num_images=100)))
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    (root / "train.py").write_text(TRAIN)
    (root / "validate.py").write_text(VALIDATE)
    monkeypatch.setattr(jobs, "ROOT", root)
    monkeypatch.setattr(jobs, "LOOK_S", 0.01)


@pytest.fixture
def make(programs, tmp_path):
    """make(names of networks) -> the finished study of their runs"""

    def make(networks=("tnt", "tnt_small_logit"), output=tmp_path / "out", size=SIZE, minutes=1.0, device="cpu"):
        chosen = [run for run in plan.Plan(size, output).runs() if run.network.name in networks]
        study = jobs.Study(chosen, {run.name: 1.0 for run in chosen}, records.Folders(output), device)
        make.study = study
        study.make(2, time.monotonic() + 60 * minutes)
        return study

    return make


def starts(output: Path, name: str) -> int:
    return len((output / name / "starts").read_text().splitlines())


# ---- the plan


@pytest.fixture(scope="module")
def runs():
    return list(plan.Plan(SIZE, Path("out")).runs())


def test_every_run_has_what_it_needs_before_it(runs):
    assert len({run.name for run in runs}) == len(runs)
    for place, run in enumerate(runs):
        before = {earlier.name for earlier in runs[:place]}
        searches = {plan.search_name(run.network.name, lr) for lr in plan.RATES}
        assert run.lr or searches <= before, run.name
        assert not run.needs or run.needs in before or run.lr, run.name  # a search may wait for a teacher
        assert not run.needs or run.needs in {later.name for later in runs}


def test_every_command_is_one_of_train(runs):
    for run in runs:
        resolved = config.resolve(records.command_of(run, 1e-3, Path("out"))).config
        assert resolved.run.experiment == run.name and resolved.schedule.epochs == run.epochs
        assert resolved.data.batch_size == plan.BATCH_SIZE


def test_nothing_but_the_test_sees_the_test_images(runs):
    for run in runs:
        data = config.resolve(records.command_of(run, 1e-3, Path("out"))).config.data
        base = data.train_split.partition("[")[0]
        assert base == "train" and run.test_split not in (data.train_split, data.val_split)
        assert data.val_split.startswith(("train[", "held_out"))
        assert bool(run.test_split) == (run.seed != plan.SEARCH_SEED)


def test_rivals_have_equal_recipes_and_multiply_adds():
    networks = {network.name: network for network in plan.NETWORKS}
    costs = STUDY["costs_of"](plan.NETWORKS)
    for ours, theirs in (("tnt", "deit"), ("tnt_small", "deit_small")):
        assert costs[ours].multiply_adds == pytest.approx(costs[theirs].multiply_adds, rel=0.05)
    everything = [plan.settings(network) for network in plan.NETWORKS]
    for group in ("augmentation", "optimizer", "schedule", "ema", "data", "compute"):
        assert len({getattr(each, group).model_dump_json() for each in everything}) == 1, group
    with_se = plan.settings(networks["tnt_se"]).network.model_kwargs
    assert with_se == {**plan.settings(networks["tnt"]).network.model_kwargs, "se": True}


def test_every_claim_is_about_networks_of_the_plan():
    known = {network.name for network in (*plan.NETWORKS, *plan.TRANSFER)}
    for claim in (*claims.CLAIMS, *claims.TRANSFER):
        rows = {row.network for row in claim.rows}
        assert rows <= known
        assert {name for c in claim.comparisons for name in (c.better, c.other)} <= rows
        papers = {row.network: row.paper for row in claim.rows}
        for c in claim.comparisons:
            if papers[c.better] is not None and papers[c.other] is not None:
                assert c.paper == pytest.approx(papers[c.better] - papers[c.other])
    shown = {row.network for claim in (*claims.CLAIMS, *claims.TRANSFER) for row in claim.rows}
    assert shown == known


# ---- the processes


def test_the_best_rate_is_chosen_and_each_run_is_made_once(make, tmp_path):
    study = make()
    assert len(study.records) == len(study.wanted()) == 2 * (3 + 2)
    assert {record["lr"] for record in study.records.values() if record["seed"]} == {1e-3}
    found = study.records["tnt-seed2"]
    assert (found["held_out_top1"], found["test_top1"], found["best_epoch"]) == (72.0, 71.0, 2)
    assert study.records["tnt-lr0.001"]["test_top1"] is None
    command = " ".join(study.records["tnt_small_logit-seed2"]["command"])
    assert "--kd-model-name local-dir:OUTPUT/tnt-seed2" in command and "--output OUTPUT --experiment" in command
    make()
    assert starts(tmp_path / "out", "tnt-seed1") == 1


@pytest.mark.parametrize("best, further", [(5e-4, 2.5e-4), (2e-3, 4e-3)])
def test_a_rate_beyond_the_grid_is_tried_if_the_best_is_at_its_end(make, monkeypatch, best, further):
    monkeypatch.setenv("FAKE_BEST", str(best))
    study = make(["deit"])
    assert {record["lr"] for record in study.records.values()} == {*plan.RATES, further}
    assert study.records["deit-seed1"]["lr"] == best
    monkeypatch.setenv("FAKE_BEST", str(further))
    assert make(["tnt"]).records["tnt-seed1"]["lr"] == further


def test_a_search_that_failed_does_not_block_its_network(make, monkeypatch):
    monkeypatch.setenv("FAKE_FAILURE", "tnt-lr0.0005")
    with pytest.raises(UserError, match="1 runs failed"):
        make(["tnt"])
    assert make.study.records["tnt-seed2"]["lr"] == 1e-3


@pytest.mark.parametrize("typed", ["output", ".", "/x/out", "a b"])
def test_the_place_of_the_study_is_not_a_setting(typed):
    output = Path(typed)
    (run,) = [run for run in plan.Plan(SIZE, output).runs() if run.name == "tnt_on_mnist-seed1"]
    found = records.without_place(records.command_of(run, 1e-3, output), output)
    (other,) = [run for run in plan.Plan(SIZE, Path("/else")).runs() if run.name == run.name == "tnt_on_mnist-seed1"]
    assert found == records.without_place(records.command_of(other, 1e-3, Path("/else")), Path("/else"))
    assert found.count("OUTPUT") == 1 and {"OUTPUT/mnist", "OUTPUT/tnt-seed1", "0.001", "--output"} <= {*found}


def test_a_study_may_be_moved_and_gets_more_seeds(make, tmp_path):
    make(["tnt"])
    (tmp_path / "out").rename(tmp_path / "moved")
    study = make(["tnt"], tmp_path / "moved", SIZE._replace(seeds=3))
    assert starts(tmp_path / "moved", "tnt-seed1") == 1 and "tnt-seed3" in study.records


def test_other_settings_are_no_continuation(make, tmp_path):
    make(["deit"])
    with pytest.raises(ConfigError, match=r"deit-lr0.0005.json: made with other settings \(train\[:128\] instead of "):
        make(["deit"], size=SIZE._replace(images=256))
    (tmp_path / "out/records/deit-lr0.0005.json").write_text("{")
    with pytest.raises(UserError, match=r"deit-lr0.0005.json: not a record"):
        make(["deit"])


def test_another_device_or_a_second_study_is_refused(make, tmp_path):
    make(["deit"])
    with pytest.raises(ConfigError, match=r"deit-lr0.0005.json: made with other settings \(cpu instead of cuda\)"):
        make(["deit"], device="cuda")
    program = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('ok', flush=True)"
    )
    command = [sys.executable, "-c", program + "; time.sleep(60)", str(tmp_path / "out" / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=f"^output: {tmp_path}/out: another study is using this folder$"):
            make(["deit"])
        other.kill()


def test_a_failure_is_named_and_runs_that_need_it_wait(make, monkeypatch):
    monkeypatch.setenv("FAKE_FAILURE", "tnt-seed1")
    with pytest.raises(UserError, match=r"logs/tnt-seed1.txt: 1 runs failed, the first with: error: no such luck"):
        make(["tnt", "deit", "tnt_small_logit"])
    assert {"tnt-seed2", "deit-seed2"} <= {*make.study.records}
    assert not any(name.startswith("tnt_small_logit") for name in make.study.records)
    monkeypatch.delenv("FAKE_FAILURE")
    assert {"tnt-seed1", "tnt_small_logit-seed1"} <= {*make(["tnt", "deit", "tnt_small_logit"]).records}


def test_time_is_up_and_the_same_command_resumes(make, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_WAIT", "tnt-seed1")
    study = make(["tnt"], minutes=0.08)
    assert "tnt-seed1" not in study.records and (tmp_path / "out/tnt-seed1/stopped").exists()
    again = make(["tnt"])
    assert again.records["tnt-seed1"]["seconds"] > 1 and starts(tmp_path / "out", "tnt-seed1") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_study_stops_its_runs(programs, tmp_path, number):
    program = f"""if True:
        import signal, sys, time
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.path[:0] = {sys.path!r}
        from pathlib import Path
        import jobs, plan, records
        from tnt_timm.commands.entry_point import run
        jobs.ROOT = Path({str(jobs.ROOT)!r})
        chosen = [run for run in plan.Plan(plan.Size(8, 8, 6, 1), Path("out")).runs() if run.network.name == "deit"]
        def make(argv):
            work = dict.fromkeys([run.name for run in chosen], 1.0)
            jobs.Study(chosen, work, records.Folders(Path("out")), "cpu").make(1, 1e12)
        sys.exit(run(make, []))"""
    env = {**os.environ, "FAKE_WAIT": "deit-lr0.0005"}
    study = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    waits, stopped = (tmp_path / "out" / "deit-lr0.0005" / name for name in ("waits", "stopped"))
    wait_for(waits.exists)
    study.send_signal(number)
    expected = {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    assert study.wait(60) == expected, study.stderr.read()
    wait_for(stopped.exists)


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- statistics and page


def test_means_and_paired_intervals():
    """The interval of scipy's paired t-test."""
    from scipy import stats

    ours, theirs = [80.1, 80.9, 81.2], [79.0, 80.2, 80.1]
    found = {
        f"{name}{seed}": dict(network=name, seed=seed, test_top1=value, test_images=1000)
        for name, values in (("a", ours), ("b", theirs))
        for seed, value in enumerate(values, 1)
    }
    found |= {"a4": dict(network="a", seed=4, test_top1=10.0, test_images=1000)}
    found |= {"a0": dict(network="a", seed=0, test_top1=None, test_images=None)}
    difference = results.difference(found, "a", "b")
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert difference.count == 3 and difference.one_image == 0.1
    assert difference.deviation == pytest.approx(np.std(np.subtract(ours, theirs), ddof=1))
    assert difference.mean - difference.half_width == pytest.approx(low)
    assert difference.mean + difference.half_width == pytest.approx(high)
    assert results.difference(found, "a", "c") is None
    assert results.mean_of([3.0]) == (1, 3.0, None, None, 0.0)


@pytest.mark.parametrize(
    "mean, half_width, paper, expected",
    [
        (1.0, 0.5, 1.7, "agrees"),
        (-1.0, 0.5, 1.7, "**contradicts**"),
        (1.0, 1.5, 1.7, "undecided (same sign)"),
        (-1.0, 1.5, 1.7, "undecided (opposite sign)"),
        (1.0, 0.5, None, "better"),
        (-1.0, 0.5, None, "worse"),
        (1.0, 1.5, None, "undecided"),
        (1.0, None, 1.7, "one seed: no interval"),
        (0.2, 1e-16, 1.7, "undecided (same sign)"),  # all seeds differ by the same image
    ],
)
def test_verdicts(mean, half_width, paper, expected):
    assert results.verdict(results.Mean(3, mean, half_width, half_width, one_image=0.3), paper) == expected


def test_the_page_shows_what_the_runs_found(make, tmp_path):
    study = make(["tnt", "deit"])
    every = list(plan.Plan(SIZE, tmp_path / "out").runs())
    costs = {network.name: page.Cost(1000, 2_000_000) for network in (*plan.NETWORKS, *plan.TRANSFER)}
    shown = page.Page(every, study.records, costs, SIZE)
    sizes = page.write(tmp_path / "new" / "miniature.md", shown, tmp_path / "my pictures")
    text = (tmp_path / "new" / "miniature.md").read_text()
    assert f"**Not finished:** 10 of {len(every)} runs are done." in text
    assert "| TNT | 1,000 | 2.0 | 0.001 | 70.50 ± 0.71 | 70.00, 71.00 | 81.5 |" in text
    assert "| TNT - DeiT | +1.7 | +0.00 ± 0.00 | 2 | undecided" in text
    assert "| TNT + SE - TNT | +0.2 | not run yet | 0 | not run yet |" in text
    assert "(../my%20pictures/diversity.png)" in text and "{" not in text
    assert "[miniature.csv](miniature.csv)" in text
    assert "## What came out" not in text  # written by hand, about other runs
    rows = list(csv.DictReader((tmp_path / "new" / "miniature.csv").open()))
    assert len(rows) == 10 and rows[0]["name"] == "tnt-lr0.0005" and rows[-1]["test_top1"] == "71.0"
    assert [row["model"] for row in csv.DictReader(sizes.open())] == ["TNT", "DeiT"]
    page.write(tmp_path / "new" / "miniature.md", page.Page(every, {}, costs, SIZE), tmp_path)
    assert not sizes.exists()  # it would be another study's


def test_the_page_has_the_features_of_each_block(tmp_path):
    rows = [
        dict(
            network=network,
            block=block,
            correlation=0.2 + seed / 100,
            components=7.0,
            local=0.9,
            run=f"{network}-seed{seed}",
        )
        | dict(words_attended=15.5 if network == "tnt" else "")
        for network in ("tnt", "deit")
        for seed in (1, 2)
        for block in (1, 2)
    ]
    costs = {network.name: page.Cost(1000, 2_000_000) for network in (*plan.NETWORKS, *plan.TRANSFER)}
    page.write(tmp_path / "m.md", page.Page([], {}, costs, SIZE, rows), tmp_path)
    row = "| 2 | 0.215 ± 0.007 | 0.215 ± 0.007 | 7.0 ± 0.0 | 7.0 ± 0.0 | 90.0 ± 0.0 | 90.0 ± 0.0 | 15.5 ± 0.0 |"
    assert row in (tmp_path / "m.md").read_text()
    assert len(list(csv.DictReader((tmp_path / "m_features.csv").open()))) == 8


def test_words_attended():
    """16 words of a new network get the same attention; sharp queries leave fewer."""
    model = timm.create_model(
        "tnt_s", img_size=32, depth=2, embed_dim=24, inner_dim=8, num_heads_inner=2, num_heads_outer=3
    )
    network, images = Network("t", Opened(model.eval(), "t")), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert features.words_attended(network, images) == pytest.approx([16, 16], abs=0.05)
        model.blocks[1].attn_in.qk.weight.mul_(100)
    first, second = features.words_attended(network, images)
    assert first == pytest.approx(16, abs=0.05) and 1 < second < 14


# ---- data, and the command


def test_mlxtends_mnist_as_folders(tmp_path):
    small_mnist.write(tmp_path / "mnist")
    counts = {split: len(list((tmp_path / "mnist" / split).rglob("*.png"))) for split in small_mnist.SPLITS}
    assert counts == {"train": 2000, "held_out": 1000, "test": 2000}
    names = [path.name for path in (tmp_path / "mnist").rglob("*.png")]
    assert len(set(names)) == len(names)  # no image is in two splits
    small_mnist.write(tmp_path / "mnist")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--images", "60"], "command line: images: 60 and 4,000 held-out ones are more than the 64 training images"),
        (["--data-dir", "/proc"], "dataset: torch/fashion_mnist, split train, in /proc: Dataset not found"),
        (["--imagse", "60"], "command line: --imagse: no such setting; perhaps you meant --images"),
        (["--jobs", "0"], "command line: jobs: 0: expected greater than 0"),
        (["--minutes", "nan"], "command line: minutes: 'nan': expected a number"),
        (["--report", "x.csv"], "command line: report: x.csv: expected a name that ends with .md"),
    ],
)
def test_mistakes_are_one_line(flags, message, write_fashion, tmp_path, capsys):
    place = [] if "--data-dir" in flags else ["--data-dir", str(write_fashion(tmp_path))]
    status = STUDY["main"]([*place, *flags, "--output", str(tmp_path / "out")])
    assert status in (1, 2) and capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_the_whole_study_of_a_few_images(write_fashion, tmp_path, monkeypatch):
    """Two networks through the real programs, with the page, the features and the pictures."""
    monkeypatch.setitem(STUDY["study"].__globals__, "Plan", Few)
    monkeypatch.setattr(plan, "RATES", (1e-3,))
    size = "--images 64 --held-out 30 --epochs 2 --seeds 1".split()
    argv = [*size, "--data-dir", str(write_fashion(tmp_path / "data", 100)), "--output", str(tmp_path / "out")]
    assert STUDY["main"](argv) == 0
    text = (tmp_path / "out" / "miniature.md").read_text()
    assert "Not finished" not in text and "| 4 | 0." in text
    found = {path.name for path in (tmp_path / "out").glob("*.*")}
    names = {"miniature-cost.png", "diversity.png", "feature-maps.png", "tsne-maps.png"}
    assert found >= {"miniature.csv", "miniature_sizes.csv", "miniature_features.csv", *names}


class Few(plan.Plan):
    """A study of the pair alone."""

    def runs(self):
        return (run for run in super().runs() if run.network.name in ("tnt", "deit"))


@pytest.mark.parametrize("name", ["tnt_small_token", "deit_on_mnist"])
def test_real_runs_that_need_another_one(name, write_fashion, tmp_path, run_train, run_validate, monkeypatch):
    """A student and a fine-tuned network, from the run that they need, through train.py and validate.py."""
    output = tmp_path / "out"
    monkeypatch.setattr(small_mnist, "SPLITS", {"train": 7, "held_out": 2, "test": 3})
    small_mnist.write(output / "mnist")
    size = plan.Size(64, 20, 2, 1)
    every = {run.name: run for run in plan.Plan(size, output, ["--data-dir", str(write_fashion(tmp_path, 100))]).runs()}
    last = every[f"{name}-seed1"]
    for run in (every[last.needs], last):
        out = run_train(
            *records.command_of(run, 1e-3, output), *run.place, "--warmup-epochs", 0, "--log-interval", 1000
        )
        assert out.status == 0, out.err
    out = run_validate(output / last.name, "--val-split", last.test_split)
    assert out.status == 0, out.err
    assert f"({30 if 'mnist' in name else 32} images, each counted once)" in out.out
