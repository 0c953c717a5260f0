#!/usr/bin/env python3
"""Validate: `python validate.py output/digits`."""

import sys

if __name__ == "__main__":
    try:
        from tnt_timm.commands.validate import main
    except KeyboardInterrupt:  # importing PyTorch takes seconds
        sys.exit(130)
    sys.exit(main())
