#!/usr/bin/env python3
"""Train: `torchrun train.py --config configs/digits.yaml`. Wiring only; the loop is in tnt_timm/training/trainer.py."""

import sys

if __name__ == "__main__":
    try:
        from tnt_timm.training.commands import train
    except KeyboardInterrupt:  # it takes seconds to import PyTorch
        sys.exit(130)
    sys.exit(train(sys.argv[1:]))
