#!/usr/bin/env python3
"""Validate many models: see `scripts/validate_all.py --help`."""

from tnt_timm.commands.validate_all import main

if __name__ == "__main__":
    raise SystemExit(main())
