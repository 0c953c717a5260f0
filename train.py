#!/usr/bin/env python3
"""Train: `torchrun train.py --config configs/digits.yaml`. The loop is in tnt_timm/training/trainer.py."""

import os
import signal
import sys


def leave(number, frame):
    """Exit like a run that is stopped (`Stopped` in tnt_timm/errors.py), during the seconds that importing PyTorch takes."""
    if os.environ.get("RANK", "0") == "0":
        text = f"stopped by {signal.Signals(number).name}: progress is saved; run the same command to resume\n"
        os.write(2, text.encode())
    os._exit(130 if number == signal.SIGINT else 75)  # an exception might be swallowed by an import


if __name__ == "__main__":
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, leave)
    from tnt_timm.commands.train import main

    sys.exit(main())
