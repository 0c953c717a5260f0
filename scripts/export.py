#!/usr/bin/env python3
"""Export models: see `scripts/export.py --help`."""

from tnt_timm.commands.export import main

if __name__ == "__main__":
    raise SystemExit(main())
