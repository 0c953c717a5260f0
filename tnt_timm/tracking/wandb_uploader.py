"""The process that talks to Weights & Biases for a run, so that nothing there can hold up, end or outlive the training.

A program of its own: it imports nothing of this project, whose import takes seconds. Standard input brings JSON, a line each:
what the run is (see `main`), then a row per epoch, last {"exit_code": ...}; where that is missing, the run was killed. Each
line of standard output is one for the run's log.

Which rows are handed over already, by earlier processes too, is known from three places: wandb.json in the run's folder (what
was complete when a process ended well), W&B's server (the step where it resumes), and the offline files (a kill loses what
wandb had not written). Each row has its epoch as W&B's step.
"""

import contextlib
import fcntl
import itertools
import json
import os
import secrets
import signal
import struct
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

BLOCK = 32768  # bytes, of LevelDB's log format
HEADER = 7  # bytes, of W&B's file, of a record's part


def main() -> None:
    """The first line: "argv" of the command, "pid" of the run, its "folder", the "rows" of its earlier epochs, whether it
    "is_over", W&B's "project", "name", "tags" and "config", and the seconds that W&B has to start and to end,
    "init_timeout_s" and "finish_timeout_s"."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they are for the run, whose end is this one's
    log = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what W&B says is nobody's
    try:
        for line in serve(json.loads(sys.stdin.readline())):
            print(line, file=log, flush=True)
    except Exception as error:  # whatever it is, it is not the run's
        print(f"warning: log_wandb: {brief(error)}; the run goes on without", file=log, flush=True)


def serve(task: Dict[str, Any]) -> Iterator[str]:
    """Hand over each row once; yields lines for the log."""
    sys.argv = task["argv"]  # W&B shows the command
    folder = Path(task["folder"])
    lock = open(folder / "wandb.lock", "w")  # noqa: SIM115  (the lock lasts as long as the file is open)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.lockf(lock, fcntl.LOCK_EX)  # the process of a killed run may still be handing over
    record_file = folder / "wandb.json"
    if not record_file.exists():
        write_json(record_file, {"id": secrets.token_hex(4), "rows": 0})
    record = json.loads(record_file.read_text())
    if task["is_over"] and record["rows"] >= len(task["rows"]):
        return

    import wandb

    offline_rows = [rows_in(file) for file in (folder / "wandb").glob(f"offline-run-*-{record['id']}/*.wandb")]
    arguments: Dict[str, Any] = {key: task[key] for key in ("project", "name", "tags", "config")}
    arguments |= {"id": record["id"], "dir": str(folder)}
    arguments["settings"] = wandb.Settings(
        init_timeout=task["init_timeout_s"],
        finish_timeout=task["finish_timeout_s"],
        finish_timeout_raises=True,
        silent=True,
        console="off",
        x_stats_pid=task["pid"],
    )
    sync = f"`wandb sync {folder}/wandb` sends them"
    try:
        run = wandb.init(**arguments, resume="allow")
    except Exception as error:
        yield f"warning: log_wandb: {brief(error)}; the rows are kept in {folder}/wandb, {sync}"
        with contextlib.suppress(SystemExit):
            wandb.teardown()  # what is left of the attempt has the run's id
        run = wandb.init(**arguments, mode="offline")
    if not (run.offline or run.disabled):
        yield f"W&B        {run.url}"

    handed_over = max([record["rows"], run.starting_step, *offline_rows])
    exit_code = 1
    for row in itertools.chain(task["rows"], map(json.loads, sys.stdin)):
        if "exit_code" in row:
            exit_code = row["exit_code"]
            break
        if row["epoch"] >= handed_over:  # a run that goes back to an earlier checkpoint has some again
            run.log(row, step=row["epoch"], commit=True)
            handed_over = row["epoch"] + 1
    try:
        run.finish(exit_code=exit_code)
    except TimeoutError:
        yield (
            f"warning: log_wandb: not all was sent within {task['finish_timeout_s']:g} s; "
            f"the same command, started again, sends the rest"
        )
        return
    if not run.disabled:
        write_json(record_file, {**record, "rows": handed_over})
    if run.offline:
        yield f"notice: log_wandb: rows are kept in {folder}/wandb; {sync}"


def brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def rows_in(path: Path) -> int:
    """The number of epochs that are whole in an offline file and the ones before it.

    Half a record at its end is cut off, and a file without any record gets another name: `wandb sync` would end at either
    and not send the files of later starts.
    """
    found, end = records(path)
    if not found:
        path.rename(path.with_name(path.name + ".empty"))
    elif end < path.stat().st_size:
        os.truncate(path, end)
    return max((record.history.step.num + 1 for record in found if record.HasField("history")), default=0)


def records(path: Path) -> Tuple[List[Any], int]:
    """The whole records of a W&B file, and where the last one ends: LevelDB's log format behind a header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record, found, end = path.read_bytes(), HEADER, b"", [], 0
    while True:
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block is too short for a header
            at += BLOCK - at % BLOCK
        if at + HEADER > len(data):
            return found, end
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        at += HEADER + length
        if kind == 0 or at > len(data):
            return found, end
        record = (record if kind in (3, 4) else b"") + data[at - length : at]
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(record))
            end = at


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules are part of a package
    main()
    os._exit(0)  # W&B's own end waits for servers that do not answer
