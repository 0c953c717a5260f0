"""Let tests import the modules of the studies, and start commands as tests/cli does."""

import runpy
import sys
from pathlib import Path

for name in ("interruption", "miniature"):
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / name))
cli = runpy.run_path(str(Path(__file__).parents[1] / "cli" / "conftest.py"))
launch, start = cli["launch"], cli["start"]
