"""train.sbatch and submit.py on a real SLURM: two nodes, preemption, time limits, failures.

Where the job script is tested and not the training, a few lines of Python stand in for train.py.
"""

import re
import sys

import pytest

STAND_IN = """
import os, signal, sys, time
rank, start = int(os.environ["RANK"]), os.environ.get("SLURM_RESTART_COUNT", "0")
print("rank", rank, "of", os.environ["WORLD_SIZE"], "on", os.environ["SLURMD_NODENAME"], *sys.argv[1:])
"""
FAILING = """
if rank == 1:
    sys.exit("no such luck")
time.sleep(300)
"""
# These wait for one signal in their first start, as if to save, and finish in their second.
WARNED = """
signal.signal(signal.SIGUSR2, lambda *_: os._exit(75))
print("ready", start)
time.sleep(0 if start == "1" else 300)
"""
TERMINATED = WARNED.replace("SIGUSR2", "SIGTERM")
DEAF = """
print("ready", start)
time.sleep(300)
"""
# train.py, which in its first two starts waits to be asked to stop: after five updates of epoch 1, then of epoch 2.
WAITING = """
import os, sys, time
from tnt_timm.commands import train
from tnt_timm.training import trainer
real = trainer.Trainer.train_step

def train_step(self, batches, meter):
    place = int(os.environ.get("SLURM_RESTART_COUNT", "0")), 5
    while (self.progress.epoch, self.progress.update) == place and not self.stop:
        time.sleep(0.02)
    return real(self, batches, meter)

trainer.Trainer.train_step = train_step
sys.exit(train.main())
"""


def reach(cluster, output, text, times=1):
    cluster.wait_for(lambda: output.exists() and output.read_text().count(text) >= times, output)


@pytest.fixture
def submit_stand_in(cluster, template, tmp_path):
    """As by hand: sbatch with train.sbatch. Returns the job's number and output file."""

    def submit(program, *options, argv=(), **env):
        (tmp_path / "stand_in.py").write_text(STAND_IN + program)
        env = {"TNT_PYTHON": sys.executable, "TNT_TRAIN": "stand_in.py", **env}
        command = ["sbatch", "--parsable", "--output=%j.out", *options, template, *argv]
        number = cluster.run(*command, cwd=tmp_path, **env).stdout.strip()
        return number, tmp_path / f"{number}.out"

    return submit


def test_two_nodes_of_two_gpus_are_one_run_of_four_ranks(cluster, submit_stand_in, tmp_path):
    number, output = submit_stand_in("", "--nodes=2", "--gpus-per-node=2", argv=["--lr", "a b"])
    assert cluster.wait_for_end(number, output)["JobState"] == "COMPLETED", output.read_text()
    lines = re.findall(r"\[rank (\d)\] rank (\d) of 4 on n(\d) --lr a b\n", output.read_text())
    assert sorted(rank for rank, _, _ in lines) == ["0", "1", "2", "3"]
    assert all(prefix == rank for prefix, rank, _ in lines)
    node_of = {rank: node for _, rank, node in lines}
    assert node_of["0"] == node_of["1"] != node_of["2"] == node_of["3"]
    logs = tmp_path / "output" / "slurm" / number / "start-0"
    for rank, node in node_of.items():
        assert (logs / f"rank-{rank}.out").read_text() == f"rank {rank} of 4 on n{node} --lr a b\n"
        assert (logs / f"rank-{rank}.exit").read_text() == "0\n"


MEANT_OTHERWISE = [
    (["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"], {}, "4 tasks on 2 nodes; pass --ntasks-per-node=1"),
    (["--nodes=2"], {}, "no GPUs in this job"),
    (["--nodes=1", "--gpus-per-node=2"], {"TNT_PROCS_PER_NODE": "1"}, "1 processes for the 2 GPUs of n"),
    (["--nodes=1", "--gpus-per-node=2"], {"TNT_TRAIN": "no.py"}, "no.py: no such file"),
    (["--nodes=1", "--gpus-per-node=2", "--array=1"], {}, "set TNT_EXPERIMENT"),
    (["--nodes=2", "--gpus-per-node=2"], {"TNT_PYTHON": "/bin/false"}, "the run failed"),  # before there are ranks
]


def test_jobs_that_were_not_meant_so_fail_at_once(cluster, submit_stand_in):
    jobs = [(submit_stand_in("", *options, **env), error) for options, env, error in MEANT_OTHERWISE]
    for (number, output), error in jobs:
        job = cluster.wait_for_end(number, output)
        assert (job["JobState"], job["Restarts"]) == ("FAILED", "0")
        assert f"train.sbatch: error: {error}" in output.read_text()


def test_a_failing_rank_fails_the_job_which_is_not_queued_again(cluster, submit_stand_in):
    number, output = submit_stand_in(FAILING, "--nodes=2", TNT_PROCS_PER_NODE="1", TNT_TRAIN="-m stand_in")
    job = cluster.wait_for_end(number, output)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0")
    assert "[rank 1] no such luck" in output.read_text() and "error: the run failed" in output.read_text()


