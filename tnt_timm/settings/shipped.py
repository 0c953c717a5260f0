"""Find the files that are shipped with the package: the configs and the SLURM job script.

A wheel has them inside the package, a checkout beside it.
"""

from pathlib import Path
from typing import Dict

from tnt_timm.errors import ConfigError
from tnt_timm.settings.command_line import nearest

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parent
if (PACKAGE / "configs").is_dir():
    CONFIGS = PACKAGE / "configs"
    SLURM_JOB = PACKAGE / "commands" / "train.sbatch"
    TRAIN = "-m tnt_timm.train"  # for TNT_TRAIN of the SLURM job
else:
    CONFIGS = CHECKOUT / "configs"
    SLURM_JOB = CHECKOUT / "scripts" / "slurm" / "train.sbatch"
    TRAIN = str(CHECKOUT / "train.py")


def find_config(given: str) -> Path:
    """Return the path of a config that is given by its path or, if it is shipped, by a name such as `finetune/tnt_s_pets`.

    Raises:
        ConfigError: there is neither such a file nor such a name; the message names the nearest shipped configs.
    """
    path, known = Path(given), _configs()
    if given in known and not path.is_file():
        return known[given]
    if not path.exists():  # a pipe is as good as a file
        hint = nearest(given.removesuffix(".yaml").rpartition("configs/")[2], known)
        hint = hint or "; pass a path, or a name such as tnt_s"
        raise ConfigError(f"{given}: no such file, and no shipped config has this name{hint}")
    return path


def _configs() -> Dict[str, Path]:
    """Return the shipped configs by name."""
    paths = sorted(CONFIGS.rglob("*.yaml"))
    return {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in paths}
