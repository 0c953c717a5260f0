"""The environment says whether a process is alone or a rank; what contradicts itself is an error of one line."""

import pytest

from tnt_timm.errors import ConfigError
from tnt_timm.runtime.launch import ALONE, Launch, read_launch

RANK_1 = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="n0", MASTER_PORT="29500")


@pytest.mark.parametrize(
    "environment, launch",
    [
        ({}, ALONE),
        ({"MASTER_ADDR": "n0", "LOCAL_WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "1"}, ALONE),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, ALONE),  # a job script, not one of four tasks
        ({"RANK": "0", "WORLD_SIZE": "1"}, ALONE),
        (RANK_1, Launch(1, 2, 1, "n0", 29500)),
        (RANK_1 | {"TORCHELASTIC_RUN_ID": "none"}, Launch(1, 2, 1, "n0", 29500, by_torchrun=True)),
        (RANK_1 | {"SLURM_STEP_NUM_TASKS": "2"}, Launch(1, 2, 1, "n0", 29500)),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n0", "MASTER_PORT": "1"},
            Launch(1, 2, None, "n0", 1),
        ),
    ],
)
def test_launch(environment, launch):
    assert read_launch(environment) == launch


@pytest.mark.parametrize(
    "environment, error",
    [
        ({"RANK": "1"}, "RANK=1: WORLD_SIZE not set; `unset RANK` for a single process, or start with torchrun"),
        ({"RANK": ""}, "RANK=: expected a whole number, at least 0; `unset RANK`"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1: expected a whole number"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one: expected a whole number"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8: RANK not set; `unset WORLD_SIZE`"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3: RANK and WORLD_SIZE not set; `unset LOCAL_RANK`"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 WORLD_SIZE=0: "),
        (
            RANK_1 | {"RANK": "2"},
            "RANK=2 WORLD_SIZE=2: the ranks of 2 processes are below 2; `unset RANK WORLD_SIZE LO",
        ),
        (RANK_1 | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2 LOCAL_WORLD_SIZE=2 WORLD_SIZE=2: expected LOCAL_RANK below 2"),
        (RANK_1 | {"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4 WORLD_SIZE=2: expected 1 to 2"),
        (RANK_1 | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999: expected 1 to 65535"),
        (RANK_1 | {"MASTER_PORT": "tcp"}, "MASTER_PORT=tcp: expected a whole number"),
        (RANK_1 | {"MASTER_ADDR": ""}, "RANK=1 WORLD_SIZE=2: MASTER_ADDR not set, so the ranks cannot connect"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT not set, so"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS=4: srun starts 4 runs of one process each, not one run"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun starts 2 runs"),
        ({"PMI_SIZE": "2"}, "mpiexec starts 2 runs of one process each"),
    ],
)
def test_contradictions(environment, error):
    with pytest.raises(ConfigError) as caught:
        read_launch(environment)
    assert str(caught.value).startswith("environment: ") and error in str(caught.value)
    assert caught.value.exit_code == 2 and not caught.value.everywhere


@pytest.mark.parametrize("environment", [{"RANK": "1"}, {"RANK": ""}, {"SLURM_STEP_NUM_TASKS": "2"}])
@pytest.mark.parametrize("command", ["train", "validate", "validate_all"])
def test_commands_for_ranks_print_it(run_script, monkeypatch, command, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    outcome = run_script(command, "nowhere")
    assert outcome.status == 2 and outcome.error.startswith("error: environment: ")


def test_other_commands_use_one_process_whatever_the_environment_says(run_script, monkeypatch, tmp_path):
    """As in a pod of a job of two, where rank 0 would wait for rank 1."""
    for name, value in dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1", PMI_SIZE="2").items():
        monkeypatch.setenv(name, value)
    assert run_script("complexity", "tnt_s", "--output", tmp_path / "costs.txt").status == 0
    assert run_script("predict", "nowhere", "nothing.png").error == "error: nothing.png: no such file or folder"
