"""benchmarks/interruption, and the probe that it measures with."""

import csv
import importlib.util
import io
import json
import os
import time
from pathlib import Path

import measures
import programs
import pytest
import torch
from measures import Kill

from tnt_timm.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = {"depth": 1, "embed_dim": 12, "inner_dim": 4, "num_heads_inner": 2, "num_heads_outer": 3}


@pytest.fixture(scope="module")
def study():
    """The study's main: arguments -> status."""
    spec = importlib.util.spec_from_file_location("interruption", ROOT / "benchmarks" / "interruption" / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def settings(tmp_path) -> programs.Settings:
    """Two epochs of three updates, a save after every second one; 11 images to evaluate on."""
    data = programs.write_digits(tmp_path / "data", 24, 11)
    return programs.Settings(data, 2, 8, 2, tuple(TINY.items()))


@pytest.fixture
def project(start, tmp_path, monkeypatch) -> programs.Program:
    """This project, whose runs begin in milliseconds; the probe is in them as ever."""
    logs = tmp_path / "events"
    logs.mkdir()

    def execute(program, script, arguments, processes=1, **probe):
        number = len(list(logs.iterdir()))
        probe |= {"started": time.monotonic()}
        before = f"""if True:
            import os
            from probe import Probe
            Probe({{"log": f"{logs}/{number}-" + os.environ.get("RANK", "0"), **{probe!r}}}).install()"""
        run = start(arguments, processes, before, script.removesuffix(".py"))
        (status,) = set(run.end(60))
        assert status == (-9 if {"kill_at", "kill_saving", "kill_naming", "stop_after"} & probe.keys() else 0), run.err
        return programs.Ran([json.loads(line) for log in logs.glob(f"{number}-*") for line in log.open()])

    monkeypatch.setattr(programs, "execute", execute)
    monkeypatch.setattr(measures, "execute", execute)
    return programs.this_project(ROOT)


def test_what_a_kill_costs(project, settings, tmp_path):
    kills = [Kill("kill_at", 3), Kill("kill_at", 5), Kill("kill_saving", 4), Kill("kill_naming", 2)]
    twice, *found = measures.outcomes([project], settings, kills, tmp_path)
    assert (twice.lost, twice.in_the_end) == (0, 6) and all(twice.same.values())
    assert [outcome.in_the_end for outcome in found] == [6, 6, 6, 6]
    assert all(all(outcome.same.values()) for outcome in found), found
    assert [list(outcome.same) for outcome in found] == [["weights", "EMA", "optimizer", "summary.csv"]] * 4
    at_epoch_end, inside, saving, naming = found
    assert at_epoch_end.lost in (0, 1)  # the save of the whole epoch is being written meanwhile
    assert inside.lost in (0, 2)
    assert (
        saving.left
        == "epoch_start.pth.tar, last.pth.tar, last.pth.tar.tmp (torn), model_best.pth.tar, previous.pth.tar"
    )
    assert (
        naming.left == "epoch_start.pth.tar, last.pth.tar.tmp, previous.pth.tar"
    )  # that of the start is the previous one
    assert naming.lost >= 2


def test_a_difference_is_seen(project, settings, tmp_path, monkeypatch):
    """Going on without the checkpoint's optimizer, as where a script does not save it."""
    real = measures._state

    def spoiled(path):
        state = real(path)
        if path.parent.name.startswith("0-kill") and state["optimizer"]["state"]:
            state["optimizer"]["state"][0]["exp_avg"] += 1e-9
        return state

    monkeypatch.setattr(measures, "_state", spoiled)
    _, found = measures.outcomes([project], settings, [Kill("kill_at", 2)], tmp_path)
    assert found.same == {"weights": True, "EMA": True, "optimizer": False, "summary.csv": True}


def test_images_counted(project, settings, tmp_path):
    found = list(measures.counts([project], settings, [1, 2], tmp_path))
    assert [(count.script, count.processes, count.images) for count in found] == [
        (script, processes, 11) for processes in (1, 2) for script in ("train.py", "validate.py")
    ]
    assert len({round(count.top1, 4) for count in found}) == 1


def test_seconds_to_the_first_update(project, settings, tmp_path):
    (found,) = measures.starts([project], settings, 2, 2, tmp_path)
    assert 0 < found.fresh_s < 60 and 0 < found.resumed_s < 60 and found.way == "the same command"


def test_the_script(project, tmp_path, study, capfd):
    """What the loop waits for saves; the run is killed at the end of its last update, before a save of that."""
    options = ["--train-images", 48, "--val-images", 10, "--batch-size", 8, "--recovery-interval", 2, "--updates", 5]
    options += ["--repeats", 2, "--format", "csv", "--work", tmp_path / "work"]
    assert study(["stall", *map(str, options)]) == 0
    said = capfd.readouterr()
    (row,) = csv.DictReader(io.StringIO(said.out))
    assert row["program"] == "this project" and row["saves"] == "4"
    assert 0 < float(row["wait per save ms"]) < 1e4 and 0 < float(row["step ms"]) < 1e4
    assert not (tmp_path / "work").exists() and "torch" in said.err


SCRIPT = """
import sys, torch
if sys.argv[1] == "fail":
    print("all is lost")
    sys.exit(1)
weights = torch.nn.Parameter(torch.zeros(1))
torch.distributed.init_process_group("gloo")
torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1), device_ids=[torch.device("cpu")])
optimizer = torch.optim.SGD([weights])
while True:
    optimizer.step()
    torch.save({"weights": torch.zeros(1000)}, sys.argv[1])
"""


def test_a_script_is_watched_and_killed(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    script, file = programs.timms(tmp_path), tmp_path / "saved"
    found = programs.execute(script, "train.py", [str(file)], 2, kill_saving=3)
    assert 3 in [event["update"] for event in found.events] and found.first_update_s() > 0
    whole = io.BytesIO()
    torch.save({"weights": torch.zeros(1000)}, whole)
    assert file.stat().st_size == len(whole.getvalue()) // 2
    with pytest.raises(UserError, match=r"timm: train\.py failed: all is lost"):
        programs.execute(script, "train.py", ["fail"])


def test_how_a_run_of_timms_goes_on(tmp_path):
    (tmp_path / "train.py").touch()
    timm, run = programs.timms(tmp_path), tmp_path / "run"
    run.mkdir()
    assert [find(run) for find in timm.ways.values()] == [None, None, None]
    files = ["checkpoint-0.pth.tar", "last.pth.tar", "recovery-1-19.pth.tar", "recovery-1-9.pth.tar"]
    for age, name in enumerate(
        ["recovery-1-19.pth.tar", "recovery-1-9.pth.tar", "last.pth.tar", "checkpoint-0.pth.tar"]
    ):
        (run / name).touch()
        os.utime(run / name, (1e9 - age, 1e9 - age))
    (run / "recovery_tmp.pth.tar").touch()  # torn, and the newest
    newest, again, last = (find(run)[1] for find in timm.ways.values())
    assert newest == ["--resume", str(run / files[2])]
    assert again == [*newest, "--start-epoch", "1"]
    assert last == ["--resume", str(run / "last.pth.tar")]


def test_mistakes_are_one_line(tmp_path, study, capfd):
    for argv, line in (
        (["stall", "--work", tmp_path], f"work: {tmp_path}: is there already; remove it, or choose another"),
        (
            ["stall", "--timm-train", tmp_path],
            f"{tmp_path}: holds no train.py; give a checkout of pytorch-image-models",
        ),
        (["all"], "invalid choice: 'all'"),
    ):
        assert study([str(arg) for arg in argv]) != 0
        (error,) = capfd.readouterr().err.splitlines()
        assert line in error
