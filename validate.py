#!/usr/bin/env python3
"""Validate: `python validate.py output/digits`. Wiring only; the work is in tnt_timm/training/validation.py."""

import sys

from tnt_timm.training.commands import validate

if __name__ == "__main__":
    sys.exit(validate(sys.argv[1:]))
