"""The uploader sends each row once, continuing from the rows that W&B's server has."""

import io
import json
import sys
import types
from typing import Any, Dict, List

import pytest

from tnt_timm.tracking import wandb_uploader


class Server:
    """A stand-in for the wandb module and its server: it keeps the rows, and resumes after the last one."""

    def __init__(self) -> None:
        self.rows: List[Dict[str, Any]] = []
        self.inits: List[Dict[str, Any]] = []
        self.offline = self.disabled = False
        self.url = "https://wandb.ai/run"
        self.Settings = types.SimpleNamespace

    def init(self, **arguments: Any) -> "Server":
        self.inits.append(arguments)
        self.starting_step = max((row["epoch"] for row in self.rows), default=-1) + 1
        return self

    def log(self, row: Dict[str, Any], step: int, commit: bool) -> None:
        assert commit and step == row["epoch"] >= self.starting_step, "W&B would drop the row"
        self.starting_step = step + 1
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setitem(sys.modules, "wandb", server)
    return server


@pytest.fixture
def process(server, tmp_path, monkeypatch, capfd):
    """Run the uploader as in one start of a run: finished epochs, epochs that follow -> its lines for the log."""

    def process(done: int, logged: List[int], is_over: bool = False) -> str:
        task = {"argv": ["train.py"], "folder": str(tmp_path), "rows": [{"epoch": i} for i in range(done)]}
        task |= {"is_over": is_over, "run": {"project": "p", "name": "n"}, "settings": {"finish_timeout": 1}}
        lines = [task, *({"epoch": epoch} for epoch in logged), {"exit_code": 0}]
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(line) + "\n" for line in lines)))
        monkeypatch.setattr(sys, "argv", sys.argv)
        return "\n".join(wandb_uploader.serve(json.loads(sys.stdin.readline())))

    return process


def epochs(server: Server) -> List[int]:
    return [row["epoch"] for row in server.rows]


@pytest.fixture
def slow_network(server, monkeypatch):
    """No upload finishes in time, until the test undoes this."""

    def finish(exit_code: int) -> None:
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(server, "finish", finish)
        yield patch


def test_continues_after_the_last_row_on_the_server(server, process, slow_network):
    """Rows that were lost on the way are sent again. Rows that the run repeats are sent once."""
    assert server.url in process(0, [0, 1, 2, 3])
    del server.rows[2:]
    process(4, [4])
    assert epochs(server) == [0, 1, 2, 3, 4]
    process(3, [3, 4, 5])  # from an earlier checkpoint
    assert epochs(server) == [0, 1, 2, 3, 4, 5]
    assert len({arguments["id"] for arguments in server.inits}) == 1
    assert all(arguments["resume"] == "allow" for arguments in server.inits)


def test_rows_are_sent_as_they_come(server, process, monkeypatch):
    """Before the uploader reads the next row, it has sent all earlier ones."""
    sent, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda line: (sent.append(epochs(server)), loads(line))[1])
    process(2, [2, 3])
    assert sent[-3:] == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_offline_after_online_repeats_no_row(server, process):
    process(0, [0, 1])
    server.rows, server.offline = [], True  # offline, W&B starts at step 0
    process(2, [2])
    assert epochs(server) == [2]


def test_a_finished_run_is_started_again_only_for_missing_rows(server, process, slow_network):
    assert "the upload did not finish within 1 s" in process(0, [0, 1])
    del server.rows[1:]
    slow_network.undo()
    process(2, [], is_over=True)
    assert epochs(server) == [0, 1] and len(server.inits) == 2
    process(2, [], is_over=True)
    assert len(server.inits) == 2  # no row was missing


def test_in_disabled_mode_no_row_counts_as_sent(server, process):
    server.disabled = True
    process(0, [0, 1])
    server.disabled, server.rows = False, []
    process(2, [2])
    assert epochs(server) == [0, 1, 2]
