#!/usr/bin/env python3
"""Validate: `python validate.py output/digits`. Wiring only; the work is in tnt_timm/training/validation.py."""

import sys

if __name__ == "__main__":
    try:
        from tnt_timm.training.commands import validate
    except KeyboardInterrupt:  # it takes seconds to import PyTorch
        sys.exit(130)
    sys.exit(validate(sys.argv[1:]))
