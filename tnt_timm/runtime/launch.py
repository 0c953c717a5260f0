"""Read from the environment how this process was started: alone, or as one of several ranks by torchrun."""

import os
from typing import Mapping, NamedTuple, Optional

from tnt_timm.errors import ConfigError

# What torchrun sets for each rank. A multi-node job of another launcher sets the same ones, sometimes without LOCAL_*.
RANKS = ("RANK", "WORLD_SIZE")
OF_A_RANK = (*RANKS, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Launchers that start several tasks, and the variable with their number. None of them sets RANK.
OTHER_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "HOROVOD_SIZE": "horovodrun",
}


class Launch(NamedTuple):
    """This process among the ranks of its run."""

    rank: int = 0
    size: int = 1
    local_rank: Optional[int] = None  # among the ranks of this machine, if the launcher says so
    address: str = ""  # of rank 0, or of torchrun on the first machine; empty for one rank
    port: int = 0
    by_torchrun: bool = False


ALONE = Launch()


def read_launch(environment: Optional[Mapping[str, str]] = None) -> Launch:
    """Return how this process was started.

    Raises:
        ConfigError: the variables contradict each other, or another launcher has started several tasks.
    """
    environment = os.environ if environment is None else environment
    if not any(name in environment for name in (*RANKS, "LOCAL_RANK")):
        _refuse_other_launchers(environment)
        return ALONE
    rank, size, local_rank, local_size = (_number(environment, name) for name in OF_A_RANK[:4])
    by_torchrun = "TORCHELASTIC_RUN_ID" in environment
    if rank is None or size is None:
        given, missing = (
            _given(environment, OF_A_RANK[:3]),
            " and ".join(name for name in RANKS if name not in environment),
        )
        raise _mistake(environment, f"{given}: {missing} not set")
    if size == 0 or rank >= size:
        raise _mistake(environment, f"{_given(environment, RANKS)}: the ranks of {size} processes are below {size}")
    if local_size is not None and not 0 < local_size <= size:
        raise _mistake(environment, f"{_given(environment, ('LOCAL_WORLD_SIZE', 'WORLD_SIZE'))}: expected 1 to {size}")
    if local_rank is not None and local_rank >= (local_size or size):
        given = _given(environment, ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        raise _mistake(environment, f"{given}: expected LOCAL_RANK below {local_size or size}")
    if size == 1:
        return Launch(local_rank=local_rank, by_torchrun=by_torchrun)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise _mistake(
            environment, f"{_given(environment, RANKS)}: {' and '.join(missing)} not set, so the ranks cannot connect"
        )
    port = _number(environment, "MASTER_PORT")
    if not 0 < port < 65536:
        raise _mistake(environment, f"MASTER_PORT={port}: expected 1 to 65535")
    return Launch(rank, size, local_rank, environment["MASTER_ADDR"], port, by_torchrun)


def unset_all(environment: Optional[Mapping[str, str]] = None) -> str:
    """Return the shell command after which this process would be the only one."""
    environment = os.environ if environment is None else environment
    return "unset " + " ".join(name for name in OF_A_RANK if name in environment)


def _refuse_other_launchers(environment: Mapping[str, str]) -> None:
    for name, launcher in OTHER_LAUNCHERS.items():
        tasks = environment.get(name, "")
        if tasks.isdecimal() and int(tasks) > 1:
            raise ConfigError(
                f"environment: {name}={tasks}: {launcher} starts {tasks} runs of one process each, not one run of {tasks}; "
                f"start the ranks with torchrun (docs/clusters.md), or `unset {name}` if this is the only process"
            )


def _number(environment: Mapping[str, str], name: str) -> Optional[int]:
    text = environment.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise _mistake(environment, f"{name}={text}: expected a whole number, at least 0")
    return int(text)


def _given(environment: Mapping[str, str], names: Mapping[str, str]) -> str:
    return " ".join(f"{name}={environment[name]}" for name in names if name in environment)


def _mistake(environment: Mapping[str, str], text: str) -> ConfigError:
    return ConfigError(f"environment: {text}; `{unset_all(environment)}` for a single process, or start with torchrun")
