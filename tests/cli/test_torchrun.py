"""Runs under torchrun, on one node and two: restarts, ranks that die or hang, nodes that come back."""

import re
import signal
import time

import pytest

from tnt_timm.checkpoints import file_format

SIX_UPDATES = ("--grad-accum-steps", "1")  # per epoch, with two ranks

# A rank is killed before its first restart, after a number of updates, like by the system when memory runs out.
KILLED = """
import os, signal
from tnt_timm.training.trainer import Trainer
real = Trainer.train_step

def train_step(self, batches, meter):
    if (os.environ.get("TORCHELASTIC_RESTART_COUNT"), self.world.rank) == ("0", {rank}) and self.progress.updates == {after}:
        self.saver.writer.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, batches, meter)

Trainer.train_step = train_step
"""


@pytest.fixture
def two_nodes(start, port):
    """Start torchrun on the first or the second of two nodes with one rank each; both are this machine."""
    # a node counts as dead 3 s after its last heartbeat, instead of 15
    conf = "keep_alive_interval=1,keep_alive_max_attempt=3,is_host={}"

    def node(number, argv, *options, **more):
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
        rendezvous += [f"--rdzv-conf={conf.format(int(number == 0))}", "--local-addr=127.0.0.1"]
        return start(argv, torchrun=["--nnodes=2", "--nproc-per-node=1", *rendezvous, *options], **more)

    return node


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_restarted_with_the_others(start, argv, ends_straight, tmp_path, rank):
    run = start(
        argv(*SIX_UPDATES, "--recovery-interval", 1),
        before=KILLED.format(rank=rank, after=3),
        torchrun=["--nproc-per-node=2", "--max-restarts=2"],
    )
    assert run.wait() == 0, run.err
    assert run.out.count("resuming from") == 1, run.out
    # only a save that was being written when it died may be lost
    assert [update for update in run.updates if run.updates.count(update) > 1] in ([], ["1/3", "1/3"]), run.updates
    ends_straight(tmp_path / "run", 2, *SIX_UPDATES)


def test_two_nodes_are_one_run_with_the_bits_of_one_node(two_nodes, argv, ends_straight, tmp_path):
    nodes = [two_nodes(number, argv(*SIX_UPDATES)) for number in (0, 1)]
    assert [node.wait() for node in nodes] == [0, 0], [node.err for node in nodes]
    assert sorted(len(node.updates) for node in nodes) == [0, 12]  # rank 0 prints the log
    ends_straight(tmp_path / "run", 2, *SIX_UPDATES)
    validation = [tmp_path / "run", "--workers", 0, "--results-file", tmp_path / "results.json"]
    nodes = [two_nodes(number, validation, "--rdzv-id=again", program="validate") for number in (0, 1)]
    assert [node.wait() for node in nodes] == [0, 0], [node.err for node in nodes]
    assert "(13 images, each counted once)" in nodes[0].out + nodes[1].out


# Otherwise torchrun 2.15 hangs: the node that stayed does not tell the new one where the store of the ranks is.
OWN_STORE = "import os; os.environ['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] = '1'"


def test_a_node_that_dies_and_comes_back_resumes_with_the_other(two_nodes, argv, ends_straight, tmp_path):
    """The one that dies must not host the rendezvous."""
    command = argv(*SIX_UPDATES, "--recovery-interval", 1)
    first, second = (two_nodes(number, command, "--max-restarts=3", before=OWN_STORE) for number in (0, 1))
    first.until(lambda: "1/3" in first.updates + second.updates)
    second.kill()
    again = two_nodes(1, command, "--max-restarts=3", before=OWN_STORE)
    assert first.wait() == again.wait() == 0, first.err + again.err
    assert "resuming from" in first.out + again.out
    ends_straight(tmp_path / "run", 2, *SIX_UPDATES)


def test_torchrun_forwards_a_signal_and_the_run_resumes_under_it(start, argv, ends_straight, tmp_path):
    """The launcher prints much and exits with 1, whatever the exit status of its ranks; they print one line."""
    command, torchrun = argv(*SIX_UPDATES, "--recovery-minutes", 0), ["--nproc-per-node=2"]
    run = start(command, torchrun=torchrun)
    run.until(run.reached("1/1"))
    run.send(signal.SIGTERM, 0)
    assert run.wait() == 1
    assert run.err.count("stopped by SIGTERM: progress is saved") == 1 and "SignalException" in run.err
    assert 0 < file_format.read(tmp_path / "run" / file_format.LAST)["progress"]["update"] < 6
    run = start(command, torchrun=torchrun)
    assert run.wait() == 0 and "updates of the next one" in run.out, run.err
    ends_straight(tmp_path / "run", 2, *SIX_UPDATES)


