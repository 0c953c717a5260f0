"""Find the files that are shipped with the package: the configs and the SLURM job script.

A wheel has them inside the package, a checkout beside it.
"""

from pathlib import Path
from typing import Dict

from tnt_timm.errors import ConfigError
from tnt_timm.settings.command_line import nearest

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parent


def configs() -> Dict[str, Path]:
    """Return the shipped configs by name, such as `tnt_s` or `finetune/tnt_s_pets`."""
    installed = PACKAGE / "configs"
    root = installed if installed.is_dir() else CHECKOUT / "configs"
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_config(given: str) -> Path:
    """Return the path of a config that is given by its path or, if it is shipped, by its name.

    Raises:
        ConfigError: there is no such file and no such name; the message names the nearest shipped configs.
    """
    path, known = Path(given), configs()
    if given in known and not path.is_file():
        return known[given]
    if not path.exists():  # a pipe is as good as a file
        hint = nearest(given.removesuffix(".yaml").removeprefix("configs/"), known)
        hint = hint or "; pass a path, or a name such as tnt_s"
        raise ConfigError(f"{given}: no such file, and no shipped config has this name{hint}")
    return path


def slurm_template() -> Path:
    """Return the path of train.sbatch."""
    installed = PACKAGE / "commands" / "train.sbatch"
    return installed if installed.is_file() else CHECKOUT / "scripts" / "slurm" / "train.sbatch"
