#!/usr/bin/env python3
"""Draw figures: see `scripts/figures.py --help`."""

from tnt_timm.commands.figures import main

if __name__ == "__main__":
    raise SystemExit(main())
