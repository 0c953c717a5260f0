"""Upload a run's figures to Weights & Biases. WandbTracker starts this program as a process of its own.

It imports nothing from this package, because that takes seconds. It reads JSON from standard input, one message per line: a
description of the run (WandbTracker makes it), one row per epoch, and {"exit_code": ...}. If the last is missing, the run was
killed. Each line of standard output is one for the run's log.

Each row is uploaded once, with its epoch as W&B's step, over all starts of the run. The rows that earlier starts uploaded are
known from three places: wandb.json in the run folder (written when an uploader finishes), W&B's server (the step where it
resumes), and the offline files (after a kill, rows that wandb had not yet written are missing there).
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

BLOCK = 32768  # bytes of a block in LevelDB's log format
HEADER = 7  # bytes of the header of W&B's file, and of each part of a record


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the run; this process exits when the run does
    log = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps W&B's own output out of the run's log
    try:
        for line in serve(json.loads(sys.stdin.readline())):
            print(line, file=log, flush=True)
    except Exception as error:  # must not end the run
        print(f"warning: log_wandb: {brief(error)}; the run continues without it", file=log, flush=True)


def serve(task: Dict[str, Any]) -> Iterator[str]:
    """Upload each missing row of the run that `task` describes, then those from standard input; yield lines for the log."""
    sys.argv = task["argv"]  # W&B shows the command
    folder = Path(task["folder"])
    lock = open(folder / "wandb.lock", "w")  # noqa: SIM115  (the lock lasts as long as the file is open)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.lockf(lock, fcntl.LOCK_EX)  # the uploader of a killed run may still be at work
    record_file = folder / "wandb.json"
    if not record_file.exists():
        write_json(record_file, {"id": secrets.token_hex(4), "rows": 0})
    record = json.loads(record_file.read_text())
    if task["is_over"] and record["rows"] >= len(task["rows"]):
        return

    import wandb

    offline_rows = [rows_in(file) for file in (folder / "wandb").glob(f"offline-run-*-{record['id']}/*.wandb")]
    settings = wandb.Settings(**task["settings"], finish_timeout_raises=True, silent=True, console="off")
    arguments = {**task["run"], "id": record["id"], "dir": str(folder), "settings": settings}
    remedy = f"`wandb sync {folder}/wandb` sends them"
    try:
        run = wandb.init(**arguments, resume="allow")
    except Exception as error:
        yield f"warning: log_wandb: {brief(error)}; the rows are kept in {folder}/wandb, {remedy}"
        with contextlib.suppress(SystemExit):
            wandb.teardown()  # the failed attempt still holds the run's id
        run = wandb.init(**arguments, mode="offline")
    if not (run.offline or run.disabled):
        yield f"W&B        {run.url}"

    uploaded = max([record["rows"], run.starting_step, *offline_rows])
    exit_code = 1
    for row in itertools.chain(task["rows"], map(json.loads, sys.stdin)):
        if "exit_code" in row:
            exit_code = row["exit_code"]
            break
        if row["epoch"] >= uploaded:  # a run that went back to an earlier checkpoint repeats some
            run.log(row, step=row["epoch"], commit=True)
            uploaded = row["epoch"] + 1
    try:
        run.finish(exit_code=exit_code)
    except TimeoutError:
        yield (
            f"warning: log_wandb: the upload did not finish within {task['settings']['finish_timeout']:g} s; "
            f"the same command, started again, sends the rest"
        )
        return
    if not run.disabled:
        write_json(record_file, {**record, "rows": uploaded})
    if run.offline:
        yield f"notice: log_wandb: the rows are kept in {folder}/wandb; {remedy}"


def brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def write_json(path: Path, value: Any) -> None:
    """Replace a file such that a crash leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def rows_in(path: Path) -> int:
    """Return the number of epochs up to the last complete one in an offline file.

    Also repair the file for `wandb sync`, which stops at half a record and at a file without records, and then does not send the
    files of later starts: half a record is cut off, and an empty file renamed.
    """
    found, end = records(path)
    if not found:
        path.rename(path.with_name(path.name + ".empty"))
    elif end < path.stat().st_size:
        os.truncate(path, end)
    return max((record.history.step.num + 1 for record in found if record.HasField("history")), default=0)


def records(path: Path) -> Tuple[List[Any], int]:
    """Return the complete records of a W&B file (a header, then LevelDB's log format), and the byte where the last one ends.

    wandb itself reads these files only inside its compiled `wandb sync`.
    """
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
        if kind in (1, 4):  # a whole record, or its last part
            found.append(Record.FromString(record))
            end = at


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its tensorboard.py would hide the package of that name
    main()
    os._exit(0)  # W&B's own exit handlers wait for servers that do not answer
