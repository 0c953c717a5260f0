"""Submit a training run to SLURM.

tnt-submit tnt_s --nodes 2 --gpus-per-node 8 --cpus-per-task 64 --time 24:00:00 -- --lr 2e-3
"""

import re
import shlex
import shutil
import subprocess
import sys
from typing import List, Optional, Sequence

from pydantic import NonNegativeInt, PositiveInt

from tnt_timm.commands.entry_point import run
from tnt_timm.console import show
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.settings import command_line, config, shipped
from tnt_timm.settings.command_line import setting
from tnt_timm.settings.paths import PathText, for_another_machine
from tnt_timm.settings.schema import Group

MARK = "# ---- submit.py writes its options here ----\n"


class Settings(Group):
    """Submit a training run to SLURM; docs/clusters.md explains how the job runs. Options that are not listed go to sbatch, and
    arguments after `--` to train.py. The config is checked before anything is queued."""

    config: PathText = setting(about="a YAML file of settings, or the name of a shipped one", positional="CONFIG")
    nodes: PositiveInt = setting(about="number of nodes", flag="-N")
    gpus_per_node: str = setting("", "GPUs per node, as 8 or a100:8; one process for each")
    procs_per_node: Optional[PositiveInt] = setting(
        None, "processes per node, instead of --gpus-per-node: on CPUs, or if --gres requests the GPUs"
    )
    seeds: List[NonNegativeInt] = setting([], "job array: one run per seed, each in its own folder EXPERIMENT-seedSEED")
    dry_run: bool = setting(False, "print the job script, which sbatch accepts unchanged, and submit nothing")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Return the exit status."""
    return run(submit, argv)


def submit(argv: Sequence[str]) -> None:
    """Check the config, write the job script and give it to sbatch.

    Raises:
        UserError: the command line or the config is wrong, or sbatch is missing or fails.
    """
    argv = list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    parser = command_line.build_parser({"settings": Settings.model_fields}, Settings.__doc__)
    parser.usage += " [SBATCH OPTION ...] [-- TRAIN.PY ARGUMENT ...]"
    given, sbatch_argv = parser.parse_known_args(argv[:end])
    settings, train_argv = config.own_settings(Settings, vars(given)), argv[end + 1 :]
    _check(settings, sbatch_argv, train_argv)
    script = job_script(settings, sbatch_argv, train_argv)
    if settings.dry_run:
        show(script)
        return
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not found; submit from a machine of the cluster, or print the script with --dry-run")
    if subprocess.run(["sbatch"], input=script, text=True).returncode:
        raise UserError("sbatch: refused the job; its message is above")


def _check(settings: Settings, sbatch_argv: Sequence[str], train_argv: Sequence[str]) -> None:
    """Raise ConfigError for arguments that contradict each other or belong elsewhere."""
    if sbatch_argv and not sbatch_argv[0].startswith("-"):
        raise ConfigError(
            f"command line: {sbatch_argv[0]!r}: unexpected argument; put train.py's arguments after ` -- `"
        )
    if not settings.gpus_per_node and settings.procs_per_node is None:
        raise ConfigError("command line: pass --gpus-per-node, or --procs-per-node to train on CPUs")
    if not re.fullmatch(r"(.+:)?[1-9]\d*|", settings.gpus_per_node):
        raise ConfigError(
            f"command line: --gpus-per-node: {settings.gpus_per_node!r}: expected a number, as 8 or a100:8"
        )
    if settings.gpus_per_node and settings.procs_per_node is not None:
        raise ConfigError("command line: --gpus-per-node starts one process per GPU; leave out --procs-per-node")
    if any(arg.split("=")[0] in ("--array", "-a") for arg in sbatch_argv):
        raise ConfigError("command line: --array: pass --seeds, which make the array")
    if len(set(settings.seeds)) < len(settings.seeds):
        raise ConfigError("command line: --seeds: two runs would have the same seed and the same folder")
    if settings.seeds and any(arg.split("=")[0] == "--seed" for arg in train_argv):
        raise ConfigError("command line: --seed and --seeds: give one of them")


def job_script(settings: Settings, sbatch_argv: Sequence[str], train_argv: Sequence[str]) -> str:
    """Return train.sbatch with this job's options and arguments in it.

    Raises:
        ConfigError: the config or train.py's arguments are wrong.
    """
    train_argv = ["--config", str(shipped.find_config(settings.config).absolute()), *train_argv]
    with for_another_machine():
        experiment = config.resolve(train_argv).config.run.experiment
    environment = {"TNT_PYTHON": sys.executable, "TNT_TRAIN": shipped.TRAIN}
    options = [f"--nodes={settings.nodes}"]
    if settings.gpus_per_node:
        options += [f"--gpus-per-node={settings.gpus_per_node}"]
    if settings.procs_per_node:
        environment["TNT_PROCS_PER_NODE"] = str(settings.procs_per_node)
    if settings.seeds:
        options += ["--array=" + ",".join(map(str, settings.seeds))]
        environment["TNT_EXPERIMENT"] = experiment
    for arg in sbatch_argv:
        if arg.startswith("-"):
            options.append(shlex.quote(arg))
        else:  # the value of the option before it
            options[-1] += f" {shlex.quote(arg)}"
    lines = [f"#SBATCH {option}" for option in options]
    lines += ["", *(f"export {name}={shlex.quote(value)}" for name, value in environment.items())]
    lines += [f"set -- {shlex.join(train_argv)}"]
    before, after = shipped.SLURM_JOB.read_text(encoding="utf-8").split(MARK)
    return before + "\n".join(lines) + "\n" + after
