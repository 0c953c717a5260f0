#!/usr/bin/env python3
"""Classify images: see `scripts/predict.py --help`."""

from tnt_timm.commands.predict import main

if __name__ == "__main__":
    raise SystemExit(main())