def test_an_array_of_seeds_whose_tasks_are_queued_again_one_by_one_until_done(cluster, submit_stand_in):
    env = {"TNT_PROCS_PER_NODE": "2", "TNT_EXPERIMENT": "name"}
    number, output = submit_stand_in(WARNED, "--nodes=1", "--array=3,5", "--output=%a.out", **env)
    outputs = {seed: output.with_name(f"{seed}.out") for seed in ("3", "5")}
    for seed, output in outputs.items():
        reach(cluster, output, "ready 0", 2)
        cluster.run("scancel", "--signal=USR2", "--batch", f"{number}_{seed}")  # as before the time limit
    for seed, output in outputs.items():
        job = cluster.wait_for_end(f"{number}_{seed}", output)
        text = output.read_text()
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), text
        assert text.count(f"of 2 on n{job['NodeList'][1]} --seed {seed} --experiment name-seed{seed}\n") >= 2
        assert re.findall(r"train\.sbatch: (.*?); requeued|train\.sbatch: (finished)", text) == [
            ("saved", ""),
            ("", "finished"),
        ]


def test_a_job_that_cannot_save_in_time_is_queued_again_without(cluster, submit_stand_in):
    number, output = submit_stand_in(DEAF, "--nodes=1", TNT_PROCS_PER_NODE="1", TNT_GRACE="1")
    reach(cluster, output, "ready 0")
    cluster.run("scancel", "--signal=USR2", "--batch", number)
    reach(cluster, output, "not saved after 1 s, so the run will resume from an earlier checkpoint; requeued")
    cluster.wait_for(lambda: cluster.job(number)["JobState"] == "PENDING", output)
    cluster.run("scancel", number)


def test_a_preempted_job_saves_in_its_grace_time_and_starts_again(cluster, submit_stand_in):
    number, output = submit_stand_in(TERMINATED, "--nodes=2", TNT_PROCS_PER_NODE="1")
    reach(cluster, output, "ready 0", 2)
    cluster.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    job = cluster.wait_for_end(number, output)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output.read_text()
    assert "train.sbatch: saved; requeued" in output.read_text()


def test_a_cancelled_job_saves_and_is_not_queued_again(cluster, submit_stand_in):
    number, output = submit_stand_in(TERMINATED, "--nodes=2", TNT_PROCS_PER_NODE="1")
    reach(cluster, output, "ready 0", 2)
    cluster.run("scancel", number)
    job = cluster.wait_for_end(number, output)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    reach(cluster, output, "train.sbatch: ended by SLURM, and saved")


# ---- the digits, for real


def test_stopped_and_preempted_it_ends_with_the_bits_of_an_uninterrupted_run(
    cluster, submit_py, template, tmp_path, assert_same_bits
):
    """Over two nodes: stopped inside the first epoch as before the time limit, preempted inside the second."""
    config = cluster.repo / "configs" / "digits.yaml"
    settings = ["--epochs", "2", "--warmup-epochs", "0", "--log-interval", "1", "--device", "cpu"]
    settings += ["--model-kwargs", "depth=1", "embed_dim=48", "num_heads_outer=4"]
    (tmp_path / "waiting.py").write_text(WAITING)
    by_hand = {"TNT_PYTHON": sys.executable, "TNT_TRAIN": "waiting.py", "TNT_PROCS_PER_NODE": "1"}
    options = ["--nodes=2", "--parsable", "--output=%x.out"]
    output, straight_output = tmp_path / "tnt.out", tmp_path / "straight.out"

    command = ["sbatch", *options, template, "--config", config, *settings, "--experiment", "stopped"]
    number = cluster.run(*command, cwd=tmp_path, **by_hand).stdout.strip()
    command = [*submit_py, config, "--procs-per-node=1", *options, "--job-name=straight", "--", *settings]
    straight = cluster.run(*command, "--experiment", "straight", cwd=tmp_path).stdout.strip()
    reach(cluster, output, "epoch 1/2  update 5/22")
    cluster.run("scancel", "--signal=USR2", "--batch", number)  # what --signal does before the time limit
    reach(cluster, output, "epoch 2/2  update 5/22")
    cluster.run("scontrol", "requeue", number)

    job, text = cluster.wait_for_end(number, output), output.read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "2"), text
    before, after = text.split("train.sbatch: saved; requeued")
    assert "epoch 1/2  update 22/22" not in before and "epoch 1/2  update 1/22" not in after
    assert after.count("resuming from") == 2
    job, text = cluster.wait_for_end(straight, straight_output), straight_output.read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), text
    assert "32 per process x 2 processes x 1 accumulation = 64 global batch" in text
    assert_same_bits(tmp_path / "output" / "straight", tmp_path / "output" / "stopped")
