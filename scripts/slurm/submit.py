#!/usr/bin/env python3
"""Submit a training run to SLURM: see `scripts/slurm/submit.py --help`."""

from tnt_timm.commands.submit import main

if __name__ == "__main__":
    raise SystemExit(main())
