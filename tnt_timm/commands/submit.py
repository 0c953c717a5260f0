"""Submit a training run to SLURM.

    python scripts/slurm/submit.py configs/tnt_s.yaml --nodes 2 --gpus-per-node 8 --cpus-per-task 64 --time 24:00:00 -- --lr 2e-3

The job is train.sbatch, which says how it runs. Options that are not listed here go to sbatch, and what follows `--` to
train.py. The config is checked before anything is queued. With --dry-run the job script is printed instead; it can be kept
and given to sbatch as it is.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from tnt_timm.errors import ConfigError, UserError
from tnt_timm.settings import config as config_module

REPO = Path(__file__).resolve().parents[2]
TEMPLATE = REPO / "scripts" / "slurm" / "train.sbatch"
MARK = "# ---- submit.py writes its options here ----\n"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ConfigError(f"command line: {message}")


def parse(argv: Sequence[str]) -> Tuple[argparse.Namespace, List[str], List[str]]:
    """What is ours, what is sbatch's, and what is train.py's.

    Raises:
        ConfigError: something is missing or makes no sense.
    """
    parser = _Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s CONFIG --nodes N (--gpus-per-node G | --procs-per-node P) [SBATCH OPTION ...] [-- TRAIN.PY ...]",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of settings, before all options")
    parser.add_argument("-N", "--nodes", type=_positive, required=True, help="how many machines")
    parser.add_argument(
        "--gpus-per-node", type=_gpus, metavar="G", help="GPUs of each, as 8 or a100:8; a process for each"
    )
    parser.add_argument(
        "--procs-per-node", type=_positive, metavar="P",
        help="processes on each, to train on CPUs (see sbatch's --cpus-per-task), or where GPUs are asked for otherwise",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", nargs="+", type=_seed, metavar="S",
        help="a job array: a run for each seed, in a folder of its own, named EXPERIMENT-seedS",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the job script and submit nothing")

    argv, train_argv = _split(list(argv))
    given, sbatch_argv = parser.parse_known_args(argv)
    if not given.config.is_file():
        raise ConfigError(f"{given.config}: no such file; submit.py CONFIG [OPTION ...]")
    if sbatch_argv and not sbatch_argv[0].startswith("-"):
        raise ConfigError(f"command line: {sbatch_argv[0]!r} belongs to no option; train.py's arguments follow ` -- `")
    flags = [arg.split("=")[0] for arg in sbatch_argv]
    if given.gpus_per_node is None and given.procs_per_node is None:
        raise ConfigError("command line: pass --gpus-per-node, or --procs-per-node to train on CPUs")
    if given.gpus_per_node is not None and given.procs_per_node is not None:
        raise ConfigError("command line: --gpus-per-node has a process for each GPU; leave out --procs-per-node")
    if given.seeds:
        if len(set(given.seeds)) < len(given.seeds):
            raise ConfigError("command line: --seeds: two runs would have the same seed, and the same folder")
        if "--array" in flags or "-a" in flags:
            raise ConfigError("command line: --array and --seeds: the seeds make the array")
        if any(arg.split("=")[0] == "--seed" for arg in train_argv):
            raise ConfigError("command line: --seed and --seeds: give one of them")
    elif "--array" in flags or "-a" in flags:
        raise ConfigError("command line: --array: pass --seeds, from which the array is made")
    return given, sbatch_argv, train_argv


def _split(argv: List[str]) -> Tuple[List[str], List[str]]:
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)


def _gpus(text: str) -> str:
    kind, _, count = text.rpartition(":")
    _positive(count)
    return text


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0")
    return int(text)


def job_script(given: argparse.Namespace, sbatch_argv: Sequence[str], train_argv: Sequence[str]) -> str:
    """train.sbatch with this job's options and arguments in it.

    Raises:
        ConfigError: the config, or train.py's arguments, make no run.
    """
    train_argv = ["--config", str(given.config.absolute()), *train_argv]
    config = config_module.resolve(train_argv).config
    options = [f"--nodes={given.nodes}"]
    if given.gpus_per_node:
        options += [f"--gpus-per-node={given.gpus_per_node}"]
    if given.seeds:
        options += ["--array=" + ",".join(map(str, given.seeds))]
    environment = {"TNT_PYTHON": sys.executable, "TNT_TRAIN": str(REPO / "train.py")}
    if given.procs_per_node:
        environment["TNT_PROCS_PER_NODE"] = str(given.procs_per_node)
    if given.seeds:
        environment["TNT_EXPERIMENT"] = config.run.experiment
    lines = [f"#SBATCH {option}" for option in [*options, *_one_per_line(sbatch_argv)]]
    lines += ["", *(f"export {name}={shlex.quote(value)}" for name, value in environment.items())]
    lines += [f"set -- {shlex.join(train_argv)}"]
    before, after = TEMPLATE.read_text(encoding="utf-8").split(MARK)
    return before + "\n".join(lines) + "\n" + after


def _one_per_line(sbatch_argv: Sequence[str]) -> List[str]:
    """Each option with its value, quoted for a #SBATCH line."""
    lines: List[str] = []
    for arg in sbatch_argv:
        if arg.startswith("-"):
            lines.append(shlex.quote(arg))
        else:
            lines[-1] += " " + shlex.quote(arg)
    return lines


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status: sbatch's own where it came to that."""
    try:
        given, sbatch_argv, train_argv = parse(argv)
        script = job_script(given, sbatch_argv, train_argv)
        if given.dry_run:
            sys.stdout.write(script)
            return 0
        if shutil.which("sbatch") is None:
            raise UserError("sbatch: not found; submit on a machine of the cluster, or see the script with --dry-run")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return subprocess.run(["sbatch"], input=script, text=True).returncode
