"""Import everything once and fork the commands, so that a run starts in milliseconds instead of seconds.

Each line of stdin is a request in JSON, each line of stdout its answer:

    {"program": NAME, "argv": [...], "ranks": [{env}, ...], "log": PATH, "before": CODE}
                             start train, validate or torchrun, one process per entry of ranks -> [pid, ...]
    {"ended": [pid, ...]}    -> [exit status or null, ...]

The ranks of a run are one process group, whose number is the pid of rank 0. Each rank executes CODE first.
torchrun forks its ranks as well (`--start-method fork --run-path`), so that they start fast, too.
"""

import atexit
import faulthandler
import json
import os
import sys
import threading
import time
from typing import Any, Dict, List, Optional

FORKED_S = 0.3  # a torchrun forks its ranks within this time


def main() -> int:
    import torch.distributed.run  # noqa: F401  (so that the forks need not import it)

    from tnt_timm.commands.train import main as train
    from tnt_timm.commands.validate import main as validate

    programs = {"train": train, "validate": validate, "torchrun": torchrun}
    statuses: Dict[int, int] = {}
    answer = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "ended" in request:
            for pid in request["ended"]:
                if pid not in statuses:
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        statuses[pid] = os.waitstatus_to_exitcode(status)
            result: Any = [statuses.get(pid) for pid in request["ended"]]
        else:
            result = []
            for env in request["ranks"]:
                pid = os.fork()
                if pid == 0:
                    enter(request, env, result[0] if result else 0)
                    leave(programs[request["program"]](request["argv"]))
                result.append(pid)
                os.setpgid(pid, result[0])
        print(json.dumps(result), file=answer, flush=True)
    return 0


def torchrun(argv: List[str]) -> int:
    from torch.distributed.run import main

    # The agent's store looks up the name of a rank that connects. A rank that is forked in that moment would inherit the lock
    # of the C library's resolver and wait for it forever. So each fork waits until the others should have been forked, too.
    os.register_at_fork(after_in_child=lambda: time.sleep(FORKED_S))
    try:
        main(argv)
    except BaseException:  # it raises when its ranks fail
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def enter(request: Dict[str, Any], env: Dict[str, Optional[str]], group: int) -> None:
    """Turn a fork into a rank of a run."""
    os.setpgid(0, group)
    for number, name in ((0, os.devnull), (1, request["log"] + ".out"), (2, request["log"] + ".err")):
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin = open(os.devnull)  # noqa: SIM115  (for the rest of the process)
    faulthandler.enable(2)
    os.environ.update(env)
    exec(request["before"], {"__name__": "before"})


def leave(status: int) -> None:
    """Exit like an interpreter, without the seconds of PyTorch's cleanup."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