DIES = """
import os, signal
from tnt_timm.errors import UserError
from tnt_timm.training import trainer

def die():
    {how}

def dying(real, number):
    calls = []
    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == number and os.environ["RANK"] == "1":
            die()
        return real(*args, **kwargs)
    return wrapper
"""
IN_A_STEP = "trainer.Trainer.next_batch = dying(trainer.Trainer.next_batch, 2)"
IN_EVALUATION = "trainer.Reporter.evaluated = dying(trainer.Reporter.evaluated, 1)"


@pytest.mark.parametrize("where", [IN_A_STEP, IN_EVALUATION], ids=["step", "evaluation"])
@pytest.mark.parametrize(
    "how, said",
    [
        ("raise UserError('out of luck')", "error: out of luck"),
        ("raise KeyError('no such key')", "KeyError: 'no such key'"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "terminated with signal SIGKILL"),
    ],
    ids=["mistake", "bug", "killed"],
)
def test_a_rank_that_dies_ends_the_job_and_its_error_is_the_one_shown(start, argv, where, how, said):
    """The other ranks stop waiting for it without an error of their own, and torchrun names the right root cause."""
    started = time.monotonic()
    run = start(argv(), before=DIES.format(how=how) + where, torchrun=["--nproc-per-node=3"])
    assert run.wait() == 1 and time.monotonic() - started < 30
    assert said in run.err, run.err
    assert set(re.findall(r"^(?:error: .*|\w*Error: .*)", run.err, re.M)) <= {said}, run.err
    cause = run.err[run.err.index("Root Cause (first observed failure):") :]
    assert re.search(r"rank +: 1 \(local_rank: 1\)", cause), run.err


# Rank 1 stands still in its second step.
HANGS = """
import os, time
from tnt_timm.training.trainer import Trainer
real = Trainer.next_batch

def stands_still():
    time.sleep(600)

def next_batch(self, batches, meter):
    if self.world.rank == 1 and self.progress.updates == 1:
        stands_still()
    return real(self, batches, meter)

Trainer.next_batch = next_batch
"""


def test_a_rank_that_hangs_is_shown_with_its_stack(start, argv):
    """So are the others, here in the backward pass, which exchanges gradients."""
    run = start(argv(*SIX_UPDATES, "--hang-minutes", 1 / 60), 2, HANGS)
    where = [r"^rank 1: .*, in stands_still$", r"^rank 0: .*, in _engine_run_backward$"]
    run.until(lambda: all(re.search(pattern, run.err, re.M) for pattern in where))
    assert re.search(r"^warning: rank 1: no step for \d+ s; current stacks:$", run.err, re.M)
    assert not re.search(r"^rank 0: .*, in stands_still$", run.err, re.M)
    run.kill()


NO_DATA = """
import time
from tnt_timm.commands import train
train.build = lambda *args, **kwargs: time.sleep(600)
"""


def test_a_rank_that_hangs_before_its_first_step_is_shown_too(start, argv):
    run = start(argv("--hang-minutes", 1 / 60), before=NO_DATA)
    run.until(lambda: re.search(r"^rank 0: .*, in <lambda>$", run.err, re.M))
    assert re.search(r"^warning: rank 0: no step for \d+ s; current stacks:$", run.err, re.M)
    run.kill()


# A rank prints its process number in its third step, which takes long, and at its end the exit status of the command.
SLOW_THIRD_STEP = """
import ctypes, os, time
from tnt_timm.commands import train
from tnt_timm.training import trainer
main, next_batch = train.main, trainer.Trainer.next_batch

def slow(self, batches, meter):
    if self.progress.updates == 2:
        print(f"rank {self.world.rank} is process {os.getpid()}\\n", end="", flush=True)
        time.sleep(3)
    return next_batch(self, batches, meter)

def told():
    # a forked rank, as here, gets SIGINT when its parent dies; a rank of `torchrun train.py` does not
    ctypes.CDLL(None).prctl(1, 0)
    print(f"status {main()}\\n", end="", flush=True)

train.main, trainer.Trainer.next_batch = told, slow
"""


def test_ranks_whose_torchrun_is_killed_save_and_end(start, argv, ends_straight, tmp_path):
    """Also their workers."""
    command = argv(*SIX_UPDATES, "--recovery-minutes", 0)
    run = start([*command, "--workers", 1], before=SLOW_THIRD_STEP, torchrun=["--nproc-per-node=2"])
    run.until(lambda: run.out.count("is process") == 2)
    killed = time.monotonic()
    run.send(signal.SIGKILL, 0)
    while run.out.count("status 75") < 2:
        assert time.monotonic() - killed < 30, run.out + run.err
        time.sleep(0.02)
    assert run.err.count("has died; stopping") == 1 and run.err.count("stopped by SIGTERM: progress is saved") == 1
    assert file_format.read(tmp_path / "run" / file_format.LAST)["progress"]["updates"] == 3
    run = start(command, 2)
    assert run.wait() == 0 and run.updates[0] == "1/4", run.err
    ends_straight(tmp_path / "run", 2, *SIX_UPDATES)
