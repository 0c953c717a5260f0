#!/usr/bin/env python3
"""Train: `torchrun train.py --config configs/digits.yaml`. The loop is in tnt_timm/training/trainer.py."""

import os
import signal
import sys


def leave(number, frame):
    """As the run itself ends when it is asked to (tnt_timm/errors.py), in the seconds that it takes to import PyTorch."""
    if os.environ.get("RANK", "0") == "0":
        text = f"stopped by {signal.Signals(number).name}; what was done is saved, and the same command goes on\n"
        os.write(2, text.encode())
    os._exit(130 if number == signal.SIGINT else 75)  # not an exception, which an import might swallow


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, leave)
    from tnt_timm.commands.train import main

    sys.exit(main())
