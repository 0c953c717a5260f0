"""W&B gets each epoch once, even if the run is killed. Trouble with W&B never stops or delays the run."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tnt_timm.tracking import wandb_uploader

OFFLINE = "import os; os.environ['WANDB_MODE'] = 'offline'\n"
KILLED = """
import os, signal
from tnt_timm.tracking.wandb_client import WandbTracker
log = WandbTracker.log

def killed_before_the_second(self, row):
    if row["epoch"] == 1:
        {first}
        os.kill(os.getpid(), signal.SIGKILL)
    log(self, row)

WandbTracker.log = killed_before_the_second
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def kept(folder):
    """Read the records of all offline W&B files, in the order in which the starts wrote them."""

    def kept():
        files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
        return [record for file in files for record in wandb_uploader.records(file)[0]]

    return kept


@pytest.fixture
def assert_each_epoch_once(folder, kept):
    """Check the logged rows: each epoch once, with the figures of summary.csv, and one run id."""

    def check(epochs: int) -> None:
        records = kept()
        rows = [
            {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        table = list(csv.DictReader((folder / "summary.csv").open()))
        assert [row["_step"] for row in rows] == [row["epoch"] for row in rows] == list(range(epochs))
        assert len(table) == epochs
        for logged, row in zip(rows, table):
            for key, value in row.items():
                assert logged[key] == pytest.approx(float(value)), key
        ids = {record.run.run_id for record in records if record.HasField("run")}
        assert ids == {json.loads((folder / "wandb.json").read_text())["id"]}

    return check


def online(port: int, **constants: float) -> str:
    """Return code that sends W&B to a server on a local port, and sets constants of the client."""
    variables = {"WANDB_MODE": "online", "WANDB_API_KEY": 40 * "a", "WANDB_BASE_URL": f"http://127.0.0.1:{port}"}
    lines = [f"import os; os.environ.update({variables})", "from tnt_timm.tracking import wandb_client"]
    return "\n".join(lines + [f"wandb_client.{name} = {value}" for name, value in constants.items()])


@pytest.fixture
def silent_port():
    """The port of a server that accepts every connection and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        yield server.getsockname()[1]


def test_offline_files_hold_the_run(start, argv, kept, assert_each_epoch_once):
    run = start(argv("--log-wandb"), before=OFFLINE)
    assert run.wait() == 0, run.err
    assert_each_epoch_once(2)
    assert any(item.key == "lr" for record in kept() for item in record.run.config.update)
    assert run.out.count("log_wandb") == 1 and "`wandb sync" in run.out


@pytest.mark.parametrize("all_die", [False, True], ids=["run", "run and W&B"])
def test_killed_between_saving_and_logging(start, argv, assert_each_epoch_once, all_die):
    first = "self.process.kill(); self.reader.join()" if all_die else ""
    run = start(argv("--log-wandb", "--epochs", "3"), before=OFFLINE + KILLED.format(first=first))
    assert run.end(60) == [-signal.SIGKILL]
    run = start(argv("--log-wandb", "--epochs", "3"), before=OFFLINE)
    assert run.wait() == 0, run.err
    assert_each_epoch_once(3)


@pytest.mark.parametrize("note", [1, 20_000], ids=["nothing written", "a part written"])
def test_rows_in_the_file_of_a_killed_uploader_are_not_repeated(folder, kept, note):
    """W&B writes blocks of 32 KiB. `wandb sync` stops at a file without a block, or with half a record."""
    folder.mkdir()
    rows = [{"epoch": epoch, "note": note * "x"} for epoch in range(6)]
    task = {"argv": ["train.py"], "folder": str(folder), "is_over": False, "run": {"project": "p", "name": "n"}}
    task["settings"] = {"init_timeout": 9, "finish_timeout": 9, "x_stats_pid": os.getpid()}

    def process(rows):
        started = subprocess.Popen(
            [sys.executable, wandb_uploader.__file__],
            env={**os.environ, "WANDB_MODE": "offline"},
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        started.stdin.write(json.dumps({**task, "rows": rows}) + "\n")
        started.stdin.flush()
        return started

    def sizes():
        return [path.stat().st_size for path in folder.glob("wandb/offline-run-*/*.wandb")]

    killed, deadline = process(rows[:4]), time.monotonic() + 60
    while sum(sizes()) < max(2 * note, 7):  # bytes; a header at once
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1)
    killed.kill()
    killed.communicate()
    second = process(rows)
    second.communicate(json.dumps({"exit_code": 0}) + "\n", timeout=60)
    assert [record.history.step.num for record in kept() if record.HasField("history")] == list(range(6))
    ends = [wandb_uploader.records(path)[1] for path in folder.glob("wandb/offline-run-*/*.wandb")]
    assert ends == sizes() and len(ends) == (1 if note == 1 else 2)


@pytest.mark.parametrize("answer", ["refused", "none"])
def test_server_that_cannot_be_reached(start, argv, port, silent_port, assert_each_epoch_once, answer):
    before = online(port if answer == "refused" else silent_port, INIT_TIMEOUT_S=1)
    run = start(argv("--log-wandb"), before=before)
    assert run.wait() == 0, run.err
    assert run.out.count("warning: log_wandb") == 1 and "`wandb sync" in run.out and run.err == "", run.out
    assert_each_epoch_once(2)


def test_wandb_that_hangs_does_not_delay_the_run(start, argv, silent_port, assert_each_epoch_once):
    """The run does not wait for W&B to start, and one second at its end. The same command, run again, sends the rows."""
    run = start(argv("--log-wandb"), before=online(silent_port, INIT_TIMEOUT_S=1000, PATIENCE_S=1))
    begin = time.monotonic()
    assert run.wait() == 0, run.err
    assert time.monotonic() - begin < 30
    assert run.out.count("warning: log_wandb") == 1 and "no answer within 1 s" in run.out and run.err == "", run.out
    run = start(argv("--log-wandb"), before=OFFLINE)
    assert run.wait() == 0 and "already finished" in run.out
    assert_each_epoch_once(2)
    run = start(argv("--log-wandb"), before=OFFLINE)  # every row has been sent
    assert run.wait() == 0 and "log_wandb" not in run.out
    assert_each_epoch_once(2)


def test_uploader_that_dies_is_one_warning(start, argv):
    die = "\nfrom tnt_timm.tracking import wandb_client; wandb_client.sys.executable = '/bin/false'\n"
    run = start(argv("--log-wandb"), before=OFFLINE + die)
    assert run.wait() == 0, run.err
    assert run.out.count("warning: log_wandb: the uploader exited with status 1") == 1 and run.err == ""


def test_without_log_wandb_nothing_is_written(start, argv, folder):
    assert start(argv()).wait() == 0
    assert not [name for name in os.listdir(folder) if "wandb" in name]
