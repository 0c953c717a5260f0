"""Let tests import the modules of the studies, and start commands as tests/cli does."""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "interruption"))

spec = importlib.util.spec_from_file_location("cli_conftest", Path(__file__).parents[1] / "cli" / "conftest.py")
cli = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cli)
launch, start = cli.launch, cli.start
