#!/usr/bin/env python3
"""Count parameters and multiply-adds: see `scripts/complexity.py --help`."""

from tnt_timm.commands.complexity import main

if __name__ == "__main__":
    raise SystemExit(main())
