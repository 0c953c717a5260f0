#!/usr/bin/env python3
"""Measure speed: see `scripts/benchmark.py --help`."""

from tnt_timm.commands.benchmark import main

if __name__ == "__main__":
    raise SystemExit(main())
