#!/usr/bin/env python3
"""Train: `torchrun train.py --config configs/digits.yaml`. Wiring only; the loop is in tnt_timm/training/trainer.py."""

import sys

from tnt_timm.training.commands import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
