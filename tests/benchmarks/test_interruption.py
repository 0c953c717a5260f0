"""benchmarks/interruption: its measurements, and the probe that counts and kills."""

import csv
import io
import json
import os
import runpy
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
STUDY = runpy.run_path(str(ROOT / "benchmarks" / "interruption" / "__main__.py"))
SAME = ("weights", "EMA", "optimizer", "summary.csv")


@pytest.fixture
def settings(tmp_path) -> programs.Settings:
    """Two epochs of three updates, a save after every second one; 11 images to evaluate on."""
    return programs.Settings(programs.write_digits(tmp_path / "data", 24, 11), 2, 8, 2, TINY)


@pytest.fixture
def project(start, tmp_path, monkeypatch) -> programs.Program:
    """This project, whose runs start in milliseconds, with the probe."""
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
        return [json.loads(line) for log in logs.glob(f"{number}-*") for line in log.open()]

    monkeypatch.setattr(programs, "execute", execute)
    monkeypatch.setattr(measures, "execute", execute)
    return programs.this_project(ROOT)


def test_kills(project, settings, tmp_path):
    moments = [Kill("kill_at", 3), Kill("kill_at", 5), Kill("kill_saving", 4), Kill("kill_naming", 2)]
    rows = list(measures.kills([project], settings, moments, tmp_path))
    assert [row["final updates (of 6)"] for row in rows] == ["6"] * 5
    assert all(row[name] == "yes" for row in rows for name in SAME), rows
    twice, at_epoch_end, inside, saving, naming = (int(row["updates lost"]) for row in rows)
    assert twice == 0
    assert at_epoch_end in (0, 1)  # the save of the whole epoch is being written at that time
    assert inside in (0, 2)
    assert naming >= 2
    *_, saving, naming = (row["checkpoints left by the kill"] for row in rows)
    assert saving == "epoch_start.pth.tar, last.pth.tar, last.pth.tar.tmp (torn), model_best.pth.tar, previous.pth.tar"
    assert naming == "epoch_start.pth.tar, last.pth.tar.tmp, previous.pth.tar"  # previous: from the start of the run


def test_a_difference_is_seen(project, settings, tmp_path, monkeypatch):
    """Resume with another optimizer state, as a script does that does not save it."""
    real = measures._state

    def spoiled(path):
        state = real(path)
        if path.parent.name.startswith("0-kill") and state["optimizer"]["state"]:
            state["optimizer"]["state"][0]["exp_avg"] += 1e-9
        return state

    monkeypatch.setattr(measures, "_state", spoiled)
    _, row = measures.kills([project], settings, [Kill("kill_at", 2)], tmp_path)
    assert [row[name] for name in SAME] == ["yes", "yes", "no", "yes"]


def test_evaluations(project, settings, tmp_path):
    rows = list(measures.evaluations([project], settings, [1, 2], tmp_path))
    assert [(row["script"], row["processes"], row["images counted (of 11)"]) for row in rows] == [
        (script, processes, "11") for processes in "12" for script in ("train.py", "validate.py")
    ]
    assert len({row["top-1"] for row in rows}) == 1


def test_starts(project, settings, tmp_path):
    (row,) = measures.starts([project], settings, 2, 2, tmp_path)
    assert 0 < float(row["fresh s"]) < 60 and 0 < float(row["resumed s"]) < 60
    assert row["resumed by"] == "the same command"


def test_the_command(project, tmp_path, capfd):
    """Measure stalls of this checkout. The run is killed at the end of its last update, before a save of it."""
    options = ["--train-images", 48, "--val-images", 10, "--batch-size", 8, "--recovery-interval", 2, "--updates", 5]
    options += ["--repeats", 2, "--format", "csv", "--work", tmp_path / "work"]
    assert STUDY["main"](["stall", *map(str, options)]) == 0
    assert STUDY["ROOT"] == ROOT
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
    events = programs.execute(script, "train.py", [str(file)], 2, kill_saving=3)
    assert 3 in [event["update"] for event in events] and measures.first_update_s(events) > 0
    whole = io.BytesIO()
    torch.save({"weights": torch.zeros(1000)}, whole)
    assert file.stat().st_size == len(whole.getvalue()) // 2
    with pytest.raises(UserError, match=r"timm: train\.py failed: all is lost"):
        programs.execute(script, "train.py", ["fail"])


def test_how_timm_resumes(tmp_path):
    (tmp_path / "train.py").touch()
    timm, run = programs.timms(tmp_path), tmp_path / "run"
    run.mkdir()
    assert [find(run) for find in timm.ways.values()] == [None, None, None]
    names = ["recovery-1-19.pth.tar", "recovery-1-9.pth.tar", "last.pth.tar", "checkpoint-0.pth.tar"]
    for age, name in enumerate(names):
        (run / name).touch()
        os.utime(run / name, (1e9 - age, 1e9 - age))
    (run / "recovery_tmp.pth.tar").touch()  # torn, and the newest
    newest, again, last = (find(run)[1] for find in timm.ways.values())
    assert newest == ["--resume", str(run / names[0])]
    assert again == [*newest, "--start-epoch", "1"]
    assert last == ["--resume", str(run / "last.pth.tar")]


def test_mistakes_are_one_line(tmp_path, capfd):
    for argv, line in (
        (["stall", "--work", tmp_path], f"work: {tmp_path}: already exists; remove it or choose another folder"),
        (["stall", "--timm-train", tmp_path], f"{tmp_path}: no train.py in this folder; give a checkout of"),
        (["all"], "invalid choice: 'all'"),
        (["stall", "--repeats", "0"], "--repeats: invalid positive value: '0'"),
    ):
        assert STUDY["main"]([str(arg) for arg in argv]) != 0
        (error,) = capfd.readouterr().err.splitlines()
        assert line in error
