#!/usr/bin/env python3
"""Check a dataset: see `scripts/check.py --help`."""

from tnt_timm.commands.check import main

if __name__ == "__main__":
    raise SystemExit(main())
